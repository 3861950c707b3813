"""Loads tokenized examples from a file or a name on the Hub, and reports what happened to every row."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console

from qstar_jax.config import DataOptions
from qstar_jax.console import track
from qstar_jax.data.building import Builder, Facts
from qstar_jax.data.dropped import BadRow, Dropped, check_bad_rows, first_rows, reasons_with_rows
from qstar_jax.data.example_cache import ExampleCache, fingerprint
from qstar_jax.data.preferences import lists_of, records_of
from qstar_jax.data.ragged import Lengths
from qstar_jax.data.reading import check_rows, is_on_hub, open_rows, read_rows
from qstar_jax.data.records import Kind as Kind
from qstar_jax.data.records import Record
from qstar_jax.data.table import ExampleTable
from qstar_jax.data.tokenization import Example
from qstar_jax.errors import InputError
from qstar_jax.models import CausalLM

_KEPT = 2**26  # bytes of a source whose rows are kept in memory while they are tokenized; larger ones are read anew
_MOMENT = 1.0  # seconds that pass without a progress bar


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
        read = len(np.union1d(used, unused))
        parts = [f"{self.source}: {read:,} row{'s' * (read != 1)} read, {len(used):,} used"]
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
    """Summarizes the tokens of prompts or responses, and which were truncated."""
    text = f"{name} have {lengths.mean():.1f} tokens on average, {lengths.max():,} at most"
    if not truncated.any():
        return f"{text}, none truncated"
    share = f"{truncated.sum():,} ({truncated.mean():.1%})"
    return f"{text}, {share} truncated at the {end} ({first_rows(np.unique(rows[truncated]).tolist())})"


def read_records(
    source: str, split: str, kind: Kind, options: DataOptions, limit: int | None = None
) -> tuple[list[dict | BadRow], list[Record], list[Dropped]]:
    """Reads a file or a dataset on the Hub as text or chat messages; arguments and errors as for `load_examples`.

    Returns:
        All rows as read, their records, and the dropped rows.
    """
    _check_name(source, options)
    rows = read_rows(source, split, limit, options.name)
    records, dropped = lists_of(records_of(kind, rows, options, source), source)
    check_bad_rows(dropped, len(rows), options.bad_rows, source)
    return rows, records, dropped


def _check_name(source: str, options: DataOptions):
    if options.name is not None and not any(map(is_on_hub, filter(None, (source, options.train, options.eval)))):
        raise InputError(
            f"data.name {options.name} has no effect: {source} is not on the Hub, whose datasets have configurations; "
            "remove it"
        )


def _option_of(source: str, options: DataOptions) -> str:
    """Names the option that a source is from, if any, to stand before the source in an error."""
    return next((f"--data.{name} " for name in ("train", "eval") if source and getattr(options, name) == source), "")


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
    console: Console | None = None,
) -> Dataset:
    """Reads and tokenizes a file or a dataset on the Hub, or maps its tokens into memory if this was done before.

    Args:
        source: What `read_rows` accepts: a file, a folder, a pattern, or a name on the Hub.
        split: Split to read if `source` has splits.
        kind: What each row becomes: a prompt with two responses (`preferences`), with several, best first
            (`rankings`), with one (`completions`; with its label or its reward: `labels`, `returns`), or with none
            (`prompts`).
        tokenizer: A Hugging Face tokenizer.
        options: Columns, form and maximum lengths, and whether tokens are kept on disk (see `ExampleCache`).
        limit: Use only the first `limit` rows.
        vocabulary: Size of the model's vocabulary; larger token ids are refused.
        eos_ids: EOS ids of the model, besides that of the tokenizer.
        console: Where to show progress.

    Returns:
        At least one example, and the dropped rows.

    Raises:
        InputError: The source cannot be read, too many rows are bad (`options.bad_rows`) or none can be used, the model
            lacks a token, or an option has no effect.
    """
    _check_name(source, options)
    try:
        rows = open_rows(source, split, limit, options.name)
    except InputError as error:
        raise InputError(f"{_option_of(source, options)}{error}") from error

    def builder() -> Builder:
        check_rows(rows, source)
        records = records_of(kind, list(rows) if rows.size < _KEPT else rows, options, source)
        return Builder(records, source, tokenizer, options, vocabulary, eos_ids)

    def show(items: Iterable, total: int) -> Iterable:
        return track(console, items, f"tokenizing {source}", total, after=_MOMENT)

    if not options.cache:
        made = builder()
        return _dataset(ExampleTable(list(made.batches(show))), made.facts, source)
    cache = ExampleCache(fingerprint(rows, split, kind, tokenizer, options, vocabulary=vocabulary, eos_ids=eos_ids))
    with cache.locked():
        stored = cache.read()
        if isinstance(stored, tuple):
            return _dataset(*stored, source)
        damage = () if stored is None else (f"Kept tokens were damaged, and are made again: {stored}.",)
        return _dataset(*cache.write(builder(), show), source, damage)


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
    items = sorted([*records, *dropped], key=lambda item: item.row)
    builder = Builder(items, source, tokenizer, options, vocabulary, eos_ids)
    return _dataset(ExampleTable(list(builder.batches())), builder.facts, source)


def _dataset(examples: ExampleTable, facts: Facts, source: str, notes: tuple[str, ...] = ()) -> Dataset:
    return Dataset(examples, facts.dropped, source, facts.date, (*notes, *facts.notes), frozenset(facts.steps))
