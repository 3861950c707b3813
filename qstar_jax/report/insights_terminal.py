"""The three insights on a terminal: what was found, and the numbers; nothing depends on colour."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.bar import Bar
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from qstar_jax.console import one_line, visible
from qstar_jax.report.numbers import MINUS, NONE, with_interval
from qstar_jax.report.tables import Table, credit_tables, decline_tables, sweep_tables

Record = Mapping[str, Any]

_STATES = {True: ("reproduced", "green"), False: ("not reproduced", "red"), None: ("cannot be told", "yellow")}
_BAR = 8  # characters
_NUMBERS = f"+0123456789{MINUS}{NONE}"
_STEPS = 6


def print_findings(findings: Sequence[Record], console: Console | None = None) -> None:
    """Prints what was found of each insight beside what the paper says.

    Args:
        findings: See `insights_page.insights_page`.
        console: Where to print; standard output by default.
    """
    console = console or Console()
    for number, finding in enumerate(findings, start=1):
        word, colour = _STATES[finding["reproduced"]]
        heading = Text(f"{number}. {one_line(finding['title'])}: ", style="bold").append(word, f"bold {colour}")
        console.print(heading)
        grid = Grid.grid(padding=(0, 2, 0, 0))
        for label, name in (("claim", "claim"), ("measured", "measured"), ("paper", "paper"), ("made by", "command")):
            if finding[name]:
                grid.add_row(Text(label, style="dim"), Text(visible(finding[name]), overflow="fold"))
        console.print(grid)
        console.print()


def print_credit(credit: Record, console: Console | None = None) -> None:
    """Prints how well each detector finds the wrong tokens; bars run from chance, 0.5.

    Args:
        credit: See `figures.credit.credit_panels`.
        console: Where to print; standard output by default.
    """
    by_kind, *others = credit_tables(credit, brief=True)
    detectors = credit["detectors"]
    overall = Table(
        by_kind.caption,
        ("detector", "AUC"),
        tuple((one_line(name), with_interval(auc, 3)) for name, auc in detectors.items()),
    )
    _print(overall, console, [(min(auc["mean"], 0.5), max(auc["mean"], 0.5)) for auc in detectors.values()])
    for table in (Table("By kind of error", by_kind.columns, by_kind.rows[1:]), *others):
        _print(table, console)


def print_sweep(sweep: Record, console: Console | None = None) -> None:
    """Prints what the width of the beam does to answers, one table a run; bars are win rates.

    Args:
        sweep: See `figures.sweep.sweep_panels`.
        console: Where to print; standard output by default.
    """
    runs = sweep["runs"]
    tables = sweep_tables(sweep, brief=True)
    for table, run in zip(tables, runs, strict=False):
        rates = [(point.get("win_rate") or {"mean": 0.0})["mean"] for point in run["points"]]
        _print(table, console, [(0.0, rate) for rate in rates])
    for table in tables[len(runs) :]:
        _print(table, console)


def print_decline(decline: Record, console: Console | None = None) -> None:
    """Prints implicit rewards over the training, and each run's verdict.

    Args:
        decline: See `figures.decline.decline_panels`.
        console: Where to print; standard output by default.
    """
    console = console or Console()
    for table, run in zip(decline_tables(decline, most=_STEPS), decline["runs"], strict=True):
        _print(table, console)
        if run["verdict"]:
            console.print(Text(visible(run["verdict"])), end="\n\n")


def _print(table: Table, console: Console | None, bars: Sequence[tuple[float, float]] | None = None) -> None:
    """Prints a table; `bars` are parts of [0, 1], one a row, drawn in a last column."""
    if not table.rows:
        return
    console = console or Console()
    console.print(Text(table.caption, style="bold"))
    grid = Grid(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    columns = list(zip(*table.rows, strict=True))
    numeric = [n > 0 and all(cell[:1] in _NUMBERS for cell in column) for n, column in enumerate(columns)]
    heads = [name.replace(" ", "\n") if right else name for name, right in zip(table.columns, numeric, strict=True)]
    lines = [(*head.split("\n"), *column) for head, column in zip(heads, columns, strict=True)]
    width = sum(max(map(len, column)) + 2 for column in lines) + (0 if bars is None else _BAR + 2)
    for head, right in zip(heads, numeric, strict=True):
        # Numbers stay in one piece, unless rich would then have to cut them.
        whole = right and width <= console.width
        grid.add_column(Text(head), justify="right" if right else "left", no_wrap=whole, overflow="fold")
    if bars is not None:
        grid.add_column("", width=_BAR)
    for number, row in enumerate(table.rows):
        cells = [Text(cell) for cell in row]
        grid.add_row(*cells, *([] if bars is None else [Bar(1.0, *bars[number], width=_BAR)]))
    console.print(grid)
