"""Turns the rows of a file into records; its format is detected once, for all rows alike."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from qstar_jax.config import DataOptions
from qstar_jax.data.battles import first_prompt, holds_battles
from qstar_jax.data.columns import columns_of_encoded_messages
from qstar_jax.data.dropped import (
    Again,
    BadRow,
    Dropped,
    DroppedRow,
    check_some_left,
    kept_like,
    separate,
    used_or_dropped,
)
from qstar_jax.data.formats import File, Rows, prompt_reader
from qstar_jax.data.records import FileLayout, Kind, Record, check_responses, read_record
from qstar_jax.data.repeats import repeated_prompt_remover
from qstar_jax.data.rewriting import Numbered, places, rows_of
from qstar_jax.errors import InputError

Columns = dict[str, tuple[str, str]]  # label of a response -> (option that names its column, column)


def records_of(kind: Kind, rows: Rows, options: DataOptions, source: str) -> Iterable[Record | Dropped]:
    """Turns the rows of a file into records.

    Detected for the whole file: its columns (those in any row), which of them hold messages as JSON (by most texts),
    and whether responses repeat their prompt (by most rows, see `repeated_prompt_remover`).

    Args:
        kind: What rows become: records with two responses, chosen and rejected (`preferences`), with several, best
            first (`rankings`), with one (`completions`; with its label or its reward: `labels`, `returns`), or with
            none (`prompts`).
        rows: As they were read: a list, or what reads them anew whenever it is iterated.
        options: Columns and form.
        source: The user's name for the file, for errors.

    Returns:
        Records and dropped rows, in file order: a list of a list, else made anew whenever they are iterated.

    Raises:
        InputError: The columns fit none of the formats, or several, or an option has no effect.
    """
    return _KINDS[kind](rows, options, source)


def lists_of(records: Iterable[Record | Dropped], source: str) -> tuple[list[Record], list[Dropped]]:
    """Collects what `records_of` makes.

    Returns:
        The records and the dropped rows, both in file order.

    Raises:
        InputError: No row can be used.
    """
    used, dropped = separate(records)
    check_some_left(dropped, len(used) + len(dropped), source)
    return used, dropped


def preference_records(rows: Rows, options: DataOptions, source: str) -> tuple[list[Record], list[Dropped]]:
    """Lists `records_of` the kind `preferences`."""
    return lists_of(records_of("preferences", rows, options, source), source)


def ranking_records(rows: Rows, options: DataOptions, source: str) -> tuple[list[Record], list[Dropped]]:
    """Lists `records_of` the kind `rankings`."""
    return lists_of(records_of("rankings", rows, options, source), source)


def label_records(rows: Rows, options: DataOptions, source: str) -> tuple[list[Record], list[Dropped]]:
    """Lists `records_of` the kind `labels`."""
    return lists_of(records_of("labels", rows, options, source), source)


def return_records(rows: Rows, options: DataOptions, source: str) -> tuple[list[Record], list[Dropped]]:
    """Lists `records_of` the kind `returns`."""
    return lists_of(records_of("returns", rows, options, source), source)


def completion_records(rows: Rows, options: DataOptions, source: str) -> tuple[list[Record], list[Dropped]]:
    """Lists `records_of` the kind `completions`."""
    return lists_of(records_of("completions", rows, options, source), source)


def prompt_records(rows: Rows, options: DataOptions, source: str) -> tuple[list[Record], list[Dropped]]:
    """Lists `records_of` the kind `prompts`."""
    return lists_of(records_of("prompts", rows, options, source), source)


def _preferences(rows: Rows, options: DataOptions, source: str) -> Iterable[Record | Dropped]:
    """Turns rows with two responses into records with two responses: chosen, rejected."""
    numbered = rows_of("preferences", rows, options, source)
    columns = {"chosen": ("chosen", options.chosen), "rejected": ("rejected", options.rejected)}
    return _records("preferences", columns, numbered, options, source)


def _rankings(rows: Rows, options: DataOptions, source: str) -> Iterable[Record | Dropped]:
    """Turns rows with several responses into records of rankings, best first; pairs are rankings of two."""
    numbered = rows_of("rankings", rows, options, source)
    names = [f"place {place}" for place in range(1, places(numbered) + 1)]
    return _records("rankings", {name: ("completion", name) for name in names}, numbered, options, source)


def _labels(rows: Rows, options: DataOptions, source: str) -> Iterable[Record | Dropped]:
    """Turns rows into records with one response and its label; pairs are two responses, of which one is desirable."""
    numbered = rows_of("labels", rows, options, source)
    return _records("labels", {"": ("completion", options.completion)}, numbered, options, source)


def _returns(rows: Rows, options: DataOptions, source: str) -> Iterable[Record | Dropped]:
    """Turns rows into records with one response, its reward, and rewards of the reference's responses to its prompt.

    These are in the column `options.reference_rewards`, or else the rewards of all rows of the same prompt.
    """
    numbered = rows_of("returns", rows, options, source)
    records = _records("returns", {"": ("completion", options.completion)}, numbered, options, source)
    has_own = any(isinstance(record, Record) and record.reference_rewards for record in records)
    return records if has_own else _with_rewards_of_prompt(records)


def _with_rewards_of_prompt(records: Iterable[Record | Dropped]) -> Iterable[Record | Dropped]:
    """Gives each record the rewards of all records of its prompt, which must be samples of the reference."""

    def prompt_of(record: Record) -> bytes:
        return hashlib.blake2b(repr((record.prompt, record.tools)).encode(), digest_size=16).digest()

    rewards: dict[bytes, list[float]] = {}
    for record in records:
        if isinstance(record, Record):
            rewards.setdefault(prompt_of(record), []).append(record.reward)

    def use(record: Record) -> Record:
        others = rewards[prompt_of(record)]
        if len(others) < 2:
            raise BadRow(
                "no rewards of the reference's responses",
                "; expected several rows of the same prompt, or rewards in a column named by --data.reference_rewards",
            )
        return replace(record, reference_rewards=tuple(others))

    return _each(records, use)


def _each(records: Iterable[Record | Dropped], use: Callable[[Record], Record]) -> Iterable[Record | Dropped]:
    """Changes or drops records, whenever they are iterated."""

    def use_record(record: Record | Dropped) -> Record | Dropped:
        return use(record) if isinstance(record, Record) else record

    used = Again(lambda: used_or_dropped(((record.row, record) for record in records), use_record))
    return kept_like(records, used)


def _completions(rows: Rows, options: DataOptions, source: str) -> Iterable[Record | Dropped]:
    """Turns rows into records with one response, for supervised fine-tuning.

    The response is the column `options.completion`, else `options.chosen`, else the last turn of the column `messages`.
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


def _prompts(rows: Rows, options: DataOptions, source: str) -> Iterable[Record | Dropped]:
    """Turns rows into records without responses, for generation.

    Without a prompt column, prompts are taken from the dialogues in `options.chosen`, else in `messages`.
    """
    file = _plain_file(rows, options, source)
    numbered, columns = _numbered(file, separate=options.chosen in file.columns), {}
    if not _has_prompt(numbered, options):
        column = options.chosen if options.chosen in file.columns else file.response
        columns = {} if column is None else {"": ("chosen", column)}
    records = _records("prompts", columns, numbered, options, source)
    return _each(records, lambda record: replace(record, responses=()))


def _plain_file(rows: Rows, options: DataOptions, source: str) -> File:
    """Collects the columns of a file whose rows are not rewritten, for which some options have no effect."""
    for name in ("format", "pairs"):
        if (value := getattr(options, name)) is not None:
            raise InputError(f"data.{name} {value} has no effect on single responses and prompts; remove it")
    return File.of(rows, options, source)


def _numbered(file: File, *, separate: bool) -> Numbered:
    """Numbers the rows of a file, and puts their prompts into one column."""
    prompt, battles = prompt_reader(file, separate=separate), holds_battles(file.columns)

    def start() -> Iterator[tuple[int, dict | DroppedRow]]:
        for index, row in enumerate(file.rows):
            try:
                if isinstance(row, BadRow):
                    raise row
                yield index, first_prompt(prompt(row), file.options.prompt) if battles else prompt(row)
            except DroppedRow as error:
                yield index, error

    return kept_like(file.rows, Again(start))


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
) -> Iterable[Record | Dropped]:
    """Parses rows; `dialogues` hold their prompts, whatever the column of prompts holds."""
    # Detect the columns, then parse row by row.
    layout = _layout(kind, responses, numbered, options, source)
    layout = replace(layout, prompt=None) if dialogues else layout

    def parse(numbered_row: tuple[int, dict | DroppedRow]) -> Record:
        index, row = numbered_row
        return read_record(row, index, layout, options)

    records = kept_like(numbered, Again(lambda: used_or_dropped(((item[0], item) for item in numbered), parse)))
    # Responses must not repeat their prompt, and must differ; prompts alone need no check.
    if kind == "prompts":
        return records
    remove_prompt = repeated_prompt_remover(records, options.repeated_prompt)
    return _each(records, lambda record: check_responses(remove_prompt(record), layout))


def _layout(kind: Kind, responses: Columns, numbered: Numbered, options: DataOptions, source: str) -> FileLayout:
    readable = Again(lambda: (row for _, row in numbered if isinstance(row, dict)))
    file = File.of(readable, options, source)
    prompt = options.prompt if _has_prompt(numbered, options) or not responses else None
    tools, system = (getattr(options, option) if file.has(option) else None for option in ("tools", "system"))
    rewards = options.reference_rewards if kind == "returns" and file.has("reference_rewards") else None
    layout = FileLayout(kind, prompt, responses, tools, system, rewards)
    return replace(layout, encoded=columns_of_encoded_messages(readable, layout.columns))


_KINDS: dict[Kind, Callable[[Rows, DataOptions, str], Iterable[Record | Dropped]]] = {
    "preferences": _preferences,
    "rankings": _rankings,
    "labels": _labels,
    "returns": _returns,
    "completions": _completions,
    "prompts": _prompts,
}
