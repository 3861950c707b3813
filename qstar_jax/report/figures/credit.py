"""Insight 1: whether token rewards find the wrong tokens."""

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes

from qstar_jax.console import one_line
from qstar_jax.report.figures.dots import draw_dots
from qstar_jax.report.figures.panel import Panel, Style
from qstar_jax.report.numbers import with_interval


def credit_panels(credit: Mapping[str, Any]) -> list[Panel]:
    """Shows each detector on each kind of error, and what the rewards gain over the other detectors.

    Args:
        credit: `model`, `reference`, `detectors`, `kinds` and `differences`; intervals are of AUC.

    Returns:
        One or two panels.
    """
    groups = {"all errors": credit["detectors"]} | {
        one_line(kind): found["detectors"] for kind, found in credit["kinds"].items()
    }
    series = list(dict.fromkeys(name for group in groups.values() for name in group))

    def draw_detectors(axes: Axes, style: Style) -> None:
        draw_dots(axes, style, groups, series=series, label="AUC", line=0.5, line_label="chance")

    words = "; ".join(f"{name} {with_interval(interval)}" for name, interval in credit["detectors"].items())
    alt = f"Area under the curve of each detector of wrong tokens, over all errors: {words}. Chance is 0.50."
    panels = [Panel("Finding the wrong tokens", alt, draw_detectors, 0.7 + 0.55 * len(groups))]
    differences = {
        f"over {one_line(name)}": {"gain": interval} for name, interval in credit.get("differences", {}).items()
    }
    if differences:

        def draw_differences(axes: Axes, style: Style) -> None:
            draw_dots(axes, style, differences, series=["gain"], line=0.0, label="gain in AUC")

        words = "; ".join(f"{name} {with_interval(found['gain'], 3)}" for name, found in differences.items())
        alt = f"Gain of the implicit reward in area under the curve: {words}."
        panels.append(Panel("What the implicit reward gains", alt, draw_differences, 0.7 + 0.5 * len(differences)))
    return panels
