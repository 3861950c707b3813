"""The views of credit."""

from dataclasses import replace

from qstar_jax.evaluation.intervals import Interval
from qstar_jax.report.insights.credit import panels, print_credit
from qstar_jax.report.panel import sheet_figure


def test_points_of_credit_are_the_records(credit):
    detectors, gains = sheet_figure(panels(credit), "light").axes
    (chance,) = [line for line in detectors.lines if line.get_label() == "chance"]
    assert chance.get_xdata() == [0.5, 0.5]
    drawn = {box.get_label(): list(box.lines[0].get_xdata()) for box in detectors.containers}
    assert drawn["implicit reward"] == [0.83, 0.91, 0.84, 0.78, 0.62]
    assert drawn["true advantage"] == [0.95] * 5
    labels = [text.get_text().replace("\n", "") for text in detectors.get_yticklabels()]
    assert labels[:2] == ["all errors", "wrong number"] and "⟨U+202E⟩" in labels[4].replace(" ", "")
    assert list(gains.containers[0].lines[0].get_xdata()) == [0.162, 0.321]


def test_no_ceiling_and_no_kinds_are_no_fault(credit):
    detectors = {name: area for name, area in credit.detectors.items() if name != "true advantage"}
    (axes,) = sheet_figure(panels(replace(credit, detectors=detectors, kinds={}, differences={})), "dark").axes
    assert len(axes.containers) == 3


def test_captions_say_who_finds_more_or_that_nobody_knows(credit):
    def captions(gain):
        gains = {"reference log-probability": Interval(gain, gain - 0.02, gain + 0.02)}
        return [panel.finding for panel in panels(replace(credit, differences=gains))]

    assert captions(0.16) == [
        "The implicit reward finds wrong tokens better (AUC 0.830) than the reference log-probability (0.670).",
        "It gains on every control, at least +0.160 [+0.140, +0.180].",
    ]
    assert "equally well, up to noise" in captions(0.01)[0] and "can be told from noise" in captions(0.01)[1]
    assert "less well (AUC 0.830) than" in captions(-0.1)[0] and captions(-0.1)[1].startswith("It is worse than")
    (alone,) = panels(replace(credit, differences={}))
    assert alone.finding == "The implicit reward finds wrong tokens with AUC 0.830."


def test_bars_of_detectors_run_from_chance(credit, printed):
    lines = printed(print_credit, credit).splitlines()
    bars = {line.split("  ")[0].strip(): line.count("█") for line in lines[2:8]}
    assert bars["true advantage"] > bars["implicit reward"] > bars["reference log-probability"] > bars["uniform split"]
    assert any("0.162 [0.141, 0.183]" in line for line in lines)
    assert any(line.startswith(" wrong number") for line in lines)
