"""The views of first errors."""

from dataclasses import replace

from qstar_jax.evaluation.insights.steps import Gain
from qstar_jax.evaluation.intervals import Interval
from qstar_jax.report.insights.steps import facts, panels, print_steps, tables
from qstar_jax.report.panel import sheet_figure


def test_points_are_the_records(step_errors):
    f1, auc, gains = sheet_figure(panels(step_errors), "light").axes
    assert list(f1.containers[0].lines[0].get_xdata()) == [0.66, 0.5, 0.22, 0.48, 0.3]
    assert list(auc.containers[0].lines[0].get_xdata()) == [0.88, 0.8, 0.61, 0.74, 0.6]
    assert len(gains.get_yticklabels()) == 3


def test_captions_say_what_was_found_and_what_was_not(step_errors):
    def captions(gain):
        gains = {"outcome reward": Gain(*[Interval(gain, gain - 0.02, gain + 0.02)] * 2)}
        return [panel.finding for panel in panels(replace(step_errors, gains=gains))]

    assert captions(0.2) == [
        "The step reward finds errors best: F1 0.66, outcome reward 0.22.",
        "The step reward finds errors best: AUC 0.88, outcome reward 0.61.",
        "It gains on every control, at least +0.20 [+0.18, +0.22] in F1.",
    ]
    assert "equally well, up to noise" in captions(0.01)[0] and "over outcome reward may be noise" in captions(0.01)[2]
    assert "less well than the best control" in captions(-0.1)[0] and "lower than that of outcome" in captions(-0.1)[2]


def test_tables_and_facts_tell_of_the_split(step_errors, printed):
    (detectors, gains) = tables(step_errors)
    assert detectors.columns == ("detector", "F1", "erroneous", "correct", "AUC", "threshold")
    assert detectors.rows[0][:2] == ("step reward", "0.66 [0.62, 0.70]") and len(gains.rows) == 3
    assert any("calibrated" in fact and "127 others" in fact for fact in facts(step_errors))
    assert any("given" in fact for fact in facts(replace(step_errors, given_threshold=True)))
    assert "First errors of 512 responses, 300 of them with one" in printed(print_steps, step_errors)
