"""The figures of the three insights, from plain records; see `panel` for how they are drawn."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from qstar_jax.report.figures.credit import credit_panels
from qstar_jax.report.figures.decline import decline_panels
from qstar_jax.report.figures.panel import Panel, Theme, as_svg, panel_figure, sheet_figure
from qstar_jax.report.figures.sweep import sweep_panels

__all__ = [
    "PANELS",
    "Panel",
    "Theme",
    "as_svg",
    "credit_figure",
    "decline_figure",
    "panel_figure",
    "sweep_figure",
    "write_figures",
]

Record = Mapping[str, Any]
PANELS = {"credit": credit_panels, "sweep": sweep_panels, "decline": decline_panels}


def credit_figure(credit: Record, theme: Theme = "light") -> Figure:
    """Draws how well each detector finds the wrong tokens.

    Args:
        credit: See `credit_panels`.
        theme: "light" or "dark".

    Returns:
        All its panels.
    """
    return sheet_figure(credit_panels(credit), theme)


def sweep_figure(sweep: Record, theme: Theme = "light") -> Figure:
    """Draws what the width of the beam does to answers.

    Args:
        sweep: See `sweep_panels`.
        theme: "light" or "dark".

    Returns:
        All its panels.
    """
    return sheet_figure(sweep_panels(sweep), theme)


def decline_figure(decline: Record, theme: Theme = "light") -> Figure:
    """Draws implicit rewards over training.

    Args:
        decline: See `decline_panels`.
        theme: "light" or "dark".

    Returns:
        All its panels.
    """
    return sheet_figure(decline_panels(decline), theme)


def write_figures(
    out: Path, *, credit: Record | None = None, sweep: Record | None = None, decline: Record | None = None
) -> list[Path]:
    """Writes the figures of the records that are given, on white.

    Args:
        out: Folder, made if it is missing.
        credit: For credit.png.
        sweep: For sweep.png.
        decline: For decline.png.

    Returns:
        The files.
    """
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for name, record in {"credit": credit, "sweep": sweep, "decline": decline}.items():
        if record is not None:
            written.append(out / f"{name}.png")
            sheet_figure(PANELS[name](record), "light").savefig(written[-1], dpi=144)
    return written
