"""Insight 2: how responses change as the search for likely ones grows wider."""

from collections.abc import Sequence
from functools import partial

from matplotlib.axes import Axes
from rich.console import Console

from qstar_jax.console import one_line
from qstar_jax.evaluation.insights.sweep import Point, Sweep, SweepRun
from qstar_jax.evaluation.intervals import Interval
from qstar_jax.report.dots import draw_dots
from qstar_jax.report.insights.view import View
from qstar_jax.report.numbers import MINUS, NONE, decimal, with_interval
from qstar_jax.report.panel import Panel, Style
from qstar_jax.report.tables import Table, cell, print_table

# Measure of a point -> (title of its panel, label of its axis, digits, line of no effect)
MEASURES: dict[str, tuple[str, str, int, float | None]] = {
    "win_rate": ("Win rate against the preferred response", "share of wins", 2, 0.5),
    "length": ("Length of responses", "tokens", 1, None),
    "logp": ("Likelihood of responses", "log π (nats)", 1, None),
    "implicit_reward": ("Implicit reward of responses", "reward (nats)", 2, 0.0),
    "true_reward": ("True reward of responses", "reward of the task", 2, None),
}
_CONTROLS = ("sampled", "greedy")
_CONTROL_ROOM = 1.8  # their names are wider than numbers
_DODGE = 0.13  # between the points of two runs


def panels(sweep: Sweep) -> list[Panel]:
    """Shows each measure over the width of the beam, and the differences of win rates; one curve per run.

    Returns:
        One panel for each measure that any point has, and one for differences.
    """
    places = _places([point for run in sweep.runs for point in run.points])
    shown = []
    for measure in _measured(sweep):
        title, label, digits, line = MEASURES[measure]
        draw = partial(_draw_measure, runs=sweep.runs, places=places, measure=measure, label=label, line=line)
        alt = f"{title} over the width of the beam. {_in_words(sweep.runs, measure, digits)}"
        shown.append(Panel(title, alt, draw, finding=_finding(sweep, measure, digits)))
    # The judge may have decided no prompt of a pair of decoders.
    decided = {
        name: {run: interval for run, interval in by_run.items() if interval is not None}
        for name, by_run in _differences(sweep).items()
    }
    groups = {name: by_run for name, by_run in decided.items() if by_run}
    if groups:
        names = [one_line(run.name) for run in sweep.runs]
        draw = partial(draw_dots, groups=groups, series=names, line=0.0, label="difference of win rates")
        words = "; ".join(
            f"{name}, {run}: {with_interval(interval)}"
            for name, by_run in groups.items()
            for run, interval in by_run.items()
        )
        height = max(2.3, 0.7 + 0.5 * len(groups))
        alt = f"Differences of win rates: {words}."
        shown.append(Panel("What width changes", alt, draw, height, _differences_in_words(sweep)))
    return shown


# Measure -> what responses do if it rises, falls, or stays within its intervals
_CHANGES = {
    "length": ("grow longer", "grow shorter", "keep their length"),
    "logp": ("grow more likely", "grow less likely", "do not grow more likely"),
    "implicit_reward": ("earn more implicit reward", "earn less implicit reward", "earn no more implicit reward"),
    "true_reward": ("earn more true reward", "earn less true reward", "earn no more true reward"),
}


def _finding(sweep: Sweep, measure: str, digits: int) -> str:
    """Says what width does to a measure of the first run; empty if two of its points are missing."""
    run = sweep.runs[0]
    points = sorted((p for p in run.points if getattr(p, measure) and p.decoder != "sampled"), key=lambda p: p.width)
    if len(points) < 2:
        return ""
    if measure == "win_rate":
        best = max(points, key=lambda point: point.win_rate.mean)
        others = [point for point in (points[0], points[-1]) if point is not best]
        shown = ", ".join(f"{_decoder(point)} {point.win_rate.mean:.2f}" for point in others)
        return _sentence(sweep, f"most wins with {_decoder(best)}: {best.win_rate.mean:.2f} ({shown})")
    first, last = (getattr(point, measure) for point in (points[0], points[-1]))
    change = _CHANGES[measure][{1: 0, -1: 1, 0: 2}[last.compare(first)]]
    ends = f"{decimal(first.mean, digits)} to {decimal(last.mean, digits)}"
    return _sentence(sweep, f"from {_decoder(points[0])} to {_decoder(points[-1])}, responses {change}: {ends}")


def _sentence(sweep: Sweep, text: str) -> str:
    """Names the first run where there are several."""
    whole = f"{sweep.runs[0].name}: {text}." if len(sweep.runs) > 1 else f"{text[:1].upper()}{text[1:]}."
    return one_line(whole)


def _decoder(point: Point) -> str:
    return point.decoder if point.decoder in _CONTROLS else f"{point.width} beams"


def _differences_in_words(sweep: Sweep) -> str:
    """Says which decoders of the first run beat which."""
    run, sentences = sweep.runs[0], []
    for sign, words in ((1, "beat"), (0, "cannot be told from"), (-1, "lose to")):
        pairs = [name.split(" - ") for name, gain in run.differences.items() if gain is not None and gain.sign == sign]
        for one in dict.fromkeys(one for one, _ in pairs):
            sentences.append(f"{one} {words} {' and '.join(other for first, other in pairs if first == one)}")
    return _sentence(sweep, "; ".join(sentences))


def _measured(sweep: Sweep) -> list[str]:
    points = [point for run in sweep.runs for point in run.points]
    return [measure for measure in MEASURES if any(getattr(point, measure) for point in points)]


def _differences(sweep: Sweep) -> dict[str, dict[str, Interval | None]]:
    """Difference, with a real minus -> run -> its interval."""
    differences: dict[str, dict[str, Interval | None]] = {}
    for run in sweep.runs:
        for name, interval in run.differences.items():
            differences.setdefault(one_line(name).replace(" - ", f" {MINUS} "), {})[one_line(run.name)] = interval
    return differences


def _name(point: Point) -> str:
    """Returns "sampled", "greedy" or the number of beams."""
    return point.decoder if point.decoder in _CONTROLS else str(point.width)


def _places(points: Sequence[Point]) -> dict[str, float]:
    """Where each decoder stands: controls first, then widths in equal steps."""
    controls = [name for name in _CONTROLS if any(point.decoder == name for point in points)]
    widths = sorted({point.width for point in points if point.decoder not in _CONTROLS})
    places = {name: number * _CONTROL_ROOM for number, name in enumerate(controls)}
    start = len(controls) * _CONTROL_ROOM
    return places | {str(width): start + number for number, width in enumerate(widths)}


def _draw_measure(axes: Axes, style: Style, *, runs, places, measure: str, label: str, line: float | None):
    if line is not None:
        axes.axhline(line, color=style.quiet, linewidth=1, linestyle=(0, (2, 2)), zorder=1)
    controls = [place for name, place in places.items() if name in _CONTROLS]
    if controls and len(controls) < len(places):
        axes.axvline(max(controls) + 0.6 * _CONTROL_ROOM, color=style.quiet, alpha=0.35, linewidth=0.8)
    for number, run in enumerate(runs):
        dodge = (number - (len(runs) - 1) / 2) * _DODGE
        _draw_run(axes, run, {name: place + dodge for name, place in places.items()}, measure, style.mark(number))
    axes.set_xticks(list(places.values()), list(places))
    axes.set_xlabel("beams (width 1: sampled, greedy)" if controls else "beams")
    axes.set_ylabel(label)
    axes.grid(axis="y")


def _draw_run(axes: Axes, run: SweepRun, places: dict[str, float], measure: str, mark: dict):
    """Draws beams as a line, controls as hollow marks, and the intervals of both."""
    points = [(places[_name(p)], p.decoder in _CONTROLS, value) for p in run.points if (value := getattr(p, measure))]
    points.sort(key=lambda point: point[:2])
    beams = [(place, value) for place, control, value in points if not control]
    axes.plot([x for x, _ in beams], [value.mean for _, value in beams], label=one_line(run.name), **mark)
    controls = [(place, value) for place, control, value in points if control]
    hollow = mark | {"linestyle": "none", "markerfacecolor": "none", "markeredgewidth": 1.4}
    axes.plot([x for x, _ in controls], [value.mean for _, value in controls], **hollow)
    ends = ([value.low for *_, value in points], [value.high for *_, value in points])
    axes.vlines([x for x, *_ in points], *ends, color=mark["color"], linewidth=1, alpha=0.75)


def _in_words(runs: Sequence[SweepRun], measure: str, digits: int) -> str:
    sentences = []
    for run in runs:
        values = [(_name(point), getattr(point, measure)) for point in run.points]
        words = ", ".join(f"{name} {with_interval(value, digits)}" for name, value in values if value)
        sentences.append(f"{one_line(run.name)}: {words}.")
    return " ".join(sentences)


def tables(sweep: Sweep, *, brief: bool = False) -> list[Table]:
    """Every measure of each decoder, one table per run, and the differences of win rates.

    `brief` leaves out all intervals but those of win rates, and lists differences in one column, for narrow terminals.
    """
    measures = _measured(sweep)
    heads = [name.replace("_", " ").replace("logp", "log π") for name in measures]
    shown = []
    for run in sweep.runs:
        rows = []
        for point in run.points:
            decoder = _name(point) if point.decoder in _CONTROLS else f"{point.width} beams"
            cells = [
                cell(getattr(point, name), MEASURES[name][2], lone=brief and name != "win_rate") for name in measures
            ]
            rows.append((decoder, *cells, f"{point.truncated:.1%}"))
        shown.append(Table(one_line(run.name), ("decoder", *heads, "cut"), tuple(rows)))
    return shown + _difference_tables(sweep, brief)


def _difference_tables(sweep: Sweep, brief: bool) -> list[Table]:
    differences = _differences(sweep)
    if not differences:
        return []
    names = list(dict.fromkeys(run for by_run in differences.values() for run in by_run))
    if brief:
        columns = ("win rates", "run", "difference")
        rows = [(name, run, with_interval(by_run[run])) for name, by_run in differences.items() for run in by_run]
    else:
        columns = ("win rates", *names)
        rows = [
            (name, *(with_interval(by_run[run]) if run in by_run else NONE for run in names))
            for name, by_run in differences.items()
        ]
    return [Table("Differences of win rates, with 95 % intervals", columns, tuple(rows))]


def facts(sweep: Sweep) -> list[str]:
    """Names the judge and the runs."""
    undecided = sum(point.undecided for run in sweep.runs for point in run.points)
    left_out = f"{undecided:,} responses on which the judge did not decide are left out of win rates"
    return [
        f"judge: {sweep.judge}; {sweep.prompts:,} prompts; seeds {', '.join(map(str, sweep.seeds))}",
        *(f"{run.name}: {run.model}" for run in sweep.runs),
        *([left_out] if undecided else []),
        "bars: 95 % intervals; hollow marks: width 1, sampled and greedy",
    ]


def print_sweep(sweep: Sweep, console: Console | None = None):
    """Prints each measure against the width of the beam, one table per run; bars are win rates."""
    shown = tables(sweep, brief=True)
    for table, run in zip(shown, sweep.runs, strict=False):
        rates = [point.win_rate.mean if point.win_rate else 0.0 for point in run.points]
        print_table(table, console, [(0.0, rate) for rate in rates])
    for table in shown[len(sweep.runs) :]:
        print_table(table, console)


VIEW = View(
    Sweep,
    insight="search",
    heading="Search: likely responses and good ones",
    panels=panels,
    tables=tables,
    facts=facts,
    print=print_sweep,
)
