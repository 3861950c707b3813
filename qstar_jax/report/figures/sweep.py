"""Insight 2: what becomes of answers as the search for likely ones grows wider."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes

from qstar_jax.console import one_line
from qstar_jax.report.figures.dots import draw_dots
from qstar_jax.report.figures.panel import Panel, Style
from qstar_jax.report.numbers import MINUS, Interval, with_interval

# Measure of a point -> (title of its panel, label of its axis, digits, line of no effect)
MEASURES: dict[str, tuple[str, str, int, float | None]] = {
    "win_rate": ("Win rate against the preferred answer", "share of wins", 2, 0.5),
    "length": ("Length of answers", "tokens", 1, None),
    "logp": ("Likelihood of answers", "log π (nats)", 1, None),
    "implicit_reward": ("Implicit reward of answers", "reward (nats)", 2, 0.0),
    "true_reward": ("True reward of answers", "reward of the task", 2, None),
}
_CONTROLS = ("sampled", "greedy")
_CONTROL_ROOM = 1.8  # their names are wider than numbers
_DODGE = 0.13


def sweep_panels(sweep: Mapping[str, Any]) -> list[Panel]:
    """Shows each measure over the width of the beam, and the differences of win rates; one curve a run.

    Args:
        sweep: `judge` and `runs`, each with `points` and maybe `differences`.

    Returns:
        One panel for each measure that any point has, and one for differences.
    """
    runs = sweep["runs"]
    places = _places([point for run in runs for point in run["points"]])
    panels = []
    for measure, (title, label, digits, line) in MEASURES.items():
        if any(_value(point, measure) for run in runs for point in run["points"]):
            draw = partial(_draw_measure, runs=runs, places=places, measure=measure, label=label, line=line)
            alt = f"{title} over the width of the beam. " + _in_words(runs, measure, digits)
            panels.append(Panel(title, alt, draw))
    names = [one_line(run["name"]) for run in runs]
    differences: dict[str, dict[str, Interval]] = {}
    for name, run in zip(names, runs, strict=True):
        for what, interval in run.get("differences", {}).items():
            if interval is not None:  # the judge may have decided no prompt of a pair of decoders
                differences.setdefault(difference_name(what), {})[name] = interval
    if differences:
        style = {"series": names, "line": 0.0, "label": "difference of win rates"}
        words = "; ".join(
            f"{what}, {name}: {with_interval(interval)}"
            for what, found in differences.items()
            for name, interval in found.items()
        )
        panels.append(
            Panel(
                "What width changes",
                f"Differences of win rates: {words}.",
                lambda axes, theme: draw_dots(axes, theme, differences, **style),
                max(2.3, 0.7 + 0.5 * len(differences)),
            )
        )
    return panels


def point_name(point: Mapping[str, Any]) -> str:
    """Says how a point's answers were made: "sampled", "greedy" or the number of beams."""
    return point["decoder"] if point["decoder"] in _CONTROLS else str(point["width"])


def difference_name(name: str) -> str:
    """Writes "5 beams - greedy" with a real minus."""
    return one_line(name).replace(" - ", f" {MINUS} ")


def _places(points: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Where each decoder stands: controls first, then widths in equal steps."""
    controls = [name for name in _CONTROLS if any(point["decoder"] == name for point in points)]
    widths = sorted({point["width"] for point in points if point["decoder"] not in _CONTROLS})
    places = {name: number * _CONTROL_ROOM for number, name in enumerate(controls)}
    start = len(controls) * _CONTROL_ROOM
    return places | {str(width): start + number for number, width in enumerate(widths)}


def _value(point: Mapping[str, Any], measure: str) -> Interval | None:
    return point.get(measure)


def _draw_measure(axes: Axes, style: Style, *, runs, places, measure: str, label: str, line: float | None) -> None:
    if line is not None:
        axes.axhline(line, color=style.quiet, linewidth=1, linestyle=(0, (2, 2)), zorder=1)
    controls = [place for name, place in places.items() if name in _CONTROLS]
    if controls and len(controls) < len(places):
        axes.axvline(max(controls) + 0.6 * _CONTROL_ROOM, color=style.quiet, alpha=0.35, linewidth=0.8)
    for number, run in enumerate(runs):
        dodge = (number - (len(runs) - 1) / 2) * _DODGE
        found = [(places[point_name(p)] + dodge, p, _value(p, measure)) for p in run["points"]]
        found = sorted((place, p["decoder"] in _CONTROLS, value) for place, p, value in found if value)
        mark = style.mark(number)
        beams = [(place, value) for place, control, value in found if not control]
        axes.plot([x for x, _ in beams], [value["mean"] for _, value in beams], label=one_line(run["name"]), **mark)
        lone = [(place, value) for place, control, value in found if control]
        axes.plot(
            [x for x, _ in lone],
            [value["mean"] for _, value in lone],
            **mark | {"linestyle": "none"},
            markerfacecolor="none",
            markeredgewidth=1.4,
        )
        axes.vlines(
            [x for x, _, _ in found],
            [value["low"] for *_, value in found],
            [value["high"] for *_, value in found],
            color=mark["color"],
            linewidth=1,
            alpha=0.75,
        )
    axes.set_xticks(list(places.values()), list(places))
    axes.set_xlabel("beams (width 1: sampled, greedy)" if controls else "beams")
    axes.set_ylabel(label)
    axes.grid(axis="y")


def _in_words(runs: Sequence[Mapping[str, Any]], measure: str, digits: int) -> str:
    return " ".join(
        f"{one_line(run['name'])}: "
        + ", ".join(
            f"{point_name(p)} {with_interval(value, digits)}" for p in run["points"] if (value := _value(p, measure))
        )
        + "."
        for run in runs
    )
