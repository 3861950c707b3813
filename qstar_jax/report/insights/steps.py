"""Whether step rewards find first errors."""

from functools import partial

from rich.console import Console

from qstar_jax.console import one_line
from qstar_jax.evaluation.insights.steps import StepErrors
from qstar_jax.evaluation.step_marks import REWARD
from qstar_jax.report.dots import draw_dots
from qstar_jax.report.insights.view import View
from qstar_jax.report.numbers import decimal, signed, signed_interval, with_interval
from qstar_jax.report.panel import Panel
from qstar_jax.report.tables import Table, cell, print_table

_MEASURES = {"f1": "F1 of first errors", "auc": "AUC of wrong steps"}


def panels(errors: StepErrors) -> list[Panel]:
    """Shows F1 and AUC of each detector, and what the step reward gains over each control."""
    shown = []
    for measure, title in _MEASURES.items():
        groups = {one_line(name): {measure: getattr(found, measure)} for name, found in errors.detectors.items()}
        words = "; ".join(f"{name} {with_interval(group[measure])}" for name, group in groups.items())
        line = {"line": 0.5, "line_label": "chance"} if measure == "auc" else {"line": 0.0}
        draw = partial(draw_dots, groups=groups, series=[measure], label=title, **line)
        shown.append(Panel(title, f"{title}: {words}.", draw, 0.7 + 0.45 * len(groups), _finding(errors, measure)))
    gains = {
        f"over {one_line(name)}": {title: getattr(gain, measure) for measure, title in _MEASURES.items()}
        for name, gain in errors.gains.items()
    }
    words = "; ".join(f"{name}, {t} {signed_interval(i)}" for name, group in gains.items() for t, i in group.items())
    draw = partial(draw_dots, groups=gains, series=list(_MEASURES.values()), label="gain of the step reward", line=0.0)
    alt, height = f"Gain of the step reward: {words}.", 0.7 + 0.5 * len(gains)
    return [*shown, Panel("What the step reward gains", alt, draw, height, _gains(errors))]


def _finding(errors: StepErrors, measure: str) -> str:
    """What a figure shows, from the strongest control."""
    name = max(errors.gains, key=lambda name: getattr(errors.detectors[name], measure).mean)
    own, other = (decimal(getattr(errors.detectors[d], measure).mean) for d in (REWARD, name))
    numbers = f"{measure.upper()} {own}, {one_line(name)} {other}"
    match getattr(errors.gains[name], measure).sign:
        case 1:
            return f"The step reward finds errors best: {numbers}."
        case -1:
            return f"The step reward finds errors less well than the best control: {numbers}."
    return f"The step reward and the best control find errors equally well, up to noise: {numbers}."


def _gains(errors: StepErrors) -> str:
    for sign, words in ((-1, "Its F1 is lower than that of {}."), (0, "Its gain in F1 over {} may be noise.")):
        if names := [one_line(name) for name, gain in errors.gains.items() if gain.f1.sign == sign]:
            return words.format(" and ".join(names))
    least = min((gain.f1 for gain in errors.gains.values()), key=lambda gain: gain.mean)
    return f"It gains on every control, at least {signed_interval(least)} in F1."


def tables(errors: StepErrors, *, brief: bool = False) -> list[Table]:
    """F1, both accuracies, AUC and threshold of each detector, and the gains of the step reward.

    `brief` leaves out the intervals of the accuracies, for narrow terminals.
    """
    rows = tuple(
        (
            one_line(name),
            with_interval(found.f1),
            cell(found.erroneous, 2, lone=brief),
            cell(found.correct, 2, lone=brief),
            with_interval(found.auc),
            *(() if brief else (signed(found.threshold),)),
        )
        for name, found in errors.detectors.items()
    )
    columns = ("detector", "F1", "erroneous", "correct", "AUC", *(() if brief else ("threshold",)))
    caption = (
        f"First errors of {errors.responses:,} responses, {errors.erroneous:,} of them with one (ProcessBench's "
        f"protocol), and AUC of {errors.wrong_steps:,} wrong steps"
    )
    gains = tuple(
        (one_line(name), signed_interval(gain.f1), signed_interval(gain.auc)) for name, gain in errors.gains.items()
    )
    return [
        Table(caption, columns, rows),
        Table("What the step reward gains over", ("detector", "F1", "AUC"), gains),
    ]


def facts(errors: StepErrors) -> list[str]:
    """Names the models, the split, and what the columns mean."""
    reward = next(iter(errors.detectors.values()))
    chosen = "given" if errors.given_threshold else "calibrated"
    return [
        f"policy {errors.model}; reference {errors.reference}; beta {errors.beta:g}",
        f"{errors.steps:,} steps: {errors.wrong_steps:,} wrong, {errors.right_steps:,} right, the others not judged",
        f"{errors.questions:,} prompts are measured; thresholds come from {errors.calibration_questions:,} others; "
        f"that of the step reward was {chosen}: {decimal(reward.threshold, 4)}",
        "erroneous: the share of responses with an error whose first wrong step is found; correct: the share of the "
        "others in which no step is suspected; F1: their harmonic mean",
        "bars: 95 % bootstrap intervals over prompts, with the thresholds as they are",
    ]


def print_steps(errors: StepErrors, console: Console | None = None):
    """Prints how well each detector finds first errors."""
    for table in tables(errors, brief=True):
        print_table(table, console)


VIEW = View(
    StepErrors,
    insight="steps",
    heading="Steps: where a response goes wrong",
    panels=panels,
    tables=tables,
    facts=facts,
    print=print_steps,
)
