"""What a file of data holds: its columns, the format that they have, and what becomes of its rows."""

import json
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from qstar_jax.config import DataConfig, DataOptions
from qstar_jax.data.columns import Turns
from qstar_jax.data.dropped import BadRow
from qstar_jax.data.formats import File, formats_of
from qstar_jax.data.loading import Dataset
from qstar_jax.data.outcomes import find_reward
from qstar_jax.data.ragged import Lengths
from qstar_jax.data.reading import is_on_hub
from qstar_jax.data.records import Kind, Record
from qstar_jax.errors import InputError

# The verb and the options that read each kind of data, the last of them its name.
_READERS: dict[Kind, str] = {
    "preferences": "qstar dpo --data.train",
    "rankings": "qstar dpo --loss.name plackett_luce --data.train",
    "labels": "qstar dpo --loss.name kto --data.train",
    "returns": "qstar dpo --loss.name a_star --data.train",
    "completions": "qstar sft --data.train",
    "prompts": "qstar generate --data.eval",
}
_KINDS: dict[str, Kind] = {"pairs": "preferences", "arena": "preferences", "ranking": "preferences"}
_FEW = 0.01  # share of truncated texts that is no reason for advice


@dataclass(frozen=True)
class Column:
    """A column of a file.

    Attributes:
        name: Its name.
        types: Types of its values, the most frequent first.
        filled: Share of the rows that have a value.
        example: The first value.
    """

    name: str
    types: tuple[str, ...]
    filled: float
    example: Any


def columns_of(rows: Sequence[dict | BadRow]) -> list[Column]:
    """Describes the columns of rows, in the order in which they occur."""
    values: dict[str, list] = {}
    for row in rows:
        for name, value in row.items() if isinstance(row, dict) else ():
            values.setdefault(name, []).extend([value] * (value is not None))
    return [
        Column(
            name,
            tuple(kind for kind, _ in Counter(type(value).__name__ for value in present).most_common()),
            len(present) / len(rows),
            present[0] if present else None,
        )
        for name, present in values.items()
    ]


def kind_of_rows(rows: list[dict | BadRow], options: DataOptions, source: str) -> tuple[Kind, str]:
    """Finds what the rows of a file are usually used for, and names their format.

    Raises:
        InputError: No row can be read, or no column is known.
    """
    if all(isinstance(row, BadRow) for row in rows):
        raise InputError(f"{source} row 1: {rows[0].fault}; none of its {len(rows):,} rows can be read")
    file = File.of(rows, options, source)
    for name in formats_of(file):
        if name == "single":
            return ("labels" if options.label in file.columns else "returns"), name
        return _KINDS[name], name
    if file.response is not None or {"instruction", "output"} <= file.columns:
        return "completions", "single"
    if file.has("prompt") or "instruction" in file.columns:
        return "prompts", "prompts"
    raise InputError(
        f"{source}: none of its columns ({', '.join(sorted(file.columns)) or 'none'}) is known; name them with "
        "--data.prompt, --data.chosen and --data.rejected, or --data.completion with --data.label or --data.reward"
    )


def lengths_in_characters(records: Sequence[Record]) -> dict[str, np.ndarray]:
    """Characters of the prompts and of the responses, by the place of the response."""
    lengths = {"prompt": [_characters(record.prompt) for record in records]}
    for record in records:
        for place, response in enumerate(record.responses, start=1):
            lengths.setdefault(response_name(place, record), []).append(_characters(response))
    return {name: np.array(values) for name, values in lengths.items()}


def lengths_in_tokens(dataset: Dataset, records: Sequence[Record]) -> dict[str, np.ndarray]:
    """Tokens of the prompts and of the responses, by the place of the response, and actions where these are fewer."""
    lengths = Lengths.of(dataset.examples)
    columns = {"prompt": lengths.prompts}
    for place, (tokens, actions) in enumerate(zip(lengths.responses.T, lengths.actions.T, strict=True), start=1):
        name, present = response_name(place, records[0]), tokens > 0  # shorter rankings are filled up
        columns[name] = tokens[present]
        if (actions < tokens).any():
            columns[f"actions of {name}"] = actions[present]
    return columns


def response_name(place: int, record: Record) -> str:
    """Names a response of a record by its place, from 1."""
    if len(record.responses) == 2:
        return ("chosen", "rejected")[place - 1]
    return "response" if len(record.responses) == 1 else f"place {place}"


def command(kind: Kind, config: DataConfig, records: Sequence[Record]) -> str:
    """Returns a command that uses a file as it was read, with its options."""
    reader = _READERS[kind]
    if all(record.prompt == records[0].prompt for record in records):
        reader = reader.replace("kto", "implicit_prm")  # as KTO needs several prompts
    words = [*reader.split(), config.file, "--model", config.model or "MODEL", "--out", "OUT"]
    given = {name: getattr(config.data, name) for name in DataOptions.__dataclass_fields__}
    if config.split != DataConfig.split or is_on_hub(config.file):
        given["eval_split" if kind == "prompts" else "train_split"] = config.split
    defaults = asdict(DataOptions())
    for name, value in given.items():
        if value != defaults[name] and name not in ("train", "eval"):
            words += [f"--data.{name}", value if isinstance(value, str) else json.dumps(value)]
    return shlex.join(words)


def advice(
    kind: Kind,
    rows: list[dict | BadRow],
    records: Sequence[Record],
    options: DataOptions,
    dataset: Dataset | None = None,
    whole: Dataset | None = None,
    has_template: bool = False,
) -> list[str]:
    """Says what to know of a file, and what to change.

    Args:
        kind: What its rows become.
        rows: As they were read.
        records: What they became.
        options: How they were read.
        dataset: The same as tokens, if there is a tokenizer.
        whole: The same without truncation.
        has_template: Whether the tokenizer has a chat template.
    """
    lines = _advice_on_labels(rows, records, options) if kind == "labels" else []
    if kind == "prompts":
        lines += _advice_on_other_columns(rows, options)
    if dataset is not None and whole is not None:
        lines += _advice_on_lengths(dataset, whole, options)
    if has_template and all(isinstance(record.prompt, str) for record in records):
        lines.append("Prompts are plain text, and the tokenizer has a chat template: --data.as_chat applies it.")
    if kind == "preferences":
        longer = np.mean([_spoken(r.responses[0]) > _spoken(r.responses[1]) for r in records])
        lines.append(f"Chosen responses are the longer ones in {longer:.0%} of the pairs.")
    return lines


def _advice_on_other_columns(rows: list[dict | BadRow], options: DataOptions) -> list[str]:
    """What to do if a file of prompts has responses under names that are not known."""
    read = {options.prompt, options.system, options.tools, "instruction", "input", "history"}
    texts = (column for column in columns_of(rows) if set(column.types) & {"str", "list"})
    if not (others := [column.name for column in texts if column.name not in read]):
        return []
    return [
        f"Only prompts are read. If there are responses in {', '.join(others)}, name them: --data.chosen and "
        "--data.rejected, or --data.completion."
    ]


def _advice_on_labels(rows: list[dict | BadRow], records: Sequence[Record], options: DataOptions) -> list[str]:
    share = np.mean([record.label for record in records])
    lines = [f"{share:.0%} of the responses are desirable."]
    if share in (0, 1):
        lines = [f"{'All' if share else 'None'} of the responses are desirable: losses of labels need some of each."]
    if find_reward(rows, replace(options, reward=None)) is not None:
        lines.append("It has rewards too, which --loss.name a_star and qrpo read.")
    return lines


def _advice_on_lengths(dataset: Dataset, whole: Dataset, options: DataOptions) -> list[str]:
    untruncated, lines = Lengths.of(whole.examples), []
    prompts = untruncated.prompts
    texts = prompts + untruncated.responses.max(1, initial=0)
    limits = (("max_prompt_length", options.prompt_limit, prompts), ("max_length", options.max_length, texts))
    for name, limit, lengths in limits:
        if (share := (lengths > limit).mean()) > _FEW:
            lines.append(
                f"{share:.1%} exceed --data.{name} {limit}; {int(np.percentile(lengths, 99))} holds 99%, "
                f"{lengths.max()} all."
            )
    if lines or dataset.longest() >= options.max_length:
        return lines
    return [f"The longest text has {texts.max()} tokens: --data.max_length {texts.max()} is enough."]


def _spoken(turns: Turns) -> int:
    """Characters of what the assistant says in a response."""
    return _characters(turns if isinstance(turns, str) else [turn for turn in turns if turn["role"] == "assistant"])


def _characters(turns: Turns) -> int:
    return len(turns) if isinstance(turns, str) else sum(len(message.get("content") or "") for message in turns)
