"""Rows of preferences between runs of a pipeline, and the batches that they become."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh

from qstar_jax.config import DataOptions
from qstar_jax.data.batches import Batch
from qstar_jax.data.dropped import BadRow
from qstar_jax.data.feeder import Feeder
from qstar_jax.data.loading import Dataset
from qstar_jax.data.reading import read_rows
from qstar_jax.data.table import ExampleTable
from qstar_jax.data.tokenization import Example
from qstar_jax.errors import InputError
from qstar_jax.pipeline.language import LanguageStage
from qstar_jax.pipeline.objective import PreferenceBatch
from qstar_jax.pipeline.template import PROMPT

_FORMS = "prompt, chosen, rejected; or prompt, outputs, better"


@dataclass(frozen=True)
class PairRow:
    """Two runs of a pipeline to one prompt.

    Attributes:
        row: Index of its row, from 0.
        prompt: The user's prompt.
        runs: Texts by stage of both runs, the preferred one first, if one is.
        labelled: Whether one is preferred.
    """

    row: int
    prompt: str
    runs: tuple[dict[str, str], dict[str, str]]
    labelled: bool = True


def read_pairs(source: str, names: Sequence[str], limit: int | None = None) -> list[PairRow]:
    """Reads rows of preferences.

    Args:
        source: A file; see `PipelineDataOptions.train`.
        names: Names of the stages.
        limit: Read only the first rows.

    Raises:
        InputError: If a row is wrong; its number is named.
    """
    rows = [_pair(row, index, source, names) for index, row in enumerate(read_rows(source, "train", limit))]
    if not rows:
        raise InputError(f"{source}: no rows; expected {_FORMS}")
    return rows


def labelled(rows: Sequence[PairRow], source: str) -> list[PairRow]:
    """Leaves out rows that nobody has compared.

    Raises:
        InputError: If nobody has compared any.
    """
    kept = [row for row in rows if row.labelled]
    if not kept:
        raise InputError(f"{source}: better is null in all {len(rows)} rows; say 0 or 1 in those that you compare")
    return kept


def _pair(row: Any, index: int, source: str, names: Sequence[str]) -> PairRow:
    where = f"{source} row {index + 1}"
    if isinstance(row, BadRow):
        raise InputError(f"{where}: {row.fault}")
    if not isinstance(row, dict) or not isinstance(row.get(PROMPT), str):
        found = ", ".join(map(repr, row)) if isinstance(row, dict) else type(row).__name__
        raise InputError(f"{where}: no text in column {PROMPT!r} (found: {found}); expected {_FORMS}")
    if "chosen" in row and "rejected" in row:
        runs, compared = (row["chosen"], row["rejected"]), True
    elif "outputs" in row:
        runs, better = row["outputs"], row.get("better")
        if not isinstance(runs, list) or len(runs) != 2:
            raise InputError(f"{where}, column 'outputs': expected a list of two runs, found {runs!r:.60}")
        if better is not None and better not in (0, 1):
            raise InputError(f"{where}, column 'better': found {better!r}; expected 0, 1 or null")
        runs, compared = (runs if better in (None, 0) else runs[::-1]), better is not None
    else:
        raise InputError(f"{where}: no preference (found: {', '.join(map(repr, row))}); expected {_FORMS}")
    first, second = (_run(run, where, names) for run in runs)
    if first == second:
        raise InputError(f"{where}: both runs are equal, so nothing can be learned from it; remove the row")
    return PairRow(index, row[PROMPT], (first, second), compared)


def _run(run: Any, where: str, names: Sequence[str]) -> dict[str, str]:
    expected = f"expected a text of each stage ({', '.join(names)})"
    if not isinstance(run, dict):
        raise InputError(f"{where}: a run is {run!r:.60}; {expected}, by its name")
    for name in names:
        if name not in run:
            raise InputError(f"{where}: no output of stage {name} (found: {', '.join(run)}); {expected}")
    for name, text in run.items():
        if name not in names:
            raise InputError(f"{where}: {name} is no stage; {expected}")
        if not isinstance(text, str):
            raise InputError(f"{where}, stage {name}: found {type(text).__name__}; {expected}")
    return {name: run[name] for name in names}


def row_examples(
    stages: Sequence[LanguageStage], rows: Sequence[PairRow], source: str, *, trained: Sequence[str] | None = None
) -> list[tuple[list[Example], list[Example]] | None]:
    """Tokenizes what each stage was given and what it wrote, in both runs.

    Args:
        stages: The stages.
        rows: The rows.
        source: Their file, for errors.
        trained: Names of the stages to do this for; all by default.

    Returns:
        For each stage the examples of the first and of the second runs, in order; None for stages that are not trained.
    """

    def examples(stage: LanguageStage, side: int) -> list[Example]:
        prompts = stage.prompts([{PROMPT: row.prompt, **row.runs[side]} for row in rows])
        texts = [row.runs[side][stage.name] for row in rows]
        return stage.examples(prompts, texts, source=source, rows=[row.row for row in rows])

    chosen = [stage.name for stage in stages] if trained is None else trained
    return [(examples(stage, 0), examples(stage, 1)) if stage.name in chosen else None for stage in stages]


class PairFeeder:
    """Batches of pairs on the mesh; a training step reads it as it does a `Feeder`.

    Args:
        examples: What `row_examples` made.
        source: File of the rows.
        batch_size: Pairs per batch.
        mesh: Devices.
        layout: How prompts and outputs share sequences.
        option: Name of the option that sets `batch_size`, for errors.
        accumulate: Micro-batches per training step.
    """

    def __init__(
        self,
        examples: Sequence[tuple[list[Example], list[Example]] | None],
        source: str,
        batch_size: int,
        mesh: Mesh,
        layout: str = "packed",
        option: str = "train.batch_size",
        *,
        accumulate: int = 1,
    ):
        def feeder(side: list[Example]) -> Feeder:
            dataset = Dataset(ExampleTable.of(side), (), source)
            return Feeder(dataset, batch_size, mesh, DataOptions(layout=layout), option, accumulate=accumulate)

        self._feeders = [both and tuple(map(feeder, both)) for both in examples]
        first = next(both[0] for both in self._feeders if both)
        self.dataset, self.batch_size, self.batches = first.dataset, batch_size, first.batches
        self.indices_at_step = first.indices_at_step

    def at_step(self, seed: int, step: int) -> PreferenceBatch:
        """Returns the batch of a step, a pure function of (seed, step)."""
        return _joined([both and tuple(feeder.at_step(seed, step) for feeder in both) for both in self._feeders])

    def in_order(self) -> Iterator[PreferenceBatch]:
        """Yields all pairs in file order; those that fill up the last batch have weight 0."""
        sides = [both and tuple(feeder.in_order() for feeder in both) for both in self._feeders]
        for _ in range(self.batches):
            yield _joined([both and tuple(map(next, both)) for both in sides])


def _joined(batches: Sequence[tuple[Batch, Batch] | None]) -> PreferenceBatch:
    first = next(both[0] for both in batches if both)
    chosen, rejected = (tuple(both and both[side] for both in batches) for side in (0, 1))
    return PreferenceBatch(None, chosen, rejected, first.weights)


def pad_to_multiple(items: Sequence[Any], size: int) -> list[Any]:
    """Repeats the last of some items until `size` divides their number."""
    return [*items, *[items[-1]] * (-len(items) % size)]
