"""Rows of any accepted form -> records. What is a matter of the file's form is decided for all its rows alike."""

from dataclasses import replace

from qstar_jax.config import DataOptions
from qstar_jax.data.columns import holds_encoded_messages
from qstar_jax.data.dropped import BadRow, Dropped, check_some_left, sift
from qstar_jax.data.records import Layout, Record, check_answers, read_record
from qstar_jax.data.repeats import settle_repeats

Rows = list[dict | BadRow]
Answers = dict[str, tuple[str, str]]


def preference_records(rows: Rows, options: DataOptions, source: str) -> tuple[list[Record], list[Dropped]]:
    """Turns rows with a preferred and another answer into records with two responses: chosen, rejected.

    Decided for the whole file are: which columns it has (in any row), which of them hold messages as JSON (most
    texts), and whether answers repeat their prompt (in most rows, see `settle_repeats`).

    Args:
        rows: Rows as read.
        options: Names of the columns, and whether plain text becomes chat messages.
        source: Name of the file, for errors.

    Returns:
        The records and the rows that were dropped, both in file order.

    Raises:
        InputError: No row can be used.
    """
    answers = {"chosen": ("chosen", options.chosen), "rejected": ("rejected", options.rejected)}
    return _records("preferences", _prompt_column(rows, options), answers, rows, options, source)


def completion_records(rows: Rows, options: DataOptions, source: str) -> tuple[list[Record], list[Dropped]]:
    """Turns rows with one answer into records with one response, for supervised fine-tuning.

    The answer is the column `options.completion`; else `options.chosen`; else the last turn of the column `messages`.
    Args, returns and errors are those of `preference_records`.
    """
    prompt = _prompt_column(rows, options)
    if _has_column(rows, "completion", options):
        answer = ("completion", options.completion)
    elif _has_column(rows, "chosen", options):
        answer = ("chosen", options.chosen)
    elif _holds_any(rows, "messages"):
        prompt, answer = None, ("messages", "messages")
    else:
        answer = ("completion", options.completion)
    return _records("completions", prompt, {"": answer}, rows, options, source)


def prompt_records(rows: Rows, options: DataOptions, source: str) -> tuple[list[Record], list[Dropped]]:
    """Turns rows into records without responses, for generation.

    Where there is no prompt column, the prompt is that of the dialogues in `options.chosen`, else in `messages`.
    Args, returns and errors are those of `preference_records`.
    """
    prompt = _prompt_column(rows, options)
    answers = {}
    if prompt is None:
        column = next((name for name in (options.chosen, "messages") if _holds_any(rows, name)), None)
        prompt = options.prompt if column is None else None
        answers = {} if column is None else {"": ("chosen", column)}
    records, dropped = _records("prompts", prompt, answers, rows, options, source)
    return [replace(record, responses=()) for record in records], dropped


def _holds_any(rows: Rows, column: str) -> bool:
    """Whether the column is in the file: a row with something in it is enough, and nulls are not."""
    return any(isinstance(row, dict) and row.get(column) is not None for row in rows)


def _has_column(rows: Rows, option: str, options: DataOptions) -> bool:
    """Whether the file has the option's column, or the user named one: a name of the user's is never passed over."""
    column = getattr(options, option)
    return column is not None and (column != getattr(DataOptions, option) or _holds_any(rows, column))


def _prompt_column(rows: Rows, options: DataOptions) -> str | None:
    return options.prompt if _has_column(rows, "prompt", options) else None


def _records(
    kind: str, prompt: str | None, answers: Answers, rows: Rows, options: DataOptions, source: str
) -> tuple[list[Record], list[Dropped]]:
    layout = _layout(kind, prompt, answers, rows, options)
    records, dropped = sift(enumerate(enumerate(rows)), lambda row: read_record(row[1], row[0], layout, options))
    if kind != "prompts":
        records, uneven = settle_repeats(records, options.repeated_prompt)
        records, empty = sift(((record.row, record) for record in records), lambda r: check_answers(r, layout))
        dropped = sorted(dropped + uneven + empty, key=lambda one: one.row)
    check_some_left(dropped, len(rows), source)
    return records, dropped


def _layout(kind: str, prompt: str | None, answers: Answers, rows: Rows, options: DataOptions) -> Layout:
    tools, system = (
        getattr(options, option) if _has_column(rows, option, options) else None for option in ("tools", "system")
    )
    layout = Layout(kind, prompt, answers, tools, system)
    readable = [row for row in rows if isinstance(row, dict)]
    encoded = (name for name in layout.columns if holds_encoded_messages(row.get(name) for row in readable))
    return replace(layout, encoded=frozenset(encoded))
