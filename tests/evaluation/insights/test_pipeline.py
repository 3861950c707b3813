"""What is said of pipelines: intervals, verdicts and views, on made-up runs."""

import numpy as np
import pytest

from qstar_jax.evaluation.blame import measure_blame
from qstar_jax.evaluation.insights.pipeline import Pipeline, measure_pipeline
from qstar_jax.pipeline import Point
from qstar_jax.report.insights import write_figure
from qstar_jax.report.insights.pipeline import facts, panels, tables
from qstar_jax.report.numbers import MINUS, NONE

NAMES = ("outline", "text")
FAULTS = np.random.default_rng(0).random((200, 2)) < 0.4


def blame(*signs):
    """Rewards that fall with a stage's own faults, rise with them, or know nothing."""
    noise = np.random.default_rng(1).normal(size=FAULTS.shape)
    return measure_blame(NAMES, noise - 3 * np.array(signs) * FAULTS, FAULTS)


def curve(gain):
    points = [(0, -1.0, (0.0, 0.0)), (10, -1.0 + gain, (0.25, 0.5))]
    return [Point(*point, reward_error=0.1) for point in points]


def measure(tmp_path, *, gain=1.0, signs=(1, 1)):
    arms = {"joint": (curve(gain), blame(*signs)), "separate": (curve(0.5), blame(0, 0))}
    return measure_pipeline(arms, seed=3, pairs=50, measured=40, out=tmp_path)


def test_arms_and_their_intervals(tmp_path):
    record = measure(tmp_path)
    assert record.stages == NAMES and record.faulty == tuple(FAULTS.sum(0)) and record.runs == 200
    assert record.single == (FAULTS.sum(1) == 1).sum()
    joint, separate = record.arms
    last = joint.curve[-1]
    assert (last.reward.low, last.reward.high) == pytest.approx((-0.196, 0.196)) and last.total_kl == 0.75
    assert joint.finds[0].low > 0.9 and joint.tells.low > 0.9
    assert separate.finds[0].low < 0.5 < separate.finds[0].high
    assert Pipeline.read(tmp_path) == record


@pytest.mark.parametrize(
    ("changes", "reproduced"),
    [
        ({}, True),
        ({"gain": 0.1}, None),  # within the intervals
        ({"signs": (1, 0)}, None),  # the second stage's faults are not found
        ({"gain": -1.0}, False),
        ({"signs": (1, -1)}, False),
    ],
)
def test_verdicts(tmp_path, changes, reproduced):
    assert measure(tmp_path, **changes).finding().reproduced is reproduced


def test_views_say_what_was_measured(tmp_path):
    record = measure(tmp_path, signs=(1, 0))
    reward, whose = panels(record)
    assert "joint earns most: 0.00" in reward.finding and f"{MINUS}1.00" in reward.alt
    assert f"{record.arms[0].finds[1]:.2f}" in whose.finding
    earned, areas = tables(record)
    assert [row[0] for row in earned.rows] == ["references", "joint", "separate"]
    assert areas.columns == ("arm", "faults of the outline", "faults of the text", "whose fault")
    assert any("200 runs of the references" in fact for fact in facts(record))
    assert write_figure(record, tmp_path).stat().st_size > 10_000


def test_a_stage_that_is_never_at_fault_has_no_area(tmp_path):
    one = measure_blame(NAMES, np.zeros((4, 2)), np.array([[1, 0], [0, 0], [1, 0], [0, 0]], bool))
    record = measure_pipeline({"joint": (curve(1.0), one)}, seed=0, pairs=1, measured=1, out=tmp_path)
    assert record.arms[0].finds[1] is None and record.finding().reproduced is None
    assert tables(record)[1].rows[0][2] == NONE
    assert panels(record)[1].finding
