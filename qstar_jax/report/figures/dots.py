"""Points with intervals, one line of them a thing and one colour a series: for credit and for differences."""

import textwrap
from collections.abc import Mapping

from matplotlib.axes import Axes

from qstar_jax.report.figures.panel import Style
from qstar_jax.report.numbers import Interval

_SPREAD = 0.62  # how much of a group's room its points take


def draw_dots(
    axes: Axes,
    style: Style,
    groups: Mapping[str, Mapping[str, Interval]],
    *,
    series: list[str],
    label: str,
    line: float,
    line_label: str | None = None,
) -> None:
    """Draws groups from the top down; in each, one point with its interval a series.

    Args:
        axes: Where to draw.
        style: Colours.
        groups: Name of a group -> name of a series -> interval; a series may be missing.
        series: All series, in the order of their colours.
        label: Of the axis.
        line: Where the line of no effect stands.
        line_label: What it means, for the legend.
    """
    axes.axvline(line, color=style.quiet, linewidth=1, linestyle=(0, (2, 2)), label=line_label, zorder=1)
    for number, name in enumerate(series):
        offset = (number - (len(series) - 1) / 2) * _SPREAD / max(len(series), 2)
        found = [(row + offset, group[name]) for row, group in enumerate(groups.values()) if name in group]
        mark = style.mark(number)
        axes.errorbar(
            [interval["mean"] for _, interval in found],
            [y for y, _ in found],
            xerr=_arms([interval for _, interval in found]),
            fmt=mark["marker"],
            color=mark["color"],
            elinewidth=1.4,
            capsize=2,
            label=name if len(series) > 1 else None,
        )
    axes.set_yticks(range(len(groups)), [textwrap.fill(name, 16) for name in groups])
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    for row in range(1, len(groups)):
        axes.axhline(row - 0.5, color=style.quiet, alpha=0.22, linewidth=0.7)
    axes.grid(axis="x")
    axes.set_xlabel(label)


def _arms(intervals: list[Interval]) -> list[list[float]]:
    """Lengths from the mean to both ends; a mean outside its own bootstrap interval has no arm on that side."""
    return [
        [max(0.0, interval["mean"] - interval["low"]) for interval in intervals],
        [max(0.0, interval["high"] - interval["mean"]) for interval in intervals],
    ]
