"""Points with intervals: one line per group, one colour per series."""

import textwrap
from collections.abc import Mapping

from matplotlib.axes import Axes

from qstar_jax.evaluation.intervals import Interval
from qstar_jax.report.panel import Style

_SPREAD = 0.62  # share of a group's room that its points take


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
    """Draws groups from the top down; in each, one point with its interval per series.

    Args:
        axes: Where to draw.
        style: Colours.
        groups: Name of a group -> name of a series -> interval; a series may be missing.
        series: All series, in the order of their colours.
        label: Label of the axis.
        line: Place of the line of no effect.
        line_label: Its meaning, for the legend.
    """
    axes.axvline(line, color=style.quiet, linewidth=1, linestyle=(0, (2, 2)), label=line_label, zorder=1)
    for number, name in enumerate(series):
        offset = (number - (len(series) - 1) / 2) * _SPREAD / max(len(series), 2)
        points = [(row + offset, group[name]) for row, group in enumerate(groups.values()) if name in group]
        mark = style.mark(number)
        axes.errorbar(
            [interval.mean for _, interval in points],
            [y for y, _ in points],
            xerr=_arms([interval for _, interval in points]),
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
        [max(0.0, interval.mean - interval.low) for interval in intervals],
        [max(0.0, interval.high - interval.mean) for interval in intervals],
    ]
