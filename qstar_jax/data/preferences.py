"""Turns the rows of a file into records; its format is detected once, for all rows alike."""

from dataclasses import replace

from qstar_jax.config import DataOptions
from qstar_jax.data.columns import holds_encoded_messages
from qstar_jax.data.dropped import BadRow, Dropped, check_some_left, sift
from qstar_jax.data.records import FileLayout, Record, check_responses, read_record
from qstar_jax.data.repeats import remove_repeated_prompts

Rows = list[dict | BadRow]
Columns = dict[str, tuple[str, str]]  # label of a response -> (option that names its column, column)


def preference_records(rows: Rows, options: DataOptions, source: str) -> tuple[list[Record], list[Dropped]]:
    """Turns rows with two responses into records with two responses: chosen, rejected.

    Detected for the whole file: its columns (those in any row), which of them hold messages as JSON (by most texts),
    and whether responses repeat their prompt (by most rows, see `remove_repeated_prompts`).

    Returns:
        The records and the dropped rows, both in file order.

    Raises:
        InputError: No row can be used.
    """
    columns = {"chosen": ("chosen", options.chosen), "rejected": ("rejected", options.rejected)}
    return _records("preferences", _prompt_column(rows, options), columns, rows, options, source)


def completion_records(rows: Rows, options: DataOptions, source: str) -> tuple[list[Record], list[Dropped]]:
    """Turns rows into records with one response, for supervised fine-tuning.

    The response is the column `options.completion`, else `options.chosen`, else the last turn of the column `messages`.
    Args, returns and errors are those of `preference_records`.
    """
    prompt = _prompt_column(rows, options)
    if _has_column(rows, "completion", options):
        column = ("completion", options.completion)
    elif _has_column(rows, "chosen", options):
        column = ("chosen", options.chosen)
    elif _is_present(rows, "messages"):
        prompt, column = None, ("messages", "messages")
    else:
        column = ("completion", options.completion)
    return _records("completions", prompt, {"": column}, rows, options, source)


def prompt_records(rows: Rows, options: DataOptions, source: str) -> tuple[list[Record], list[Dropped]]:
    """Turns rows into records without responses, for generation.

    Without a prompt column, prompts are taken from the dialogues in `options.chosen`, else in `messages`.
    Args, returns and errors are those of `preference_records`.
    """
    prompt = _prompt_column(rows, options)
    columns = {}
    if prompt is None:
        column = next((name for name in (options.chosen, "messages") if _is_present(rows, name)), None)
        prompt = options.prompt if column is None else None
        columns = {} if column is None else {"": ("chosen", column)}
    records, dropped = _records("prompts", prompt, columns, rows, options, source)
    return [replace(record, responses=()) for record in records], dropped


def _is_present(rows: Rows, column: str) -> bool:
    """Whether any row has a value other than null in the column."""
    return any(isinstance(row, dict) and row.get(column) is not None for row in rows)


def _has_column(rows: Rows, option: str, options: DataOptions) -> bool:
    """Whether the file has the option's column, or the user named one, which is never ignored."""
    column = getattr(options, option)
    return column is not None and (column != getattr(DataOptions, option) or _is_present(rows, column))


def _prompt_column(rows: Rows, options: DataOptions) -> str | None:
    return options.prompt if _has_column(rows, "prompt", options) else None


def _records(
    kind: str, prompt: str | None, responses: Columns, rows: Rows, options: DataOptions, source: str
) -> tuple[list[Record], list[Dropped]]:
    # Detect the columns, then parse row by row.
    layout = _layout(kind, prompt, responses, rows, options)
    records, dropped = sift(enumerate(enumerate(rows)), lambda row: read_record(row[1], row[0], layout, options))
    # Responses must not repeat their prompt, and must differ; prompts alone need no check.
    if kind != "prompts":
        records, uneven = remove_repeated_prompts(records, options.repeated_prompt)
        records, unusable = sift(((record.row, record) for record in records), lambda r: check_responses(r, layout))
        dropped = sorted(dropped + uneven + unusable, key=lambda entry: entry.row)
    check_some_left(dropped, len(rows), source)
    return records, dropped


def _layout(kind: str, prompt: str | None, responses: Columns, rows: Rows, options: DataOptions) -> FileLayout:
    tools, system = (
        getattr(options, option) if _has_column(rows, option, options) else None for option in ("tools", "system")
    )
    layout = FileLayout(kind, prompt, responses, tools, system)
    readable = [row for row in rows if isinstance(row, dict)]
    encoded = (name for name in layout.columns if holds_encoded_messages(row.get(name) for row in readable))
    return replace(layout, encoded=frozenset(encoded))
