"""Turns the rows of a file into records; its format is detected once, for all rows alike."""

from dataclasses import replace

from qstar_jax.config import DataOptions
from qstar_jax.data.columns import holds_encoded_messages
from qstar_jax.data.dropped import BadRow, Dropped, check_some_left, sift
from qstar_jax.data.formats import File, Rows, prompt_reader
from qstar_jax.data.records import FileLayout, Kind, Record, check_responses, read_record
from qstar_jax.data.repeats import remove_repeated_prompts
from qstar_jax.data.rewriting import Numbered, places, rows_of
from qstar_jax.errors import InputError

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
    numbered = rows_of("preferences", rows, options, source)
    columns = {"chosen": ("chosen", options.chosen), "rejected": ("rejected", options.rejected)}
    return _records("preferences", columns, numbered, options, source)


def ranking_records(rows: Rows, options: DataOptions, source: str) -> tuple[list[Record], list[Dropped]]:
    """Turns rows with several responses into records of rankings, best first; pairs are rankings of two.

    Args, returns and errors are those of `preference_records`.
    """
    numbered = rows_of("rankings", rows, options, source)
    names = [f"place {place}" for place in range(1, places(numbered) + 1)]
    return _records("rankings", {name: ("completion", name) for name in names}, numbered, options, source)


def label_records(rows: Rows, options: DataOptions, source: str) -> tuple[list[Record], list[Dropped]]:
    """Turns rows into records with one response and its label; pairs are two responses, of which one is desirable.

    Args, returns and errors are those of `preference_records`.
    """
    numbered = rows_of("labels", rows, options, source)
    return _records("labels", {"": ("completion", options.completion)}, numbered, options, source)


def return_records(rows: Rows, options: DataOptions, source: str) -> tuple[list[Record], list[Dropped]]:
    """Turns rows into records with one response, its reward, and rewards of the reference's responses to its prompt.

    These are in the column `options.reference_rewards`, or else the rewards of all rows of the same prompt.
    Args, returns and errors are those of `preference_records`.
    """
    numbered = rows_of("returns", rows, options, source)
    records, dropped = _records("returns", {"": ("completion", options.completion)}, numbered, options, source)
    if not any(record.reference_rewards for record in records):
        records, alone = with_rewards_of_prompt(records)
        dropped = sorted(dropped + alone, key=lambda entry: entry.row)
        check_some_left(dropped, len(records) + len(dropped), source)
    return records, dropped


def with_rewards_of_prompt(records: list[Record]) -> tuple[list[Record], list[Dropped]]:
    """Gives each record the rewards of all records of its prompt, which must be samples of the reference.

    Returns:
        The records, and the dropped rows, whose prompts occur once.
    """
    rewards: dict[str, list[float]] = {}
    for record in records:
        rewards.setdefault(repr((record.prompt, record.tools)), []).append(record.reward)

    def use(record: Record) -> Record:
        others = rewards[repr((record.prompt, record.tools))]
        if len(others) < 2:
            raise BadRow(
                "no rewards of the reference's responses",
                "; expected several rows of the same prompt, or rewards in a column named by --data.reference_rewards",
            )
        return replace(record, reference_rewards=tuple(others))

    return sift(((record.row, record) for record in records), use)


def completion_records(rows: Rows, options: DataOptions, source: str) -> tuple[list[Record], list[Dropped]]:
    """Turns rows into records with one response, for supervised fine-tuning.

    The response is the column `options.completion`, else `options.chosen`, else the last turn of the column `messages`.
    Args, returns and errors are those of `preference_records`.
    """
    file = _plain_file(rows, options, source)
    if file.has("completion"):
        column = ("completion", options.completion)
    elif file.has("chosen"):
        column = ("chosen", options.chosen)
    elif "output" in file.columns and "instruction" in file.columns:
        column = ("completion", "output")
    elif file.response is not None:
        column = ("messages", file.response)
    else:
        column = ("completion", options.completion)
    numbered = _numbered(file, separate=column[0] != "messages")
    return _records("completions", {"": column}, numbered, options, source, dialogues=column[0] == "messages")


def prompt_records(rows: Rows, options: DataOptions, source: str) -> tuple[list[Record], list[Dropped]]:
    """Turns rows into records without responses, for generation.

    Without a prompt column, prompts are taken from the dialogues in `options.chosen`, else in `messages`.
    Args, returns and errors are those of `preference_records`.
    """
    file = _plain_file(rows, options, source)
    numbered, columns = _numbered(file, separate=options.chosen in file.columns), {}
    if not _has_prompt(numbered, options):
        column = options.chosen if options.chosen in file.columns else file.response
        columns = {} if column is None else {"": ("chosen", column)}
    records, dropped = _records("prompts", columns, numbered, options, source)
    return [replace(record, responses=()) for record in records], dropped


def _plain_file(rows: Rows, options: DataOptions, source: str) -> File:
    """Collects the columns of a file whose rows are not rewritten, for which some options have no effect."""
    for name in ("format", "pairs"):
        if (value := getattr(options, name)) is not None:
            raise InputError(f"data.{name} {value} has no effect on single responses and prompts; remove it")
    return File.of(rows, options, source)


def _numbered(file: File, *, separate: bool) -> Numbered:
    """Numbers the rows of a file, and puts their prompts into one column."""
    prompt = prompt_reader(file, separate=separate)
    used, dropped = sift(
        enumerate(enumerate(file.rows)), lambda row: (row[0], row[1] if isinstance(row[1], BadRow) else prompt(row[1]))
    )
    return sorted([*used, *((entry.row, BadRow(entry.fault)) for entry in dropped)], key=lambda row: row[0])


def _has_prompt(numbered: Numbered, options: DataOptions) -> bool:
    """Whether rows have a prompt of their own, or the user named its column."""
    if options.prompt != DataOptions.prompt:
        return True
    return any(isinstance(row, dict) and row.get(options.prompt) is not None for _, row in numbered)


def _records(
    kind: Kind,
    responses: Columns,
    numbered: Numbered,
    options: DataOptions,
    source: str,
    *,
    dialogues: bool = False,
) -> tuple[list[Record], list[Dropped]]:
    """Parses rows; `dialogues` hold their prompts, whatever the column of prompts holds."""
    # Detect the columns, then parse row by row.
    layout = _layout(kind, responses, numbered, options, source)
    layout = replace(layout, prompt=None) if dialogues else layout
    records, dropped = sift(
        ((index, (index, row)) for index, row in numbered), lambda row: read_record(row[1], row[0], layout, options)
    )
    # Responses must not repeat their prompt, and must differ; prompts alone need no check.
    if kind != "prompts":
        records, uneven = remove_repeated_prompts(records, options.repeated_prompt)
        records, unusable = sift(((record.row, record) for record in records), lambda r: check_responses(r, layout))
        dropped = sorted(dropped + uneven + unusable, key=lambda entry: entry.row)
    check_some_left(dropped, len(numbered), source)
    return records, dropped


def _layout(kind: Kind, responses: Columns, numbered: Numbered, options: DataOptions, source: str) -> FileLayout:
    readable = [row for _, row in numbered if isinstance(row, dict)]
    file = File.of(readable, options, source)
    prompt = options.prompt if _has_prompt(numbered, options) or not responses else None
    tools, system = (getattr(options, option) if file.has(option) else None for option in ("tools", "system"))
    rewards = options.reference_rewards if kind == "returns" and file.has("reference_rewards") else None
    layout = FileLayout(kind, prompt, responses, tools, system, rewards)
    encoded = (name for name in layout.columns if holds_encoded_messages(row.get(name) for row in readable))
    return replace(layout, encoded=frozenset(encoded))
