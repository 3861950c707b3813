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

from qstar_jax.evaluation.judges.base import Comparison, Verdict

MODEL, REFERENCE, ANNOTATIONS = "model_outputs.json", "reference_outputs.json", "annotations.json"


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

    `generator`, `baseline` and `annotator` name the evaluated model, the one it is compared with, and the judge.

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
