"""Tables of text, for the page and for the terminal."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.bar import Bar
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from qstar_jax.console import visible
from qstar_jax.evaluation.intervals import Interval
from qstar_jax.report.numbers import MINUS, NONE, decimal, with_interval

_BAR = 8  # characters
_NUMBERS = f"+0123456789{MINUS}{NONE}"


@dataclass(frozen=True)
class Table:
    """A table of text, which terminals and pages make safe to look at.

    Args:
        caption: What it shows.
        columns: Headings; the first column names the rows.
        rows: Cells, as many as there are headings.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def cell(interval: Interval | None, digits: int, *, lone: bool) -> str:
    """Writes a mean with its interval, or, where `lone` is set, without it."""
    return decimal(interval.mean, digits) if lone and interval else with_interval(interval, digits)


def print_table(table: Table, console: Console | None = None, bars: Sequence[tuple[float, float]] | None = None):
    """Prints a table; an empty one is left out.

    Args:
        table: The table.
        console: Where to print; standard output by default.
        bars: For each row a part of [0, 1], drawn as a bar in a last column.
    """
    if not table.rows:
        return
    console = console or Console()
    console.print(Text(visible(table.caption), style="bold"))
    grid = Grid(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    columns = list(zip(*table.rows, strict=True))
    numeric = [n > 0 and all(cell[:1] in _NUMBERS for cell in column) for n, column in enumerate(columns)]
    heads = [name.replace(" ", "\n") if right else name for name, right in zip(table.columns, numeric, strict=True)]
    lines = [(*head.split("\n"), *column) for head, column in zip(heads, columns, strict=True)]
    width = sum(max(map(len, column)) + 2 for column in lines) + (0 if bars is None else _BAR + 2)
    for head, right in zip(heads, numeric, strict=True):
        # Numbers stay in one piece, unless rich would then have to truncate them.
        whole = right and width <= console.width
        grid.add_column(Text(visible(head)), justify="right" if right else "left", no_wrap=whole, overflow="fold")
    if bars is not None:
        grid.add_column("", width=_BAR)
    for number, row in enumerate(table.rows):
        cells = [Text(visible(text)) for text in row]
        grid.add_row(*cells, *([] if bars is None else [Bar(1.0, *bars[number], width=_BAR)]))
    console.print(grid)
