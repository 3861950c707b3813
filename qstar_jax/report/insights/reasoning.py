"""Reasoning: which step is false, and what that is worth in choosing among solutions."""

from functools import partial

from matplotlib.axes import Axes
from rich.console import Console

from qstar_jax.evaluation.insights.reasoning import AUC, CEILING, DPO, F1, PRM, Reasoning, best, vote
from qstar_jax.evaluation.votes import CHANCE, MAJORITY, ORACLE
from qstar_jax.report.dots import draw_dots
from qstar_jax.report.insights.view import View
from qstar_jax.report.numbers import decimal, signed_interval, with_interval
from qstar_jax.report.panel import Panel, Style
from qstar_jax.report.tables import Table, cell, print_table

# Method of the record -> its label in the figure
_CURVES = {
    ORACLE: ORACLE,
    best(DPO, "sum"): "best of N by reward, DPO",
    best(PRM, "sum"): f"best of N by reward, {PRM}",
    vote(DPO, "sum"): "vote weighted by reward, DPO",
    MAJORITY: MAJORITY,
    CHANCE: CHANCE,
}


def panels(reasoning: Reasoning) -> list[Panel]:
    """Shows how well each score finds false steps, and the accuracy of each selection and of each search."""
    return [
        _detectors_panel(reasoning, "f1", F1, 0.0),
        _detectors_panel(reasoning, "auc", AUC, 0.5),
        _selection_panel(reasoning),
        _search_panel(reasoning),
    ]


def _detectors_panel(reasoning: Reasoning, measure: str, title: str, line: float) -> Panel:
    groups = {one.score: {"": getattr(one, measure)} for one in reasoning.scores}
    words = "; ".join(f"{name} {with_interval(group[''])}" for name, group in groups.items())
    draw = partial(draw_dots, groups=groups, series=[""], label=title, line=line)
    return Panel(title, f"{title}: {words}.", draw, 0.7 + 0.4 * len(groups), _gains_in_words(reasoning, title))


def _gains_in_words(reasoning: Reasoning, measure: str) -> str:
    gains = reasoning.differences[measure]
    better = [name for name, gain in gains.items() if gain.sign > 0]
    if len(better) == len(gains):
        return "Step rewards learned from outcomes beat every control."
    others = "; ".join(f"{name} {signed_interval(gain)}" for name, gain in gains.items() if gain.sign <= 0)
    return f"Step rewards beat {len(better)} of {len(gains)} controls; not: {others}."


def _selection_panel(reasoning: Reasoning) -> Panel:
    curves = {label: reasoning.selection[name] for name, label in _CURVES.items()}
    words = "; ".join(f"{label} {with_interval(values[-1])}" for label, values in curves.items())
    gain = next(g for name, g in _last_gains(reasoning).items() if name.startswith(best(DPO, "sum")))
    verb = {1: "beats", 0: "cannot be told from", -1: "loses against"}[gain.sign]
    return Panel(
        "Choosing among N samples",
        f"Accuracy with {reasoning.sizes[-1]} samples: {words}.",
        partial(_draw_selection, sizes=reasoning.sizes, curves=curves),
        2.6,
        f"Of {reasoning.sizes[-1]} samples, the best by DPO's reward {verb} the majority: {signed_interval(gain)}.",
    )


def _last_gains(reasoning: Reasoning) -> dict:
    return reasoning.differences[f"accuracy of {reasoning.sizes[-1]}"]


def _draw_selection(axes: Axes, style: Style, *, sizes, curves):
    for number, (label, values) in enumerate(curves.items()):
        mark = style.mark(number)
        axes.plot(sizes, [value.mean for value in values], label=label, **mark)
        low, high = [value.low for value in values], [value.high for value in values]
        axes.fill_between(sizes, low, high, color=mark["color"], alpha=0.14, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, list(map(str, sizes)))
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("samples N")
    axes.set_ylabel("right answers")
    axes.grid(axis="y")


def _search_panel(reasoning: Reasoning) -> Panel:
    groups = {one.method: {"": one.accuracy} for one in reasoning.search}
    words = "; ".join(f"{name} {with_interval(group[''])}" for name, group in groups.items())
    gains = reasoning.differences["accuracy at equal tokens"]
    comparison, gain = max(gains.items(), key=lambda item: item[1].mean)
    search, equal = comparison.split(" - ")
    verb = {1: "find more right answers than", 0: "cannot be told from", -1: "find fewer right answers than"}[gain.sign]
    finding = f"With as many tokens, {search} {verb} the {equal}: {signed_interval(gain)}"
    draw = partial(draw_dots, groups=groups, series=[""], label="right answers", line=0.0)
    return Panel("Search at equal tokens", f"Right answers: {words}.", draw, 0.7 + 0.45 * len(groups), f"{finding}.")


def tables(reasoning: Reasoning, *, brief: bool = False) -> list[Table]:
    """How well scores find false steps, the table of selection, the searches, and all differences.

    `brief` leaves out most intervals, for narrow terminals.
    """
    scores = [
        (
            one.score,
            with_interval(one.f1),
            cell(one.on_false, 2, lone=brief),
            cell(one.on_right, 2, lone=brief),
            with_interval(one.auc, 3),
            cell(one.rank_correlation, 2, lone=brief),
        )
        for one in reasoning.scores
    ]
    columns = ("score", F1, "false solutions", "right solutions", AUC, "rank correlation with values")
    selection = [
        (name, *(cell(value, 2, lone=brief) for value in values)) for name, values in reasoning.selection.items()
    ]
    search = [(one.method, with_interval(one.accuracy)) for one in reasoning.search]
    shown = [
        Table("Finding the false step", columns, tuple(scores)),
        Table("Right answers among N samples", ("method", *map(str, reasoning.sizes)), tuple(selection)),
        Table("Right answers at equal tokens", ("method", "right"), tuple(search)),
    ]
    for measure, differences in reasoning.differences.items():
        rows = tuple((name, signed_interval(value, 3)) for name, value in differences.items())
        shown.append(Table(f"Differences in {measure}", ("comparison", "difference"), rows))
    return shown


def facts(reasoning: Reasoning) -> list[str]:
    """Names the settings, and what is known exactly."""
    trained = "; ".join(
        f"{name}: {count:,} {'pairs' if name == DPO else 'labelled solutions'}, beta {reasoning.betas[name]:g}"
        for name, count in reasoning.trained_on.items()
    )
    return [
        f"seed {reasoning.seed}; {trained}",
        f"the solver comes out right with probability {decimal(reasoning.success)}",
        f"{reasoning.solutions:,} held-out solutions; thresholds come from as many others",
        f"{CEILING}: the change of the exact value over a step, which no detector of lost value can beat",
        "samples, and the steps that beams choose among, are the base model's; sum: the outcome reward; min: the worst "
        "step",
        "bars and bands: 95 % bootstrap intervals over solutions, or over sums",
    ]


def print_reasoning(reasoning: Reasoning, console: Console | None = None):
    """Prints how well scores find false steps, and what each way of choosing gets right."""
    for table in tables(reasoning, brief=True):
        print_table(table, console)


VIEW = View(
    Reasoning,
    insight="reasoning",
    heading="Reasoning: finding the false step",
    panels=panels,
    tables=tables,
    facts=facts,
    print=print_reasoning,
)
