"""The scores of a run that has not ended yet, batch by batch: scores.partial.jsonl."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qstar_jax.data.tokenization import Example
from qstar_jax.evaluation.scored import ScoredResponse
from qstar_jax.store.identity import identity_file, write_identity
from qstar_jax.store.sole_writer import sole_writer

PARTIAL = "scores.partial.jsonl"


class PartialScores:
    """The responses that are scored already; a context manager while others are added.

    Args:
        folder: Where it is, or is begun.
        identity: Models, data and options of these scores.

    Attributes:
        was_other: Whether it held scores of other models, data or options, which are dropped.
        damage: Which line is no score, if there is one: it and those after it are dropped.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]):
        self.path = folder / PARTIAL
        self._identity, self._lines = json.loads(json.dumps(identity)), []
        is_same = self._read_identity() == self._identity
        self.was_other = self.path.exists() and not is_same
        self.damage: str | None = None
        if self.path.exists() and is_same:
            self._lines = self.path.read_bytes().splitlines(keepends=True)
            if self._lines and not self._lines[-1].endswith(b"\n"):
                self._lines.pop()  # half a line, of a process that was killed while it wrote

    def _read_identity(self) -> Any:
        try:
            return json.loads(identity_file(self.path).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def take(self, examples: Sequence[Example], batch_size: int) -> tuple[int, list[ScoredResponse]]:
        """Takes whole batches, as rounding would make others differ from those of a run that was not interrupted.

        Returns:
            How many examples they are, and their responses.
        """
        counts = [len(example.responses) for example in examples]
        records = self._read([example.row for example in examples for _ in example.responses])
        ends = [*range(0, len(examples), batch_size), len(examples)]
        taken = max(end for end in ends if sum(counts[:end]) <= len(records))
        if 0 < len(examples) - taken < batch_size:  # the last batch, a short one, has the shape of the one before it
            taken = max(0, taken - batch_size)
        self._lines = self._lines[: sum(counts[:taken])]
        return taken, records[: len(self._lines)]

    def _read(self, rows: Sequence[int]) -> list[ScoredResponse]:
        """Reads the responses of rows of the file, up to the first line that is not one of them."""
        records: list[ScoredResponse] = []
        for number, (line, row) in enumerate(zip(self._lines, rows, strict=False), start=1):
            try:
                record = ScoredResponse.from_json(json.loads(line))
            except (ValueError, TypeError, KeyError, AttributeError):
                self.damage = f"line {number} is not readable"
                break
            if record.row != row:
                self.damage = f"line {number} is of row {record.row}, and row {row} was due"
                break
            records.append(record)
        return records

    def __enter__(self) -> "PartialScores":
        """Writes the identity, and drops what was not taken."""
        self._held = sole_writer(self.path.parent)
        self._held.__enter__()
        write_identity(self.path, self._identity)
        self._file = self.path.open("ab")
        self._file.truncate(sum(map(len, self._lines)))
        return self

    def __exit__(self, *_):
        """Closes the file."""
        self._file.close()
        self._held.__exit__(None, None, None)

    def append(self, records: Sequence[ScoredResponse]):
        """Adds the responses of a batch."""
        lines = (json.dumps(record.to_json(), ensure_ascii=False) + "\n" for record in records)
        self._file.write("".join(lines).encode("utf-8", "surrogatepass"))
        self._file.flush()

    def remove(self):
        """Removes it, once the scores are complete."""
        self.path.unlink(missing_ok=True)
        identity_file(self.path).unlink(missing_ok=True)
