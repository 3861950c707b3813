"""Selection: how often the best of N, or a vote, is right."""

from functools import partial

from matplotlib.axes import Axes
from rich.console import Console

from qstar_jax.console import one_line
from qstar_jax.evaluation.insights.selection import SUM, Selection
from qstar_jax.evaluation.votes import CHANCE, MAJORITY, ORACLE, best_by, vote_by
from qstar_jax.report.dots import draw_dots
from qstar_jax.report.insights.view import View
from qstar_jax.report.numbers import NONE, decimal, signed_interval, with_interval
from qstar_jax.report.panel import Panel, Style
from qstar_jax.report.tables import Table, cell, print_table

_DRAWN = (SUM, "min")  # scores whose curves are drawn: the outcome reward, and the process reward
_DODGE = 0.035  # between the intervals of two methods
_RIVALS = (MAJORITY, best_by(SUM))  # of step search


def panels(selection: Selection) -> list[Panel]:
    """Shows accuracy over N, gains over the majority, how well scores tell right from wrong, and step searches."""
    methods, last = _drawn(selection), selection.sizes[-1]
    words = "; ".join(f"{name} {_values(selection, name)}" for name in methods)
    alt = f"Accuracy among {', '.join(map(str, selection.sizes))} responses: {words}."
    draw = partial(_draw_accuracy, selection=selection, methods=methods)
    shown = [Panel("Selecting among N responses", alt, draw, finding=_finding(selection))]
    if gains := {one_line(name): {"gain": gain} for name, gain in selection.gains[MAJORITY].items()}:
        draw = partial(draw_dots, groups=gains, series=["gain"], line=0.0, label="gain in accuracy")
        words = "; ".join(f"{name} {with_interval(group['gain'], 3)}" for name, group in gains.items())
        alt = f"Gains over the majority among {last} responses: {words}."
        shown.append(
            Panel(f"Gains over the majority, N = {last}", alt, draw, 0.7 + 0.3 * len(gains), _gains(selection))
        )
    # A line for each of the two areas: as series, they would look like methods of the first panel.
    areas = {
        f"{one_line(name)}, {kind}": {"AUC": area}
        for name, both in selection.separation.items()
        for kind, area in (("overall", both.overall), ("by question", both.by_question))
        if area is not None
    }
    if areas:
        draw = partial(draw_dots, groups=areas, series=["AUC"], label="AUC", line=0.5)
        words = "; ".join(f"{name}: {with_interval(group['AUC'], 3)}" for name, group in areas.items())
        alt = f"Area under the curve of right against wrong responses: {words}."
        shown.append(Panel("Right against wrong responses", alt, draw, 0.7 + 0.3 * len(areas), _separates(selection)))
    return shown + _search_panels(selection)


def _search_panels(selection: Selection) -> list[Panel]:
    groups = {
        search.name: {name: search.gains[name] for name in _RIVALS} for search in selection.search if search.gains
    }
    if not groups:
        return []
    draw = partial(draw_dots, groups=groups, series=list(_RIVALS), line=0.0, label="gain in accuracy")
    alt = " ".join(search.in_words() for search in selection.search)
    gains = {f"{name} against {rival}": gain for name, group in groups.items() for rival, gain in group.items()}
    best = max(gains, key=lambda name: gains[name].mean)
    finding = "No step search can be told from samples of as many tokens."
    if any(gain.sign for gain in gains.values()):
        finding = f"At equal tokens, step search gains most with {best}: {signed_interval(gains[best], 3)}."
    return [Panel("Step search less samples of as many tokens", alt, draw, 0.9 + 0.5 * len(groups), finding)]


def _finding(selection: Selection) -> str:
    best, majority = selection.methods.get(best_by(SUM)), selection.methods[MAJORITY][-1].mean
    if best is None:
        verb = ("is worse than", "cannot be told from", "beats")[selection.gains[CHANCE][MAJORITY].sign + 1]
        return f"The majority ({majority:.3f}) {verb} chance ({selection.methods[CHANCE][-1].mean:.3f})."
    verb = ("loses to", "cannot be told from", "beats")[selection.gains[MAJORITY][best_by(SUM)].sign + 1]
    return f"Best of {selection.sizes[-1]} by {SUM} ({best[-1].mean:.3f}) {verb} the majority ({majority:.3f})."


def _gains(selection: Selection) -> str:
    gains = selection.gains[MAJORITY]
    best = max(gains, key=lambda name: gains[name].mean)
    if gains[best].sign > 0:
        return f"The most is gained with {one_line(best)}: {signed_interval(gains[best], 3)}."
    return "No way to select gains on the majority beyond noise."


def _separates(selection: Selection) -> str:
    where, areas = "Within questions", {name: both.by_question for name, both in selection.separation.items()}
    if None in areas.values():
        where, areas = "Over all responses", {name: both.overall for name, both in selection.separation.items()}
    best = max(areas, key=lambda name: areas[name].mean)
    better = areas[best].low > 0.5
    verb = "tells right from wrong best" if better else "is the best, and cannot be told from chance"
    return f"{where}, {one_line(best)} {verb}: AUC {with_interval(areas[best], 3)}."


def _drawn(selection: Selection) -> list[str]:
    """The methods whose curves are drawn, the baselines first."""
    scores = [name for name in _DRAWN if best_by(name) in selection.methods]
    return [CHANCE, ORACLE, MAJORITY, *map(best_by, scores), *map(vote_by, scores)]


def _draw_accuracy(axes: Axes, style: Style, *, selection: Selection, methods: list[str]):
    places = range(len(selection.sizes))
    for name in methods:
        values = selection.methods[name]
        means = [value.mean for value in values]
        if name in (CHANCE, ORACLE):
            line = (0, (2, 2)) if name == CHANCE else (0, (6, 2))
            axes.plot(places, means, color=style.quiet, linestyle=line, linewidth=1.2, label=name)
            continue
        number = methods.index(name) - 2
        mark = style.mark(number)
        axes.plot(places, means, label=one_line(name), **mark)
        # Only the last: intervals of all methods at every N would cover each other.
        axes.vlines(
            places[-1] + _DODGE * (number + 1),
            values[-1].low,
            values[-1].high,
            color=mark["color"],
            linewidth=1,
            alpha=0.75,
        )
    axes.set_xticks(list(places), list(map(str, selection.sizes)))
    axes.set_xlabel("responses per question, N")
    axes.set_ylabel("share of right selections")
    axes.grid(axis="y")


def _values(selection: Selection, name: str) -> str:
    return ", ".join(with_interval(value) for value in selection.methods[name])


def tables(selection: Selection, *, brief: bool = False) -> list[Table]:
    """Accuracy of each method at each N, gains, separation of right and wrong, and step searches.

    `brief` leaves out the intervals of all N but the largest, and of samples beside searches, for narrow terminals.
    """
    rows = []
    for name, values in selection.methods.items():
        *smaller, last = values
        cells = [cell(value, 3, lone=brief) for value in smaller]
        rows.append((one_line(name), *cells, with_interval(last, 3)))
    caption = f"Share of right selections among N responses, {selection.questions:,} questions"
    shown = [Table(caption, ("method", *(f"N {n}" for n in selection.sizes)), tuple(rows))]
    last = f"N {selection.sizes[-1]}"
    by_method = {
        name: (selection.gains[CHANCE][name], selection.gains[MAJORITY].get(name)) for name in selection.gains[CHANCE]
    }
    rows = [
        (one_line(name), signed_interval(over_chance, 3), signed_interval(over, 3) if over else NONE)
        for name, (over_chance, over) in by_method.items()
    ]
    shown.append(
        Table(f"Gains at {last}, with 95 % intervals", ("method", "over chance", "over majority"), tuple(rows))
    )
    rows = [
        (one_line(name), with_interval(area.overall, 3), with_interval(area.by_question, 3))
        for name, area in selection.separation.items()
    ]
    shown.append(Table("AUC of right against wrong responses", ("score", "overall", "by question"), tuple(rows)))
    return [*shown, *_search_tables(selection, brief=brief)]


def _search_tables(selection: Selection, *, brief: bool) -> list[Table]:
    rows = []
    for search in selection.search:
        sampled = [search.sampled.get(name) for name in (MAJORITY, best_by(SUM), vote_by(SUM))]
        samples = decimal(search.equal_samples, 1)
        rows.append(
            (
                search.name,
                f"{search.tokens:,.0f}",
                samples,
                with_interval(search.accuracy, 3),
                *(cell(value, 3, lone=brief) for value in sampled),
            )
        )
    columns = ("step search", "tokens", "samples", "right", MAJORITY, best_by(SUM), vote_by(SUM))
    return [Table("Step searches beside samples of as many tokens", columns, tuple(rows))] if rows else []


def facts(selection: Selection) -> list[str]:
    """Names the models, and counts responses."""
    lines = [
        f"{selection.questions:,} questions, {selection.responses:,} responses, {selection.right:.1%} right; "
        f"{selection.unanswered:,} without a final answer",
        *([f"votes by a score weigh {selection.weight}(score)"] if selection.separation else []),
        "intervals: 95 %, by bootstrap over questions",
    ]
    if selection.beta is not None:
        models = f"scores of {selection.model}; reference {selection.reference}; beta {selection.beta:g}"
        lines.insert(0, models)
    if selection.left_out:
        lines.append(f"{selection.left_out:,} questions with fewer than {selection.sizes[-1]} responses are left out")
    if selection.disagreements:
        lines.append(f"{selection.disagreements:,} labels of the file contradict what the final answers say")
    return lines


def print_selection(selection: Selection, console: Console | None = None):
    """Prints accuracy by N; bars are those of the largest N."""
    accuracy, *others = tables(selection, brief=True)
    print_table(accuracy, console, [(0.0, values[-1].mean) for values in selection.methods.values()])
    for table in others:
        print_table(table, console)
    (console or Console()).print("\n".join(map(one_line, facts(selection))), markup=False, highlight=False)


VIEW = View(
    Selection,
    insight="selection",
    heading="Selection: the best of several responses",
    panels=panels,
    tables=tables,
    facts=facts,
    print=print_selection,
)
