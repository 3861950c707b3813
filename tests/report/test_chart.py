"""The line of rewards so far."""

import math

from qstar_jax.report.chart import chart_bounds, chart_points, chart_ticks


def test_responses_of_a_row_share_a_frame_that_holds_zero():
    bounds = chart_bounds([[1.0, 3.0], [0.5, -1.0, 0.0, 0.0]])
    assert (bounds.length, bounds.low, bounds.high) == (4, -1.0, 3.0)
    assert chart_points([1.0, 3.0], bounds) == "0,75 250,50 500,0"
    assert chart_bounds([[2.0]]).low == 0.0


def test_ticks_are_the_edges_far_from_zero():
    assert chart_ticks(chart_bounds([[1.0, -3.0]])) == [0.0, -3.0, 1.0]
    assert chart_ticks(chart_bounds([[0.1, -3.0]])) == [0.0, -3.0]


def test_flat_empty_and_broken_lines():
    assert chart_points([0.0], chart_bounds([[0.0]])) == "0,0 1000,0"
    assert chart_points([], chart_bounds([[]])) == "0,0"
    assert chart_points([1.0, math.nan, 2.0], chart_bounds([[1.0, math.nan, 2.0]])) == "0,100 333.3,50"
