"""generations.jsonl: written batch by batch, so that an interrupted run can be continued."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml

from qstar_jax.config.compare import first_difference
from qstar_jax.data.dropped import Dropped
from qstar_jax.data.loading import Dataset
from qstar_jax.data.tokenization import Example
from qstar_jax.decoding.decoder import Decoder, Generation
from qstar_jax.decoding.eos import eos_token_ids
from qstar_jax.decoding.generate import Guide
from qstar_jax.errors import InputError
from qstar_jax.interruption import StopSignals
from qstar_jax.store.files import write_atomically
from qstar_jax.store.identity import check_identity, write_identity
from qstar_jax.store.open import LoadedModel
from qstar_jax.untrusted import check_types, read_json_lines

# What may differ between a run and its continuation: where and how responses are computed, which changes them by
# rounding at most. All other options decide what the responses are.
FREE_OPTIONS = (
    "out",
    "batch_size",
    "mesh",
    "compute.remat",
    "compute.attention",
    "data.max_eval_rows",
    "data.bad_rows",
)
DROPPED = "dropped"  # the `finish` of a row without a response
_REQUIRED = ("row", "answers", "prompt", "finish")
_TYPES = {"row": int, "answers": int, "finish": str}
_TYPES_OF_RESPONSE = {"rank": int, "prompt": str, "text": str, "tokens": list[int], "length": int}
_TYPES_OF_RESPONSE |= {"logp": float | None, "reward": float | None, "drawn": int | None}
_PAIR = ("tuned", "untuned")
FIX = "choose another --out, or remove that folder to start over"


class GenerationsFile:
    """The responses in a folder: those already written, and those to be added. A context manager while it is written.

    Opening it reads and changes nothing else: settings and existing responses are checked before any model is loaded.
    `check` compares models and prompts, and must be called before writing.

    Args:
        folder: Holds, or gets, generations.jsonl, generations.identity.json and config.yaml.
        settings: The run's options as nested mappings; `decode`, and `data` with its `date`, are among them.

    Attributes:
        date: The day on which the folder was begun, if chat templates print it.
        prompts: Row -> prompt, for each row in the file; None for a row that was dropped.
        responses: How many responses there are.

    Raises:
        InputError: If the folder holds something else, or responses that were made with other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        self.folder = folder
        self.path = folder / "generations.jsonl"
        self._settings = self._check_settings(dict(settings))
        records, self._size = self._read()
        self.prompts: dict[int, str | None] = {record["row"]: record["prompt"] for record in records}
        self.responses = _count(records)
        self._identity: dict[str, Any] | None = None

    @property
    def date(self) -> str | None:
        """See the class."""
        return self._settings["data"]["date"]

    def _check_settings(self, settings: dict[str, Any]) -> dict[str, Any]:
        path = self.folder / "config.yaml"
        if not path.exists():
            if self.path.exists():
                raise InputError(f"{self.path} has no config.yaml beside it that says how it was made; {FIX}")
            return settings
        try:
            stored = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (ValueError, yaml.YAMLError) as error:
            raise InputError(f"{path}: not readable ({str(error).splitlines()[0]}); {FIX}") from error
        if not isinstance(stored, dict) or "decode" not in stored:
            raise InputError(f"{path} has no decode block: {self.folder} belongs to another verb; choose another --out")
        if settings["data"]["date"] is None:
            settings = _with_date(settings, (stored.get("data") or {}).get("date"))
        different = first_difference(stored, yaml.safe_load(_to_yaml(settings)), FREE_OPTIONS)
        if different:
            name, before, now = different
            raise InputError(f"{self.folder} holds responses with {name} {before!r}, and it is {now!r} now; {FIX}")
        return settings

    def _read(self) -> tuple[list[dict], int]:
        """Reads the records of rows that are complete, and their size in bytes."""
        if not self.path.exists():
            return [], 0
        lines = self.path.read_bytes().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()  # half a line, of a process that was killed while it wrote
        try:
            records = [json.loads(line) for line in lines]
            keys = [[record[key] for key in _REQUIRED] for record in records]
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{self.path}: a line is not a generation ({error}); {FIX}") from error
        # Rows are written one after the other, so only the last one can be incomplete.
        last_row, expected = keys[-1][:2] if keys else (None, 0)
        complete = [record for record in records if record["row"] != last_row]
        if len(records) - len(complete) == max(expected, 1):
            complete = records
        return complete, sum(map(len, lines[: len(complete)]))

    def check(self, identity: dict[str, Any], prompts: Mapping[int, str | None], date: str | None):
        """Refuses to continue with responses of other models, or to other prompts.

        Args:
            identity: Who generates now, see `generation_identity`.
            prompts: Row -> prompt, see `prompt_texts`.
            date: The day that chat templates print, if they do; it is kept with the settings.

        Raises:
            InputError: If the responses in the file were made by other models or to other prompts.
        """
        self._identity = identity
        self._settings = _with_date(self._settings, date)
        if not self.prompts:
            return
        check_identity(self.path, identity, holds="responses", fix=FIX)
        for row, prompt in self.prompts.items():
            now = prompts.get(row, prompt)  # a smaller --data.max_eval_rows leaves rows out
            if now != prompt:
                raise InputError(
                    f"{self.path} responds to another prompt in row {row}: {_shown(prompt)} then, {_shown(now)} now; "
                    f"{FIX}"
                )

    def __enter__(self) -> "GenerationsFile":
        """Writes settings and identity, and drops an incomplete row."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "config.yaml"
        if not path.exists():
            write_atomically(path, _to_yaml(self._settings).encode())
        write_identity(self.path, self._identity)
        self._file = self.path.open("ab")
        self._file.truncate(self._size)
        return self

    def __exit__(self, *_):
        """Closes the file."""
        self._file.close()

    def append(self, records: list[dict]):
        """Adds all lines of some rows, and flushes them."""
        self._file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode())
        self._file.flush()
        self.responses += _count(records)


def _to_yaml(settings: Mapping[str, Any]) -> str:
    return yaml.safe_dump(settings, sort_keys=False)


def _with_date(settings: dict[str, Any], date: str | None) -> dict[str, Any]:
    return settings | {"data": settings["data"] | {"date": date}}


def read_generations(folder: Path) -> list[dict]:
    """Reads a complete generations.jsonl; the record of a dropped row has `finish` "dropped" and no response.

    Raises:
        InputError: If a line is no generation, or responses of a row are missing or occur twice.
    """

    def parse(record: dict) -> dict:
        check_types(record, _TYPES)
        if record["row"] < 0:
            raise ValueError(f"row is {record['row']}; expected 0 or more")
        if record["finish"] != DROPPED:
            check_types(record, _TYPES_OF_RESPONSE)
        return record

    path = folder / "generations.jsonl"
    records = list(read_json_lines(path, parse, "a generation"))
    ranks: dict[tuple[int, int], list[int]] = {}
    for record in records:
        ranks.setdefault((record["row"], record["answers"]), []).append(record["rank"] or 0)
    for (row, answers), found in ranks.items():
        if sorted(found) != list(range(max(answers, 1))):  # a dropped row has no answers, and a line that says so
            raise InputError(
                f"{path}: row {row} has responses of rank {', '.join(map(str, found))}, and `answers` says {answers}; "
                "run the command that wrote it again, which completes it"
            )
    return records


def generation_identity(
    policy: LoadedModel,
    *,
    reference: LoadedModel | None = None,
    beta: float | None = None,
    guides: Sequence[Guide] = (),
) -> dict[str, Any]:
    """Identifies who generates: all models that take part, the tokens that end a response, and beta.

    Args:
        policy: The policy, before `prepare` consumes it.
        reference: Its reference, where it takes part.
        beta: Temperature of its rewards: reward per nat.
        guides: Pairs of models that guide it.

    Returns:
        What `GenerationsFile.check` takes.
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


def generate_missing(
    decoder: Decoder, dataset: Dataset, texts: Mapping[int, str | None], file: GenerationsFile, batch_size: int
) -> Iterator[list[tuple[int, list[Generation]]]]:
    """Responds to the prompts that are not in a file yet, batch by batch; dropped rows get a line at their place.

    `dataset` has all prompts of the run, `texts` are those of `prompt_texts`, and the file must be open.

    Yields:
        Rows and their responses, after they were written.

    Raises:
        Stopped: If a signal asked for it, after the batch that was under way.
    """
    with StopSignals() as stop:
        stop.defer()
        batches = _generate_in_order(decoder, dataset, texts, file, batch_size)
        for done, generated in batches:
            if generated:
                yield generated
            if stop.requested():
                raise stop.stopped(f"stopped after {done} of {len(dataset.examples)} prompts: {file.path}")


def _generate_in_order(
    decoder: Decoder, dataset: Dataset, texts: Mapping[int, str | None], file: GenerationsFile, batch_size: int
) -> Iterator[tuple[int, list[tuple[int, list[Generation]]]]]:
    """Yields how many prompts have responses, and the rows of the last batch that had none before."""
    examples = dataset.examples
    size = min(batch_size, len(examples))
    unwritten = [dropped for dropped in dataset.dropped if dropped.row not in file.prompts]
    for start in range(0, len(examples), batch_size):
        # Batches never depend on what is done already: rounding would make a continued run differ from a whole one.
        batch = examples[start : start + batch_size]
        following = examples[start + batch_size :][:1]
        due = [dropped for dropped in unwritten if not following or dropped.row < following[0].row]
        unwritten = unwritten[len(due) :]
        generated = _generate_batch(decoder, batch, file, size)
        lines = [_dropped_line(dropped) for dropped in due]
        for example, responses in generated:
            lines += _lines(example, texts[example.row], responses)
        if lines:
            file.append(sorted(lines, key=lambda line: line["row"]))
        yield start + len(batch), [(example.row, responses) for example, responses in generated]


def _generate_batch(
    decoder: Decoder, batch: Sequence[Example], file: GenerationsFile, fill_to: int
) -> list[tuple[Example, list[Generation]]]:
    """Responses to those prompts of a batch that are not in the file yet."""
    rows = [example.row for example in batch]
    if all(row in file.prompts for row in rows):
        return []
    generated = decoder([example.prompt for example in batch], rows, fill_to=fill_to)
    return [(e, responses) for e, responses in zip(batch, generated, strict=True) if e.row not in file.prompts]


def _lines(example: Example, prompt: str, responses: Sequence[Generation]) -> list[dict]:
    more = {"prompt_truncated": example.prompt_truncated, "reason": None}
    return [
        {"row": example.row, "rank": rank, "answers": len(responses), "prompt": prompt, **asdict(response), **more}
        for rank, response in enumerate(responses)
    ]


def _dropped_line(dropped: Dropped) -> dict:
    """The only line of a row without a response: it has all keys, and the reason."""
    nothing = dict.fromkeys(field.name for field in fields(Generation)) | {"finish": DROPPED}
    row = {"row": dropped.row, "rank": None, "answers": 0, "prompt": None}
    return {**row, **nothing, "prompt_truncated": None, "reason": dropped.fault or dropped.reason}


def _count(records: Sequence[dict]) -> int:
    return sum(record["finish"] != DROPPED for record in records)


def _shown(prompt: str | None) -> str:
    return "no usable prompt" if prompt is None else repr(prompt)
