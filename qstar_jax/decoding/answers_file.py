"""generations.jsonl, which grows while answers are made, and from which a broken run goes on."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import yaml

from qstar_jax.config import GenerateConfig
from qstar_jax.data.tokenization import Example
from qstar_jax.decoding.decoder import Answer, Decoder
from qstar_jax.errors import InputError
from qstar_jax.settings import first_difference

# What may differ between a run and its continuation: the rest decides what the answers are.
FREE_OPTIONS = ("out", "batch_size", "mesh", "compute.remat", "compute.attention", "data.max_eval_rows")
FIX = "choose another --out, or remove that folder to begin anew"


class AnswersFile:
    """A folder's answers: those that are there, and those that are added. A context manager while it is written.

    Reading changes nothing: that the settings are the same, and what is there already, is known before a model is
    loaded.

    Args:
        config: The run; its `out` is the folder.

    Raises:
        InputError: If the folder holds something else, or answers that were made with other settings.
    """

    def __init__(self, config: GenerateConfig):
        self.folder = Path(config.out)
        self.path = self.folder / "generations.jsonl"
        self._settings = yaml.safe_dump(asdict(config), sort_keys=False)
        self._check_settings()
        records, self._size = self._read()
        self.prompts: dict[int, str] = {record["row"]: record["prompt"] for record in records}
        self.answers = len(records)

    def _check_settings(self):
        path = self.folder / "config.yaml"
        if not path.exists():
            if self.path.exists():
                raise InputError(f"{self.path} has no config.yaml beside it that says how it was made; {FIX}")
            return
        try:
            stored = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (ValueError, yaml.YAMLError) as error:
            raise InputError(f"{path}: not readable ({str(error).splitlines()[0]}); {FIX}") from error
        if not isinstance(stored, dict) or "decode" not in stored:
            raise InputError(f"{path} is not of answers: {self.folder} belongs to another verb; choose another --out")
        different = first_difference(stored, yaml.safe_load(self._settings), FREE_OPTIONS)
        if different:
            name, before, now = different
            raise InputError(f"{self.folder} holds answers with {name} {before!r}, and it is {now!r} now; {FIX}")

    def _read(self) -> tuple[list[dict], int]:
        """Records of rows that are done, and where they end in the file."""
        if not self.path.exists():
            return [], 0
        lines = self.path.read_bytes().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()  # half a line, of a process that was killed while it wrote
        try:
            records = [json.loads(line) for line in lines]
            last = [(record["row"], record["answers"]) for record in records][-1:]
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{self.path}: a line that is no answer ({error}); {FIX}") from error
        # Rows are written one after the other, so only the last can be incomplete.
        kept = [record for record in records if record["row"] not in dict(last)]
        if [len(records) - len(kept)] == list(dict(last).values()):
            kept = records
        return kept, sum(map(len, lines[: len(kept)]))

    def __enter__(self) -> "AnswersFile":
        """Begins to write: keeps the settings, and drops what is incomplete."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "config.yaml"
        if not path.exists():
            draft = path.with_name("config.yaml.part")
            draft.write_text(self._settings, encoding="utf-8")
            os.replace(draft, path)
        self._file = self.path.open("ab")
        self._file.truncate(self._size)
        return self

    def __exit__(self, *_):
        """Closes the file."""
        self._file.close()

    def append(self, records: list[dict]):
        """Adds all answers of some rows; they are on their way to the disk when this returns."""
        self._file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode())
        self._file.flush()
        self.answers += len(records)


def read_answers(folder: Path) -> list[dict]:
    """Reads a complete file of answers.

    Args:
        folder: Where `qstar generate` or a sweep has written it.

    Returns:
        Its records.
    """
    return [json.loads(line) for line in (folder / "generations.jsonl").read_text(encoding="utf-8").splitlines()]


def answer_prompts(
    decoder: Decoder, examples: Sequence[Example], texts: Mapping[int, str], file: AnswersFile, batch_size: int
) -> Iterator[list[tuple[int, list[Answer]]]]:
    """Answers the prompts that a file does not answer yet, batch by batch.

    Args:
        decoder: Answers prompts.
        examples: All prompts of the run.
        texts: Row of each prompt -> its text.
        file: Gets the answers; it must be open.
        batch_size: Prompts decoded at once.

    Yields:
        Rows and their answers, after they were written.
    """
    size = min(batch_size, len(examples))
    for start in range(0, len(examples), batch_size):
        # Always the same batches, or a run that goes on could differ from one that was not broken by rounding.
        batch = examples[start : start + batch_size]
        rows = [example.row for example in batch]
        if all(row in file.prompts for row in rows):
            continue
        found = decoder([example.prompt for example in batch], rows, fill_to=size)
        missing = [(row, answers) for row, answers in zip(rows, found, strict=True) if row not in file.prompts]
        file.append(
            [
                {"row": row, "rank": rank, "answers": len(answers), "prompt": texts[row], **asdict(answer)}
                for row, answers in missing
                for rank, answer in enumerate(answers)
            ]
        )
        yield missing
