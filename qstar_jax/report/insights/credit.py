"""Insight 1: whether token rewards find the wrong tokens."""

from functools import partial

from rich.console import Console

from qstar_jax.console import one_line
from qstar_jax.evaluation.insights.credit import REWARD, Credit, Kind
from qstar_jax.report.dots import draw_dots
from qstar_jax.report.insights.view import View
from qstar_jax.report.numbers import signed_interval, with_interval
from qstar_jax.report.panel import Panel
from qstar_jax.report.tables import Table, cell, print_table


def panels(credit: Credit) -> list[Panel]:
    """Shows each detector on each kind of error, and the gains of the rewards over the other detectors."""
    groups = {name: kind.detectors for name, kind in _kinds(credit).items()}
    draw = partial(draw_dots, groups=groups, series=_detectors(credit), label="AUC", line=0.5, line_label="chance")
    words = "; ".join(f"{name} {with_interval(interval)}" for name, interval in credit.detectors.items())
    alt = f"Area under the curve of each detector of wrong tokens, over all errors: {words}. Chance is 0.50."
    shown = [Panel("Finding the wrong tokens", alt, draw, 0.7 + 0.55 * len(groups), _finding(credit))]
    if credit.differences:
        gains = {f"over {one_line(name)}": {"gain": interval} for name, interval in credit.differences.items()}
        draw = partial(draw_dots, groups=gains, series=["gain"], line=0.0, label="gain in AUC")
        words = "; ".join(f"{name} {with_interval(group['gain'], 3)}" for name, group in gains.items())
        alt = f"Gain of the implicit reward in area under the curve: {words}."
        shown.append(Panel("What the implicit reward gains", alt, draw, 0.7 + 0.5 * len(gains), _gains(credit)))
    return shown


def _finding(credit: Credit) -> str:
    reward = f"AUC {credit.detectors[REWARD].mean:.3f}"
    rivals = {name: credit.detectors[name].mean for name in credit.differences}
    if not rivals:
        return f"The implicit reward finds wrong tokens with {reward}."
    rival = max(rivals, key=rivals.get)
    name, area = one_line(rival), f"{rivals[rival]:.3f}"
    match credit.differences[rival].sign:
        case 1:
            return f"The implicit reward finds wrong tokens better ({reward}) than the {name} ({area})."
        case -1:
            return f"The implicit reward finds wrong tokens less well ({reward}) than the {name} ({area})."
    return f"The implicit reward ({reward}) and the {name} ({area}) find wrong tokens equally well, up to noise."


def _gains(credit: Credit) -> str:
    for sign, words in ((-1, "It is worse than the {}."), (0, "No gain over the {} can be told from noise.")):
        if names := [one_line(name) for name, gain in credit.differences.items() if gain.sign == sign]:
            return words.format(" and the ".join(names))
    least = min(credit.differences.values(), key=lambda gain: gain.mean)
    return f"It gains on every control, at least {signed_interval(least, 3)}."


def tables(credit: Credit, *, brief: bool = False) -> list[Table]:
    """AUC of each detector by kind of error, and the gains of the implicit reward.

    `brief` leaves out the intervals of all detectors but the first, for narrow terminals.
    """
    names = _detectors(credit)
    rows = [
        (name, str(kind.answers), *(cell(kind.detectors.get(d), 3, lone=brief and d != names[0]) for d in names))
        for name, kind in _kinds(credit).items()
    ]
    caption = f"AUC of finding {credit.wrong_tokens:,} wrong tokens of {credit.tokens:,}, with 95 % intervals"
    shown = [Table(caption, ("errors", "responses", *map(one_line, names)), tuple(rows))]
    if credit.differences:
        gains = tuple((one_line(name), with_interval(value, 3)) for name, value in credit.differences.items())
        shown.append(Table("AUC of the implicit reward minus that of", ("detector", "gain"), gains))
    return shown


def facts(credit: Credit) -> list[str]:
    """Names the models and counts the tokens."""
    return [
        f"policy {credit.model}; reference {credit.reference}; beta {credit.beta:g}",
        f"{credit.answers:,} responses, {credit.tokens:,} tokens, {credit.wrong_tokens:,} of them wrong",
        "bars: 95 % bootstrap intervals over responses",
    ]


def print_credit(credit: Credit, console: Console | None = None):
    """Prints how well each detector finds the wrong tokens; bars run from chance, 0.5."""
    by_kind, *gains = tables(credit, brief=True)
    areas = tuple((one_line(name), with_interval(area, 3)) for name, area in credit.detectors.items())
    bars = [(min(area.mean, 0.5), max(area.mean, 0.5)) for area in credit.detectors.values()]
    print_table(Table(by_kind.caption, ("detector", "AUC"), areas), console, bars)
    for table in (Table("By kind of error", by_kind.columns, by_kind.rows[1:]), *gains):
        print_table(table, console)


def _kinds(credit: Credit) -> dict[str, Kind]:
    """All errors together, then each kind."""
    kinds = {one_line(name): kind for name, kind in credit.kinds.items()}
    return {"all errors": Kind(credit.answers, credit.detectors)} | kinds


def _detectors(credit: Credit) -> list[str]:
    return list(dict.fromkeys(name for kind in _kinds(credit).values() for name in kind.detectors))


VIEW = View(
    Credit,
    insight="credit",
    heading="Credit: which tokens earn the reward",
    panels=panels,
    tables=tables,
    facts=facts,
    print=print_credit,
)
