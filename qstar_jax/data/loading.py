"""One call from a file or hub name to tokenised examples, with an account of what became of its rows."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from qstar_jax.config import DataOptions
from qstar_jax.data.dropped import Dropped, counted_reasons
from qstar_jax.data.preferences import completion_records, preference_records, prompt_records
from qstar_jax.data.reading import read_rows
from qstar_jax.data.tokenization import Example, settle_date, tokenize
from qstar_jax.errors import InputError

_RECORDS = {"preferences": preference_records, "completions": completion_records, "prompts": prompt_records}


@dataclass(frozen=True)
class Dataset:
    """Tokenised examples and where they come from.

    Args:
        examples: At least one, in file order.
        dropped: Rows of the source that are not among them, in file order.
        source: Path or hub name.
        date: Day that the chat template took for today, where it prints it (see `DataOptions.date`).
    """

    examples: list[Example]
    dropped: tuple[Dropped, ...]
    source: str
    date: str | None = None

    @property
    def summary(self) -> str:
        """One paragraph: rows read, used and dropped (by reason), lengths in tokens, the share that was truncated."""
        dropped = len(self.dropped)
        parts = [f"{self.source}: {len(self.examples) + dropped:,} rows read, {len(self.examples):,} used"]
        if dropped:
            parts.append(f"{dropped:,} dropped ({counted_reasons(self.dropped)})")
        prompts = [(len(e.prompt), e.prompt_truncated) for e in self.examples]
        answers = [(len(r.ids), r.truncated) for e in self.examples for r in e.responses]
        parts.append(_lengths("prompts", prompts))
        if answers:
            parts.append(_lengths("answers", answers))
        return "; ".join(parts) + "."


def _lengths(name: str, items: list[tuple[int, bool]]) -> str:
    lengths, truncated = zip(*items, strict=True)
    mean, share = sum(lengths) / len(items), sum(truncated) / len(items)
    return f"{name} have {mean:.1f} tokens on average, {max(lengths):,} at most, {share:.1%} truncated"


def load_examples(
    source: str,
    split: str,
    kind: Literal["preferences", "completions", "prompts"],
    tokenizer: Any,
    options: DataOptions,
    limit: int | None = None,
    *,
    vocabulary: int | None = None,
    eos_ids: Collection[int] = (),
) -> Dataset:
    """Reads and tokenises a file or a data set of the hub.

    Args:
        source: Path of a JSON-lines or Parquet file, or a hub name.
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
        InputError: The source cannot be read, a row has another form or a token that the model does not know, no row
            can be used, or an option has no effect.
    """
    rows = read_rows(source, split, limit)
    records, dropped = _RECORDS[kind](rows, options, source)
    options = settle_date(options, records, tokenizer)
    model = {"vocabulary": vocabulary, "eos_ids": eos_ids}
    examples, dropped_later = tokenize(records, tokenizer, options, **model, source=source)
    dropped = sorted(dropped + dropped_later, key=lambda one: one.row)
    if not examples:
        raise InputError(f"{source}: none of its {len(rows)} rows can be used ({counted_reasons(dropped)})")
    return Dataset(examples, tuple(dropped), source, options.date)
