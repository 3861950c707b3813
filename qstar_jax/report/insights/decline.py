"""Insight 3: how implicit rewards move in training, beside what Eq. 16 expects."""

import math
from collections.abc import Iterator, Sequence
from functools import partial

from matplotlib.axes import Axes
from rich.console import Console
from rich.text import Text

from qstar_jax.console import one_line, visible
from qstar_jax.evaluation.insights.decline import Decline, DeclineRun
from qstar_jax.report.insights.view import View
from qstar_jax.report.numbers import MINUS, NONE, signed
from qstar_jax.report.panel import Panel, Style
from qstar_jax.report.tables import Table, print_table

# What is chosen -> curve of the record -> its label
_LABELS = {
    "responses": {
        "chosen": "chosen responses",
        "rejected": "rejected responses",
        "margin": "margin",
        "reference": f"reference's own responses: {MINUS}β KL(π_ref ‖ π)",
    },
    "segments": {
        "chosen": "chosen segments",
        "rejected": "rejected segments",
        "margin": "margin",
        "reference": f"what cloned data lose: {MINUS}β KL(π₀ ‖ π)",
    },
}
_STEPS, _TERMINAL_STEPS = 12, 6  # steps of a table at most


def panels(decline: Decline) -> list[Panel]:
    """Shows the rewards of each run over its steps, in one panel per run, all on one scale."""
    limits = _limits(decline.runs)
    return [
        Panel(_title(run), _alt(run), partial(_draw, run=run, limits=limits), finding=_finding(run))
        for run in decline.runs
    ]


def _finding(run: DeclineRun) -> str:
    end, error = run.last("chosen")
    if error is None:
        return f"Rewards of chosen {run.kind} end at {signed(end, 2)}."
    number = f"{signed(end, 2)} ± {error:.2f}"
    if abs(end) <= error:
        return f"Rewards of chosen {run.kind} neither rise nor fall beyond noise: {number}."
    return f"Rewards of chosen {run.kind} {'fall' if end < 0 else 'rise'} to {number}."


def _title(run: DeclineRun) -> str:
    return f"{one_line(run.name)}, {'held-out' if run.held_out else 'training'} pairs"


def _alt(run: DeclineRun) -> str:
    ends = "; ".join(
        f"{label} from {signed(values[0], 2)} to {signed(values[-1], 2)}"
        for name, label in _LABELS[run.kind].items()
        if (values := [value for value in _values(run, name) if math.isfinite(value)])
    )
    return f"Mean implicit rewards over {run.steps[-1]} steps, {_title(run)}: {ends}."


def _values(run: DeclineRun, curve: str) -> list[float]:
    """A curve with NaN, which leaves a gap, where nothing was measured; empty if the run has no such curve."""
    return [math.nan if value is None else float(value) for value in run.curves.get(curve, ())]


def _limits(runs: Sequence[DeclineRun]) -> tuple[float, float]:
    curves = (_values(run, name) for run in runs for name in _LABELS[run.kind])
    values = [value for curve in curves for value in curve if math.isfinite(value)]
    low, high = min([0.0, *values]), max([0.0, *values])
    room = 0.08 * (high - low) or 1.0
    return low - room, high + room


def _draw(axes: Axes, style: Style, *, run: DeclineRun, limits: tuple[float, float]):
    axes.axhline(0.0, color=style.quiet, linewidth=1, linestyle=(0, (2, 2)), zorder=1)
    for number, (name, label) in enumerate(_LABELS[run.kind].items()):
        if name not in run.curves:
            continue
        values, mark = _values(run, name), style.mark(number)
        axes.plot(run.steps, values, label=label, markersize=4, markevery=max(1, len(run.steps) // 6), **mark)
        errors = run.stderr.get(name, ())
        if len(errors) == len(values):
            low, high = ([v + side * e for v, e in zip(values, errors, strict=True)] for side in (-2, 2))
            axes.fill_between(run.steps, low, high, color=mark["color"], alpha=0.16, linewidth=0)
    axes.set_ylim(limits)
    axes.set_xlabel("step")
    axes.set_ylabel("implicit reward (nats)")
    axes.grid(axis="y")


def tables(decline: Decline, *, most: int = _STEPS) -> list[Table]:
    """Rewards of each run at `most` steps spread over the training, the first and the last among them."""
    shown = []
    for run in decline.runs:
        pairs = "held-out" if run.held_out else "training"
        caption = f"{one_line(run.name)}: implicit reward ± standard error, {pairs} pairs"
        columns = ("step", *(name for name in _LABELS[run.kind] if name in run.curves))
        rows = [(str(run.steps[at]), *_rewards(run, at)) for at in _spread(len(run.steps), most)]
        shown.append(Table(caption, columns, tuple(rows)))
    return shown


def _rewards(run: DeclineRun, at: int) -> Iterator[str]:
    for name in _LABELS[run.kind]:
        if name in run.curves:
            value, errors = _values(run, name)[at], run.stderr.get(name)
            error = f" ± {errors[at]:.2f}" if errors else ""
            yield f"{signed(value, 2)}{error}" if math.isfinite(value) else NONE


def _spread(count: int, most: int) -> list[int]:
    if count <= most:
        return list(range(count))
    return sorted({round(n * (count - 1) / (most - 1)) for n in range(most)})


def facts(decline: Decline) -> list[str]:
    """Names the runs and their verdicts."""
    runs = [f"{run.name} ({run.folder}, beta {run.beta:g}): {run.verdict or 'no verdict'}" for run in decline.runs]
    return [*runs, "bands: two standard errors"]


def print_decline(decline: Decline, console: Console | None = None):
    """Prints implicit rewards over the training, and each run's verdict."""
    console = console or Console()
    for table, run in zip(tables(decline, most=_TERMINAL_STEPS), decline.runs, strict=True):
        print_table(table, console)
        if run.verdict:
            console.print(Text(visible(run.verdict)), end="\n\n")


VIEW = View(
    Decline,
    insight="decline",
    heading="Decline: rewards of chosen responses in training",
    panels=panels,
    tables=tables,
    facts=facts,
    print=print_decline,
)
