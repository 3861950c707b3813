"""Responses and verdicts in the files of AlpacaEval, for its metrics and leaderboards.

Its `evaluate` takes the reference's responses as output_1 and the model's as output_2; a preference is a number from 1
(output_1 is better) to 2 (output_2 is better), 1.5 is a tie, and a missing one (null) is left out of the win rate,
which is the mean of preference - 1 in per cent.

References:
    tatsu-lab/alpaca_eval 0.6.6: main.py (`annotate_head2head(outputs_1=reference_outputs, outputs_2=model_outputs)`),
    metrics/helpers.py (`describe_head2head`), annotators/pairwise_evaluator.py (1.5 for equal outputs).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qstar_jax.errors import InputError
from qstar_jax.evaluation.judges.base import Comparison, Verdict

MODEL, REFERENCE, ANNOTATIONS = "model_outputs.json", "reference_outputs.json", "annotations.json"
_KEYS = ("instruction", "output_1", "output_2", "preference")


def export(
    folder: Path,
    comparisons: Sequence[Comparison],
    verdicts: Sequence[Verdict],
    *,
    generator: str,
    baseline: str,
    annotator: str,
) -> list[Path]:
    """Writes model_outputs.json, reference_outputs.json and annotations.json.

    Args:
        folder: Made where it is missing.
        comparisons: What was judged.
        verdicts: One each.
        generator: Name of the model on trial.
        baseline: Name of the one that it is compared with.
        annotator: Name of the judge.

    Raises:
        ValueError: If there is not one verdict per comparison.
    """
    annotations = [
        {
            "instruction": c.prompt,
            "output_1": c.baseline,
            "generator_1": baseline,
            "output_2": c.answer,
            "generator_2": generator,
            "annotator": annotator,
            "preference": None if verdict.win is None else 1.0 + verdict.win,
            "row": c.row,
            "note": verdict.note,
        }
        for c, verdict in zip(comparisons, verdicts, strict=True)
    ]
    outputs = [{"instruction": c.prompt, "output": c.answer, "generator": generator} for c in comparisons]
    references = [{"instruction": c.prompt, "output": c.baseline, "generator": baseline} for c in comparisons]
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, records in ((MODEL, outputs), (REFERENCE, references), (ANNOTATIONS, annotations)):
        written.append(folder / name)
        written[-1].write_text(json.dumps(records, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return written


def read_annotations(path: Path) -> tuple[list[Comparison], list[Verdict]]:
    """Reads annotations.json, ours or AlpacaEval's.

    Returns:
        Comparisons of output_2 with output_1, and verdicts. A preference between 1 and 2 (AlpacaEval has weighted ones)
        gives a `win` between 0 and 1; 0, its older sign for a tie, gives 0.5.

    Raises:
        InputError: If it is not such a file.
    """
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: not a readable JSON file ({error})") from error
    if not isinstance(records, list):
        raise InputError(f"{path}: expected a list of annotations, found a {type(records).__name__}")
    comparisons, verdicts = [], []
    for row, record in enumerate(records):
        where = f"{path} entry {row + 1}"
        missing = [key for key in _KEYS if not isinstance(record, dict) or key not in record]
        if missing:
            raise InputError(f"{where}: no key {missing[0]!r}; expected {', '.join(_KEYS)}")
        texts = record["instruction"], record["output_2"], record["output_1"]
        comparisons.append(Comparison(record.get("row", row), *texts))
        verdicts.append(Verdict(_win(record["preference"], where), note=record.get("note", "")))
    return comparisons, verdicts


def _win(preference: Any, where: str) -> float | None:
    if preference is None or preference != preference:
        return None
    if preference == 0:
        return 0.5
    if not isinstance(preference, int | float) or not 1 <= preference <= 2:
        raise InputError(f"{where}: preference {preference!r}; expected a number from 1 to 2, 0 or null")
    return preference - 1.0
