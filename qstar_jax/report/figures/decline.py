"""Insight 3: how implicit rewards move in training, beside what Eq. 16 expects."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes

from qstar_jax.console import one_line
from qstar_jax.report.figures.panel import Panel, Style
from qstar_jax.report.numbers import MINUS, signed

# Curve of the record -> what it is
CURVES = {
    "chosen": "chosen answers",
    "rejected": "rejected answers",
    "margin": "margin",
    "reference": f"reference's own answers: {MINUS}β KL(π_ref ‖ π)",
}


def decline_panels(decline: Mapping[str, Any]) -> list[Panel]:
    """Shows the rewards of each run over its steps, all runs on one scale.

    Args:
        decline: `runs`, each with `steps`, `curves` and maybe `stderr`.

    Returns:
        One panel a run.
    """
    runs = decline["runs"]
    limits = _limits(runs)
    return [Panel(_title(run), _alt(run), partial(_draw, run=run, limits=limits)) for run in runs]


def numbers(values: Sequence[float | None]) -> list[float]:
    """Writes what was not measured as not a number, which leaves a gap."""
    return [math.nan if value is None else float(value) for value in values]


def _title(run: Mapping[str, Any]) -> str:
    return f"{one_line(run['name'])}, {'held-out' if run['held_out'] else 'training'} pairs"


def _alt(run: Mapping[str, Any]) -> str:
    ends = "; ".join(
        f"{CURVES[name]} from {signed(values[0], 2)} to {signed(values[-1], 2)}"
        for name in CURVES
        if (values := [x for x in numbers(run["curves"].get(name, ())) if math.isfinite(x)])
    )
    return f"Mean implicit rewards over {run['steps'][-1]} steps, {_title(run)}: {ends}."


def _limits(runs: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    values = [x for run in runs for name in CURVES for x in numbers(run["curves"].get(name, ())) if math.isfinite(x)]
    low, high = min([0.0, *values]), max([0.0, *values])
    room = 0.08 * (high - low) or 1.0
    return low - room, high + room


def _draw(axes: Axes, style: Style, *, run: Mapping[str, Any], limits: tuple[float, float]) -> None:
    axes.axhline(0.0, color=style.quiet, linewidth=1, linestyle=(0, (2, 2)), zorder=1)
    steps = run["steps"]
    for number, (name, label) in enumerate(CURVES.items()):
        if name not in run["curves"]:
            continue
        values, mark = numbers(run["curves"][name]), style.mark(number)
        axes.plot(steps, values, label=label, markersize=4, markevery=max(1, len(steps) // 6), **mark)
        errors = numbers((run.get("stderr") or {}).get(name, ()))
        if len(errors) == len(values):
            low, high = ([v + side * e for v, e in zip(values, errors, strict=True)] for side in (-2, 2))
            axes.fill_between(steps, low, high, color=mark["color"], alpha=0.16, linewidth=0)
    axes.set_ylim(limits)
    axes.set_xlabel("step")
    axes.set_ylabel("implicit reward (nats)")
    axes.grid(axis="y")
