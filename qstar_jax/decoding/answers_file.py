"""generations.jsonl, which grows while answers are made, and from which a broken run goes on."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import yaml

from qstar_jax.config import DataOptions, GenerateConfig
from qstar_jax.config.compare import first_difference, keep_date
from qstar_jax.data.dropped import Dropped
from qstar_jax.data.loading import Dataset
from qstar_jax.data.tokenization import Example
from qstar_jax.decoding.decoder import Answer, Decoder
from qstar_jax.decoding.eos import eos_token_ids
from qstar_jax.decoding.generate import Guide
from qstar_jax.errors import InputError
from qstar_jax.store.identity import check_identity, write_identity
from qstar_jax.store.open import LoadedModel
from qstar_jax.store.reference_cache import write_whole

# What may differ between a run and its continuation: it decides where and how the same answers are computed, which
# changes them by rounding at most. The rest decides what the answers are.
FREE_OPTIONS = (
    "out",
    "batch_size",
    "mesh",
    "compute.remat",
    "compute.attention",
    "data.max_eval_rows",
    "data.bad_rows",
)
DROPPED = "dropped"  # the `finish` of a row that has no answer
_NEEDED = ("row", "answers", "prompt", "finish")
_PAIR = ("tuned", "untuned")
FIX = "choose another --out, or remove that folder to begin anew"


class AnswersFile:
    """A folder's answers: those that are there, and those that are added. A context manager while it is written.

    Reading changes nothing: that the settings are the same, and what is there already, is known before a model is
    loaded. That the models and the prompts are the same is known once `check` was called, which comes before writing.

    Args:
        config: The run; its `out` is the folder.

    Attributes:
        data: Data options, with the day on which the folder was begun, if chat templates print it.
        prompts: Row -> its prompt, of the rows that are in the file; None for a row that was dropped.
        answers: How many answers there are.

    Raises:
        InputError: If the folder holds something else, or answers that were made with other settings.
    """

    def __init__(self, config: GenerateConfig):
        self.folder = Path(config.out)
        self.path = self.folder / "generations.jsonl"
        self._config = self._check_settings(config)
        records, self._size = self._read()
        self.prompts: dict[int, str | None] = {record["row"]: record["prompt"] for record in records}
        self.answers = _count(records)
        self._identity: dict[str, Any] | None = None

    @property
    def data(self) -> DataOptions:
        """See the class."""
        return self._config.data

    def _check_settings(self, config: GenerateConfig) -> GenerateConfig:
        path = self.folder / "config.yaml"
        if not path.exists():
            if self.path.exists():
                raise InputError(f"{self.path} has no config.yaml beside it that says how it was made; {FIX}")
            return config
        try:
            stored = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (ValueError, yaml.YAMLError) as error:
            raise InputError(f"{path}: not readable ({str(error).splitlines()[0]}); {FIX}") from error
        if not isinstance(stored, dict) or "decode" not in stored:
            raise InputError(f"{path} is not of answers: {self.folder} belongs to another verb; choose another --out")
        config = replace(config, data=keep_date(config.data, stored))
        different = first_difference(stored, yaml.safe_load(_to_yaml(config)), FREE_OPTIONS)
        if different:
            name, before, now = different
            raise InputError(f"{self.folder} holds answers with {name} {before!r}, and it is {now!r} now; {FIX}")
        return config

    def _read(self) -> tuple[list[dict], int]:
        """Records of rows that are done, and where they end in the file."""
        if not self.path.exists():
            return [], 0
        lines = self.path.read_bytes().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()  # half a line, of a process that was killed while it wrote
        try:
            records = [json.loads(line) for line in lines]
            last = {row: answers for row, answers, *_ in [[record[key] for key in _NEEDED] for record in records][-1:]}
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{self.path}: a line that is no answer ({error}); {FIX}") from error
        # Rows are written one after the other, so only the last can be incomplete.
        kept = [record for record in records if record["row"] not in last]
        if [len(records) - len(kept)] == [max(answers, 1) for answers in last.values()]:
            kept = records
        return kept, sum(map(len, lines[: len(kept)]))

    def check(self, identity: dict[str, Any], prompts: Mapping[int, str | None], date: str | None):
        """Refuses to go on with answers of other models, or to other prompts.

        Args:
            identity: Of what answers now, see `answers_identity`.
            prompts: Row -> its prompt, see `prompt_texts`.
            date: Day that chat templates took for today, if they print it; it is kept with the settings.

        Raises:
            InputError: If what is there is not of these.
        """
        self._identity = identity
        self._config = replace(self._config, data=replace(self.data, date=date))
        if not self.prompts:
            return
        check_identity(self.path, identity, holds="answers", fix=FIX)
        for row, prompt in self.prompts.items():
            now = prompts.get(row, prompt)  # a smaller --data.max_eval_rows leaves rows out
            if now != prompt:
                raise InputError(
                    f"{self.path} answers another prompt in row {row}: {_said(prompt)} there, {_said(now)} now; {FIX}"
                )

    def __enter__(self) -> "AnswersFile":
        """Begins to write: keeps settings and identity, and drops what is incomplete."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "config.yaml"
        if not path.exists():
            write_whole(path, _to_yaml(self._config).encode())
        write_identity(self.path, self._identity)
        self._file = self.path.open("ab")
        self._file.truncate(self._size)
        return self

    def __exit__(self, *_):
        """Closes the file."""
        self._file.close()

    def append(self, records: list[dict]):
        """Adds all lines of some rows; they are on their way to the disk when this returns."""
        self._file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode())
        self._file.flush()
        self.answers += _count(records)


def _to_yaml(config: GenerateConfig) -> str:
    return yaml.safe_dump(asdict(config), sort_keys=False)


def read_answers(folder: Path) -> list[dict]:
    """Reads a complete file of answers.

    Args:
        folder: Where `qstar generate` or a sweep has written it.

    Returns:
        Its records; one of a dropped row has `finish` "dropped" and no answer.
    """
    with (folder / "generations.jsonl").open(encoding="utf-8") as file:  # texts may hold what `splitlines` splits at
        return [json.loads(line) for line in file]


def answers_identity(
    policy: LoadedModel,
    *,
    reference: LoadedModel | None = None,
    beta: float | None = None,
    guides: Sequence[Guide] = (),
) -> dict[str, Any]:
    """Says who answers: all models that take part, what ends an answer, and the temperature of rewards.

    Args:
        policy: The policy, before `prepare` consumes it.
        reference: Its reference, where it takes part.
        beta: Temperature of its rewards.
        guides: Pairs of models that guide it.

    Returns:
        What `AnswersFile.check` takes.
    """
    pairs = {str(i): {name: getattr(g, name).identity() for name in _PAIR} for i, g in enumerate(guides)}
    return {
        "model": policy.identity(),
        "ends": list(eos_token_ids(policy)),
        "reference": reference and reference.identity(),
        "beta": beta,
        "pairs": pairs,
    }


def prompt_texts(dataset: Dataset, tokenizer: Any) -> dict[int, str | None]:
    """Row -> its prompt as the model reads it, None for a row that was dropped."""
    texts = {
        example.row: tokenizer.decode(example.prompt, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for example in dataset.examples
    }
    return texts | {dropped.row: None for dropped in dataset.dropped}


def answer_prompts(
    decoder: Decoder, dataset: Dataset, texts: Mapping[int, str | None], file: AnswersFile, batch_size: int
) -> Iterator[list[tuple[int, list[Answer]]]]:
    """Answers the prompts that a file does not answer yet, batch by batch; dropped rows get a line at their place.

    Args:
        decoder: Answers prompts.
        dataset: All prompts of the run, and the rows that were dropped.
        texts: See `prompt_texts`.
        file: Gets the answers; it must be open.
        batch_size: Prompts decoded at once.

    Yields:
        Rows and their answers, after they were written.
    """
    examples = dataset.examples
    size = min(batch_size, len(examples))
    unwritten = [dropped for dropped in dataset.dropped if dropped.row not in file.prompts]
    for start in range(0, len(examples), batch_size):
        # Always the same batches, or a run that goes on could differ from one that was not broken by rounding.
        batch = examples[start : start + batch_size]
        following = examples[start + batch_size :][:1]
        due = [dropped for dropped in unwritten if not following or dropped.row < following[0].row]
        unwritten = unwritten[len(due) :]
        found = _answer_missing(decoder, batch, file, size)
        lines = [_dropped_line(dropped) for dropped in due]
        lines += [line for example, answers in found for line in _answer_lines(example, texts[example.row], answers)]
        if lines:
            file.append(sorted(lines, key=lambda line: line["row"]))
        if found:
            yield [(example.row, answers) for example, answers in found]


def _answer_missing(
    decoder: Decoder, batch: Sequence[Example], file: AnswersFile, fill_to: int
) -> list[tuple[Example, list[Answer]]]:
    """Answers of those prompts of a batch that the file does not answer yet."""
    rows = [example.row for example in batch]
    if all(row in file.prompts for row in rows):
        return []
    found = decoder([example.prompt for example in batch], rows, fill_to=fill_to)
    return [(e, answers) for e, answers in zip(batch, found, strict=True) if e.row not in file.prompts]


def _answer_lines(example: Example, prompt: str, answers: Sequence[Answer]) -> list[dict]:
    more = {"prompt_truncated": example.prompt_truncated, "reason": None}
    return [
        {"row": example.row, "rank": rank, "answers": len(answers), "prompt": prompt, **asdict(answer), **more}
        for rank, answer in enumerate(answers)
    ]


def _dropped_line(dropped: Dropped) -> dict:
    """The one line of a row without an answer: it has all keys, and says why."""
    nothing = dict.fromkeys(field.name for field in fields(Answer)) | {"finish": DROPPED}
    row = {"row": dropped.row, "rank": None, "answers": 0, "prompt": None}
    return {**row, **nothing, "prompt_truncated": None, "reason": dropped.fault or dropped.reason}


def _count(records: Sequence[dict]) -> int:
    return sum(record["finish"] != DROPPED for record in records)


def _said(prompt: str | None) -> str:
    return "none that can be used" if prompt is None else repr(prompt)
