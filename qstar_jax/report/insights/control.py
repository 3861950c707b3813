"""Control: rewards of segments after cloning and without it, and how the policies do in the environment."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from matplotlib.axes import Axes
from rich.console import Console

from qstar_jax.console import one_line
from qstar_jax.evaluation.insights.control import ARMS, RUNAWAY, Control, ControlRun, Outcome, in_short
from qstar_jax.evaluation.insights.decline import Decline
from qstar_jax.report.dots import draw_dots
from qstar_jax.report.insights import decline
from qstar_jax.report.insights.view import View
from qstar_jax.report.numbers import MINUS, NONE, decimal, signed, with_interval
from qstar_jax.report.panel import Panel, Style
from qstar_jax.report.tables import Table, print_table

SUCCESS = "success"


def panels(control: Control) -> list[Panel]:
    """Shows rewards of both arms at the first seed, and what policies do in the environment."""
    first = [run for run in control.runs if run.seed == control.seeds[0]]
    fig_3 = [run for arm in ("with_bc", "without_bc") for run in first if run.arm == arm]
    shown = [
        replace(panel, finding=f"{ARMS[run.arm].capitalize()}: r{panel.finding[1:]}")
        for panel, run in zip(decline.panels(Decline(tuple(run.rewards for run in fig_3))), fig_3, strict=True)
    ]
    measures = dict.fromkeys(name for run in control.runs for name in run.outcomes)
    if SUCCESS in measures:
        shown.append(_success_panel(control))
    shown += [_exact_panel(name, first) for name in measures if name != SUCCESS]
    return shown


def _success_panel(control: Control) -> Panel:
    """Success rates at the end, and those of the clone, from which CPL began."""
    groups: dict[str, dict[str, object]] = {}
    for run in control.runs:
        series = f"seed {run.seed}"
        if run.arm == "with_bc":
            groups.setdefault("cloning", {})[series] = run.outcomes[SUCCESS].values[0]
        groups.setdefault(ARMS[run.arm], {})[series] = run.outcomes[SUCCESS].values[-1]
    means = {name: sum(one.mean for one in group.values()) / len(group) for name, group in groups.items()}
    words = "; ".join(f"{name} {decimal(mean)}" for name, mean in means.items())
    draw = partial(
        draw_dots, groups=groups, series=[f"seed {seed}" for seed in control.seeds], label="success rate", line=0.0
    )
    best = max(means, key=means.__getitem__)
    finding = f"The most successes: {best}, {decimal(means[best])} on average over seeds."
    return Panel("Success", f"Mean success rates: {words}.", draw, 0.8 + 0.45 * len(groups), finding)


def _exact_panel(measure: str, runs: list[ControlRun]) -> Panel:
    outcomes = {ARMS[run.arm]: run.outcomes[measure] for run in runs if measure in run.outcomes}
    ends = {name: outcome.values[-1].mean for name, outcome in outcomes.items()}
    words = "; ".join(f"{name} {in_short(end)}" for name, end in ends.items())
    title = f"{measure.capitalize()}, relative to the optimum"
    best = min(ends, key=ends.__getitem__)
    return Panel(
        title,
        f"{title}, at the end: {words}.",
        partial(_draw_exact, outcomes=outcomes, label=measure),
        finding=f"Lowest {measure} at the end: {best}, {in_short(ends[best])}.",
    )


def _draw_exact(axes: Axes, style: Style, *, outcomes: Mapping[str, Outcome], label: str):
    for number, (name, outcome) in enumerate(outcomes.items()):
        values = [value.mean for value in outcome.values]
        axes.plot(outcome.steps, values, label=name, markersize=4, **style.mark(number))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")  # plain text; a page's SVG has no renderer of mathematics
    values = [value.mean for outcome in outcomes.values() for value in outcome.values]
    axes.set_ylim(top=min(2 * max(values), RUNAWAY))
    axes.set_xlabel("step")
    axes.set_ylabel(f"{label}, relative")
    axes.grid(axis="y")


def tables(control: Control) -> list[Table]:
    """Held-out log-probabilities and rewards of every run, and how its policy did before and at the end."""
    rewards = tuple((one_line(run.rewards.name), *_rewards(run)) for run in control.runs)
    moved = ("chosen log π before", "at the end", "rejected before", "at the end")
    columns = ("run", *moved, "reward", "theory", "ranked right")
    shown = [Table("Held-out segments, before preference learning and at its end", columns, rewards)]
    for measure in dict.fromkeys(name for run in control.runs for name in run.outcomes):
        rows = tuple(
            (one_line(run.rewards.name), *_outcome(measure, run.outcomes[measure]))
            for run in control.runs
            if measure in run.outcomes
        )
        shown.append(Table(measure.capitalize(), ("run", "before", "at the end", "best", "at step"), rows))
    return shown


def _rewards(run: ControlRun) -> tuple[str, ...]:
    moved = (decimal(value, 1) for name in ("chosen", "rejected") for value in run.logps[name])
    ends = (run.rewards.last(curve) for curve in ("chosen", "reference"))
    numbers = (signed(value, 2) if error is None else f"{signed(value, 2)} ± {error:.2f}" for value, error in ends)
    if run.arm == "best_bc":  # there is no preference learning
        numbers = (NONE, NONE)
    return *moved, *numbers, decimal(run.accuracy, 2)


def _outcome(measure: str, outcome: Outcome) -> tuple[str, ...]:
    write = with_interval if measure == SUCCESS else lambda value: in_short(value.mean)
    means = [value.mean for value in outcome.values]
    best = means.index(max(means) if measure == SUCCESS else min(means))
    return write(outcome.values[0]), write(outcome.values[-1]), write(outcome.values[best]), str(outcome.steps[best])


def facts(control: Control) -> list[str]:
    """Names the verdict of each run, and what the numbers are."""
    verdicts = [f"{run.rewards.name}: {run.rewards.verdict}" for run in control.runs if run.rewards.verdict]
    return [
        *verdicts,
        "rewards: β log π / π₀ of held-out segments without dropout, with π₀ the policy before preference learning "
        "and β what CPL calls alpha; ± and bands: two standard errors over pairs",
        f"theory: {MINUS}β KL(π₀ ‖ π) at the states of these segments, lost on average by data that π₀ was fitted to",
        *(["success: 95 % Wilson intervals; the objects lie at the same places for all"] * _has(control, SUCCESS)),
        *(["gain error and excess cost are exact, without an interval"] * _has(control, "gain error")),
        "the same figure of a language model: `qstar report --decline FOLDER --control FOLDER`",
    ]


def _has(control: Control, measure: str) -> bool:
    return any(measure in run.outcomes for run in control.runs)


def print_control(control: Control, console: Console | None = None):
    """Prints the tables, and each run's verdict."""
    console = console or Console()
    for table in tables(control):
        print_table(table, console)
    for fact in facts(control)[:-1]:
        console.print(one_line(fact), markup=False, highlight=False)


VIEW = View(
    Control,
    insight="control",
    heading="Control: rewards of chosen segments in training",
    panels=panels,
    tables=tables,
    facts=facts,
    print=print_control,
)
