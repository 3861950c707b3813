"""The views of the insights: each file has the figure, the tables and the terminal output of one insight."""

from pathlib import Path

from rich.console import Console

from qstar_jax.console import say
from qstar_jax.evaluation.insights.record import Record
from qstar_jax.report.insights import (
    control,
    credit,
    decline,
    dialogue,
    diffusion,
    pipeline,
    reasoning,
    selection,
    steps,
    sweep,
)
from qstar_jax.report.insights.view import View
from qstar_jax.report.panel import sheet_figure

VIEWS: tuple[View, ...] = (
    credit.VIEW,
    sweep.VIEW,
    decline.VIEW,
    control.VIEW,
    dialogue.VIEW,
    steps.VIEW,
    selection.VIEW,
    reasoning.VIEW,
    diffusion.VIEW,
    pipeline.VIEW,
)  # in the order of the page


def view_of(record: Record) -> View:
    """Finds the views of a record."""
    return next(view for view in VIEWS if isinstance(record, view.record))


def write_figure(record: Record, out: Path) -> Path:
    """Draws a record's figure on white, as a PNG file in a folder that is made if it is missing."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{record.NAME}.png"
    sheet_figure(view_of(record).panels(record), "light").savefig(path, dpi=144)
    return path


def show(record: Record, out: Path, console: Console):
    """Prints a record that was written to a folder, and draws its figure there."""
    view_of(record).print(record, console)
    figure = write_figure(record, out)
    say(console, f"{record.NAME}: {out / f'{record.NAME}.json'}, {figure}")
