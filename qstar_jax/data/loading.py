"""Loads tokenized examples from a file or a name on the Hub, and reports what happened to every row."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qstar_jax.config import DataOptions
from qstar_jax.data.dropped import BadRow, Dropped, check_bad_rows, check_some_left, first_rows, reasons_with_rows
from qstar_jax.data.preferences import (
    completion_records,
    label_records,
    preference_records,
    prompt_records,
    ranking_records,
    return_records,
)
from qstar_jax.data.ragged import Lengths
from qstar_jax.data.reading import is_on_hub, read_rows
from qstar_jax.data.records import Kind as Kind
from qstar_jax.data.records import Record
from qstar_jax.data.repeats import repeats_note
from qstar_jax.data.table import ExampleTable
from qstar_jax.data.tokenization import Example, resolve_date, tokenize
from qstar_jax.errors import InputError
from qstar_jax.models import CausalLM

_RECORDS = {
    "preferences": preference_records,
    "completions": completion_records,
    "prompts": prompt_records,
    "rankings": ranking_records,
    "labels": label_records,
    "returns": return_records,
}


@dataclass(frozen=True)
class Dataset:
    """Tokenized examples and their source.

    Attributes:
        examples: At least one, in file order.
        dropped: Dropped rows of the source, in file order.
        source: Path or name on the Hub.
        date: The date that the chat template prints, if any (see `DataOptions.date`).
        notes: Sentences on other changes to the rows.
        steps: Rows whose responses are single steps, which have no end that they could lose.
    """

    examples: Sequence[Example]
    dropped: tuple[Dropped, ...]
    source: str
    date: str | None = None
    notes: tuple[str, ...] = ()
    steps: frozenset[int] = frozenset()

    @property
    def summary(self) -> str:
        """One paragraph on rows read, used and dropped (by reason), lengths in tokens, and truncation.

        Row numbers count from 1, as in the file (without blank lines).
        """
        lengths = Lengths.of(self.examples)
        unused, used = np.array([entry.row for entry in self.dropped], np.int64), np.unique(lengths.rows)
        parts = [f"{self.source}: {len(np.union1d(used, unused)):,} rows read, {len(used):,} used"]
        if len(lengths.rows) > len(used):
            parts[0] += f" for {len(lengths.rows):,} examples"
        if len(unused):
            parts.append(f"{len(unused):,} dropped: {reasons_with_rows(self.dropped)}")
        parts.append(_lengths("prompts", lengths.rows, lengths.prompts, lengths.truncated[:, 0], "beginning"))
        present = lengths.responses > 0  # shorter rankings are filled up
        if present.any():
            rows = np.broadcast_to(lengths.rows[:, None], present.shape)
            truncated = lengths.truncated[:, 1:] & ~np.isin(rows, list(self.steps))
            columns = (values[present] for values in (rows, lengths.actions, truncated))
            parts.append(_lengths("responses", *columns, "end"))
        parts += filter(None, [_turns_note(lengths)])
        return " ".join(["; ".join(parts) + ".", *self.notes])

    def longest(self, new_tokens: int = 0) -> int:
        """Returns the largest number of tokens of a prompt plus its longest response, or plus `new_tokens`."""
        lengths = Lengths.of(self.examples)
        return int((lengths.prompts + lengths.responses.max(1, initial=new_tokens)).max())

    def report(self, model: CausalLM, new_tokens: int = 0) -> str:
        """Says what a user should know before running a model on these, and generating `new_tokens` after each.

        Returns:
            `summary`, and a second line if texts exceed the model's context.

        Raises:
            InputError: If the model cannot process texts of this length.
        """
        warning = model.check_length(self.longest(new_tokens), f"{self.source}, longest prompt and response")
        return "\n".join(filter(None, [self.summary, warning]))


def _turns_note(lengths: Lengths) -> str:
    """Says how many turns the assistant has, and how many tokens lie between them; empty if there are none."""
    between = int((lengths.responses - lengths.actions).sum())
    if not between:
        return ""
    responses = (lengths.responses > 0).sum()
    return (
        f"responses have {lengths.turns.sum() / responses:.1f} turns of the assistant, and {between / responses:.1f} "
        "tokens of users, tools and templates, which are not learned"
    )


def _lengths(name: str, rows: np.ndarray, lengths: np.ndarray, truncated: np.ndarray, end: str) -> str:
    """Summarizes the tokens of prompts or responses, and which lost their beginning or end."""
    text = f"{name} have {lengths.mean():.1f} tokens on average, {lengths.max():,} at most"
    if not truncated.any():
        return f"{text}, none truncated"
    share = f"{truncated.sum():,} ({truncated.mean():.1%})"
    return f"{text}, {share} lost their {end} ({first_rows(np.unique(rows[truncated]).tolist())})"


def read_records(
    source: str, split: str, kind: Kind, options: DataOptions, limit: int | None = None
) -> tuple[list[dict | BadRow], list[Record], list[Dropped]]:
    """Reads a file or a dataset on the Hub as text or chat messages; arguments and errors as for `load_examples`.

    Returns:
        All rows as read, their records, and the dropped rows.
    """
    if options.name is not None and not any(map(is_on_hub, filter(None, (source, options.train, options.eval)))):
        raise InputError(
            f"data.name {options.name} has no effect: {source} is not on the Hub, whose datasets have configurations; "
            "remove it"
        )
    rows = read_rows(source, split, limit, options.name)
    records, dropped = _RECORDS[kind](rows, options, source)
    check_bad_rows(dropped, len(rows), options.bad_rows, source)
    return rows, records, dropped


def notes_on(records: list[Record]) -> tuple[str, ...]:
    """Returns sentences on what a user should know of records before they are tokenized."""
    steps = list(dict.fromkeys(record.row for record in records if record.open_end))
    step_note = f"Responses are single steps, which end without EOS: {len(steps):,} ({first_rows(steps)})."
    texts = list(dict.fromkeys(record.row for record in records if isinstance(record.prompt, str)))
    text_note = (
        f"Rows in plain text, to which no chat template is applied, beside others that are chats: {len(texts):,} "
        f"({first_rows(texts)}); --data.as_chat makes chats of all."
    )
    mixed = texts and any(isinstance(record.prompt, list) for record in records)
    notes = (repeats_note(records), step_note if steps else "", text_note if mixed else "", _system_note(records))
    return tuple(filter(None, notes))


def _system_note(records: list[Record]) -> str:
    """Returns a sentence on system prompts that are not read; empty if there are none."""
    rows = list(dict.fromkeys(record.row for record in records if record.ignored_system))
    if not rows:
        return ""
    keys = next(record.ignored_system for record in records if record.ignored_system)
    return (
        f"Rows whose responses have system prompts of their own ({keys}), which are left out because judges compared "
        f"responses to the instruction alone: {len(rows):,} ({first_rows(rows)}); read them with --data.system."
    )


def load_examples(
    source: str,
    split: str,
    kind: Kind,
    tokenizer: Any,
    options: DataOptions,
    limit: int | None = None,
    *,
    vocabulary: int | None = None,
    eos_ids: Collection[int] = (),
) -> Dataset:
    """Reads and tokenizes a file or a dataset on the Hub.

    Args:
        source: What `read_rows` accepts: a file, a folder, a pattern, or a name on the Hub.
        split: Split to read if `source` has splits.
        kind: What each row becomes: a prompt with two responses (`preferences`), with several, best first
            (`rankings`), with one (`completions`; with its label or its reward: `labels`, `returns`), or with none
            (`prompts`).
        tokenizer: A Hugging Face tokenizer.
        options: Columns, form and maximum lengths.
        limit: Use only the first `limit` rows.
        vocabulary: Size of the model's vocabulary; larger token ids are refused.
        eos_ids: EOS ids of the model, besides that of the tokenizer.

    Returns:
        At least one example, and the dropped rows.

    Raises:
        InputError: The source cannot be read, too many rows are bad (`options.bad_rows`) or none can be used, the model
            lacks a token, or an option has no effect.
    """
    _, records, dropped = read_records(source, split, kind, options, limit)
    return make_dataset(records, dropped, source, tokenizer, options, vocabulary=vocabulary, eos_ids=eos_ids)


def make_dataset(
    records: list[Record],
    dropped: list[Dropped],
    source: str,
    tokenizer: Any,
    options: DataOptions,
    *,
    vocabulary: int | None = None,
    eos_ids: Collection[int] = (),
) -> Dataset:
    """Tokenizes records, given the rows that were dropped before.

    Args, result and errors are those of `load_examples`.
    """
    total = len(records) + len(dropped)
    options = resolve_date(options, records, tokenizer)
    examples, also_dropped = tokenize(
        records, tokenizer, options, vocabulary=vocabulary, eos_ids=eos_ids, source=source
    )
    dropped = sorted(dropped + also_dropped, key=lambda row: row.row)
    check_some_left(dropped, total, source)
    check_bad_rows(dropped, total, options.bad_rows, source)
    steps = frozenset(record.row for record in records if record.open_end)
    return Dataset(ExampleTable.of(examples), tuple(dropped), source, options.date, notes_on(records), steps)
