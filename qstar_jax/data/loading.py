"""One call from a file or hub name to tokenised examples, with an account of what became of its rows."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from qstar_jax.config import DataOptions
from qstar_jax.data.dropped import BadRow, Dropped, check_bad_rows, check_some_left, first_rows, reasons_with_rows
from qstar_jax.data.preferences import completion_records, preference_records, prompt_records
from qstar_jax.data.reading import read_rows
from qstar_jax.data.records import Record
from qstar_jax.data.repeats import repeats_note
from qstar_jax.data.tokenization import Example, settle_date, tokenize
from qstar_jax.models import CausalLM

Kind = Literal["preferences", "completions", "prompts"]
_RECORDS = {"preferences": preference_records, "completions": completion_records, "prompts": prompt_records}


@dataclass(frozen=True)
class Dataset:
    """Tokenised examples and where they come from.

    Args:
        examples: At least one, in file order.
        dropped: Rows of the source that are not among them, in file order.
        source: Path or hub name.
        date: Day that the chat template took for today, where it prints it (see `DataOptions.date`).
        notes: Sentences on what else was done to its rows.
    """

    examples: list[Example]
    dropped: tuple[Dropped, ...]
    source: str
    date: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """One paragraph: rows read and used, those dropped by reason, lengths in tokens, what was cut.

        Reasons and cuts come with the numbers of their first rows, counted from 1 as in the file (blank lines are no
        rows).
        """
        dropped, used = len(self.dropped), len(self.examples)
        parts = [f"{self.source}: {used + dropped:,} rows read, {used:,} used"]
        if dropped:
            parts.append(f"{dropped:,} dropped: {reasons_with_rows(self.dropped)}")
        prompts = [(e.row, len(e.prompt), e.prompt_truncated) for e in self.examples]
        answers = [(e.row, len(r.ids), r.truncated) for e in self.examples for r in e.responses]
        parts.append(_lengths("prompts", prompts, "beginning"))
        if answers:
            parts.append(_lengths("answers", answers, "end"))
        return " ".join(["; ".join(parts) + ".", *self.notes])

    def longest(self, new_tokens: int = 0) -> int:
        """Tokens of the longest prompt together with its longest answer, or with so many new tokens."""
        return max(len(e.prompt) + max([new_tokens, *(len(r.ids) for r in e.responses)]) for e in self.examples)

    def report(self, model: CausalLM, new_tokens: int = 0) -> str:
        """What a user must know before a model reads these rows.

        Args:
            model: The model.
            new_tokens: How many tokens it may say behind each prompt.

        Returns:
            `summary`, and a second line where rows are longer than the model was made for.

        Raises:
            InputError: If they are longer than it can read.
        """
        warning = model.check_length(self.longest(new_tokens), f"{self.source}, longest prompt and answer")
        return "\n".join(filter(None, [self.summary, warning]))


def _lengths(name: str, items: list[tuple[int, int, bool]], part: str) -> str:
    """Of (row, tokens, whether it was cut)."""
    lengths = [length for _, length, _ in items]
    cut = [row for row, _, truncated in items if truncated]
    text = f"{name} have {sum(lengths) / len(lengths):.1f} tokens on average, {max(lengths):,} at most"
    if not cut:
        return f"{text}, none was cut"
    share = f"{len(cut):,} ({len(cut) / len(items):.1%})"
    return f"{text}, {share} lost their {part} ({first_rows(list(dict.fromkeys(cut)))})"


def read_records(
    source: str, split: str, kind: Kind, options: DataOptions, limit: int | None = None
) -> tuple[list[dict | BadRow], list[Record], list[Dropped]]:
    """Reads a file or a data set of the hub as text or chat messages; arguments and errors are as in `load_examples`.

    Returns:
        All rows as they stand there, the records that were made of them, and the rows that were dropped.
    """
    rows = read_rows(source, split, limit)
    records, dropped = _RECORDS[kind](rows, options, source)
    check_bad_rows(dropped, len(rows), options.bad_rows, source)
    return rows, records, dropped


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
    """Reads and tokenises a file or a data set of the hub.

    Args:
        source: Path of a JSON or Parquet file, or a hub name.
        split: Split to take when `source` is a hub name.
        kind: What each row becomes: a prompt with two answers, with one, or with none.
        tokenizer: A Hugging Face tokenizer.
        options: Columns, form and longest lengths.
        limit: Use the first so many rows only.
        vocabulary: Rows of the model's embedding; token ids beyond it are refused.
        eos_ids: Tokens that end an answer of the model, beside the tokenizer's EOS.

    Returns:
        At least one example, and the rows that were dropped.

    Raises:
        InputError: The source cannot be read, too many rows are bad (`options.bad_rows`) or none can be used, a row has
            a token that the model does not know, or an option has no effect.
    """
    _, records, dropped = read_records(source, split, kind, options, limit)
    known = {"vocabulary": vocabulary, "eos_ids": eos_ids}
    return make_dataset(records, dropped, source, tokenizer, options, **known)


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
    """Tokenises records beside which other rows were dropped already.

    Args, result and errors are those of `load_examples`.
    """
    total = len(records) + len(dropped)
    options = settle_date(options, records, tokenizer)
    model = {"vocabulary": vocabulary, "eos_ids": eos_ids}
    examples, dropped_later = tokenize(records, tokenizer, options, **model, source=source)
    dropped = sorted(dropped + dropped_later, key=lambda one: one.row)
    check_some_left(dropped, total, source)
    check_bad_rows(dropped, total, options.bad_rows, source)
    notes = filter(None, [repeats_note(records)])
    return Dataset(examples, tuple(dropped), source, options.date, tuple(notes))
