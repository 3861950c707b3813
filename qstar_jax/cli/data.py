"""`qstar data`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from qstar_jax.config import DataConfig
from qstar_jax.config.ranges import check_ranges
from qstar_jax.console import one_line, say, shorten_middle, visible
from qstar_jax.data.building import notes_on
from qstar_jax.data.dropped import Dropped, rows_by_reason
from qstar_jax.data.inspection import (
    Column,
    advice,
    columns_of,
    command,
    kind_of_rows,
    lengths_in_characters,
    lengths_in_tokens,
    response_name,
)
from qstar_jax.data.loading import make_dataset, read_records
from qstar_jax.data.preview import preview
from qstar_jax.data.reading import read_rows
from qstar_jax.data.records import Record
from qstar_jax.report.tables import Table, print_table

_WIDTH = 60  # characters of an example in a table
_TOKENIZER = ("*.json", "*.jinja", "*.txt", "tokenizer.model")  # what is downloaded
_LONG = 2**30  # tokens: longer than any text


def run(config: DataConfig):
    """Prints what a file of data holds, what becomes of its rows, and what to change."""
    check_ranges(config)
    console, options = Console(), replace(config.data, train=config.file)
    # What it holds, whether or not it can be used.
    rows = read_rows(config.file, config.split, options.max_train_rows, options.name)
    print_table(columns_table(columns_of(rows), len(rows)), console)
    kind, name = kind_of_rows(rows, options, config.file)
    kind = config.kind or kind
    say(console, f"format: {name}, read as {kind}")
    # What becomes of it.
    _, records, dropped = read_records(config.file, config.split, kind, options, options.max_train_rows)
    dataset = whole = tokenizer = None
    if config.model is None:
        lengths, unit = lengths_in_characters(records), "characters"
        for note in notes_on(records):
            say(console, note)
    else:
        tokenizer, eos_ids = read_tokenizer(config.model)
        dataset = make_dataset(records, dropped, config.file, tokenizer, options, eos_ids=eos_ids)
        unlimited = replace(options, max_length=_LONG, max_prompt_length=_LONG - 1)
        whole = make_dataset(records, dropped, config.file, tokenizer, unlimited, eos_ids=eos_ids)
        dropped, lengths, unit = list(dataset.dropped), lengths_in_tokens(whole, records), "tokens"
        say(console, dataset.summary)
    print_table(dropped_table(dropped, len(rows)), console)
    print_table(lengths_table(lengths, unit), console)
    # The first rows, and what to change.
    for number in range(min(config.show, len(records))):
        if dataset is None:
            _show_text(records[number], console)
        elif number < len(dataset.examples):
            example = dataset.examples[number]
            say(console, f"\nrow {example.row + 1}")
            console.print(preview(example, tokenizer, of_steps=example.row in dataset.steps))
    say(console, "")
    has_template = bool(getattr(tokenizer, "chat_template", None))
    for line in advice(kind, rows, records, options, dataset, whole, has_template):
        say(console, line)
    say(console, f"Use it: {command(kind, config, records)}")


def read_tokenizer(model: str) -> tuple[Any, tuple[int, ...]]:
    """Reads the tokenizer of a run, a folder or a model on the Hub, and the ids that end its responses."""
    from qstar_jax.store import hub
    from qstar_jax.store.checkpoints import find_checkpoint, read_description

    if (checkpoint := find_checkpoint(Path(model).expanduser())) is not None:
        description = read_description(checkpoint)
        tokenizer, generation = description.build_tokenizer(), description.generation
    else:
        folder = hub.open_folder(model, patterns=_TOKENIZER)
        tokenizer, generation = hub.read_tokenizer(folder), hub.read_generation_config(folder)
    return tokenizer, tuple(hub.with_eos(generation, tokenizer)["eos_token_id"])


def columns_table(columns: Sequence[Column], rows: int) -> Table:
    """Lays out the columns of a file."""
    cells = tuple(
        (one_line(column.name), " or ".join(column.types), f"{column.filled:.0%}", _short(column.example))
        for column in columns
    )
    return Table(f"{rows:,} rows", ("column", "type", "filled", "first value"), cells)


def dropped_table(dropped: Sequence[Dropped], rows: int) -> Table:
    """Lays out why rows are dropped, with what is wrong with the first of each kind."""
    faults = {entry.reason: entry.fault for entry in reversed(dropped)}
    cells = tuple(
        (f"{len(numbers):,}", str(numbers[0] + 1), one_line(faults[reason] or reason))
        for reason, numbers in rows_by_reason(dropped).items()
    )
    return Table(f"dropped, of {rows:,} rows", ("count", "first row", "reason"), cells)


def lengths_table(lengths: Mapping[str, np.ndarray], unit: str) -> Table:
    """Lays out lengths by their mean and percentiles."""
    cells = tuple(
        (name, f"{values.mean():.1f}", *(f"{value:,.0f}" for value in np.percentile(values, (50, 95, 99, 100))))
        for name, values in lengths.items()
        if len(values)
    )
    return Table(f"lengths in {unit}", ("text", "mean", "median", "95%", "99%", "longest"), cells)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return one_line(shorten_middle(text, _WIDTH))


def _show_text(record: Record, console: Console):
    said = "" if record.label is None else f", {'desirable' if record.label else 'not desirable'}"
    said += "" if record.reward is None else f", reward {record.reward:g}"
    say(console, f"\nrow {record.row + 1}{said}")
    texts = {"prompt": record.prompt}
    texts |= {response_name(place, record): response for place, response in enumerate(record.responses, start=1)}
    for name, turns in texts.items():
        for message in [{"content": turns}] if isinstance(turns, str) else turns:
            label = ", ".join(filter(None, (name, message.get("role"))))
            calls = message.get("tool_calls")
            called = f" {json.dumps(calls, ensure_ascii=False)}" if calls else ""
            say(console, visible(f"[{label}] {message['content']}{called}"))
