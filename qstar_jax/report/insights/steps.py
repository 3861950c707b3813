"""Whether step rewards find first errors."""

from functools import partial

from rich.console import Console

from qstar_jax.console import one_line
from qstar_jax.evaluation.insights.steps import StepErrors
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
        no_effect = (0.5, "chance") if measure == "auc" else (0.0, None)
        draw = partial(
            draw_dots, groups=groups, series=[measure], label=title, line=no_effect[0], line_label=no_effect[1]
        )
        shown.append(Panel(title, f"{title}: {words}.", draw, 0.7 + 0.45 * len(groups)))
    gains = {
        f"over {one_line(name)}": {title: getattr(gain, measure) for measure, title in _MEASURES.items()}
        for name, gain in errors.gains.items()
    }
    words = "; ".join(
        f"{name}, {title} {signed_interval(interval)}"
        for name, group in gains.items()
        for title, interval in group.items()
    )
    draw = partial(draw_dots, groups=gains, series=list(_MEASURES.values()), label="gain of the step reward", line=0.0)
    return [
        *shown,
        Panel("What the step reward gains", f"Gain of the step reward: {words}.", draw, 0.7 + 0.5 * len(gains)),
    ]


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
