"""The views of a sweep."""

import io
from dataclasses import replace

from rich.console import Console

from qstar_jax.evaluation.intervals import Interval
from qstar_jax.report.insights.sweep import facts, panels, print_sweep, tables
from qstar_jax.report.numbers import MINUS, NONE
from qstar_jax.report.panel import sheet_figure


def test_widths_stand_in_order_and_controls_apart(sweep):
    axes = sheet_figure(panels(sweep), "light").axes
    assert [panel.title for panel in panels(sweep)] == [
        "Win rate against the preferred response",
        "Length of responses",
        "Likelihood of responses",
        "Implicit reward of responses",
        "True reward of responses",
        "What width changes",
    ]
    assert [t.get_text() for t in axes[0].get_xticklabels()] == "sampled greedy 2 3 5 7 10 20".split()
    beams = [line for line in axes[0].lines if str(line.get_label()).startswith("beta")]
    assert [len(line.get_xdata()) for line in beams] == [6, 6, 6]
    assert beams[1].get_ydata()[2] == 0.59
    hollow = [line for line in axes[0].lines if line.get_markerfacecolor() == "none"]
    assert [len(line.get_xdata()) for line in hollow] == [2, 2, 2]
    assert all(line.get_linestyle() == "None" for line in hollow)


def test_captions_say_what_width_does_or_that_it_does_nothing(sweep):
    found = {panel.title: panel.finding for panel in panels(sweep)}
    assert found["Win rate against the preferred response"] == (
        "beta 0.05: most wins with 5 beams: 0.54 (greedy 0.39, 20 beams 0.38)."
    )
    assert found["Length of responses"] == ("beta 0.05: from greedy to 20 beams, responses grow shorter: 59.9 to 35.3.")
    assert found["What width changes"] == "beta 0.05: 5 beams beat sampled and greedy; 20 beams lose to 5 beams."
    # One run needs no name; what lies within the intervals is no change.
    points = tuple(replace(p, length=sweep.runs[0].points[0].length) for p in sweep.runs[0].points)
    differences = {"5 beams - greedy": Interval(0.01, -0.02, 0.04)}
    alone = replace(sweep, runs=(replace(sweep.runs[0], points=points, differences=differences),))
    found = {panel.title: panel.finding for panel in panels(alone)}
    assert found["Length of responses"].endswith("responses keep their length: 64.0 to 64.0.")
    assert found["What width changes"] == "5 beams cannot be told from greedy."


def test_what_nobody_measured_has_no_panel(sweep):
    def lean(run):
        points = tuple(replace(point, true_reward=None, implicit_reward=None) for point in run.points)
        return replace(run, points=points, differences={})

    shown = panels(replace(sweep, runs=tuple(map(lean, sweep.runs))))
    assert [panel.title for panel in shown] == [panel.title for panel in panels(sweep)[:3]]


def test_what_the_judge_left_open_is_counted_and_shown_as_missing(sweep):
    first, *others = sweep.runs
    points = (replace(first.points[0], win_rate=None, undecided=256), *first.points[1:])
    first = replace(first, points=points, differences=first.differences | {"5 beams - sampled": None})
    open_sweep = replace(sweep, runs=(first, *others))
    assert any("256 responses on which the judge did not decide" in fact for fact in facts(open_sweep))
    by_run, *_ = tables(open_sweep)
    assert by_run.rows[0][:2] == ("sampled", NONE)
    differences = tables(open_sweep)[-1]
    assert differences.rows[0][:2] == (f"5 beams {MINUS} sampled", NONE)
    print_sweep(open_sweep, Console(file=io.StringIO()))


def test_numbers_of_the_sweep_stay_in_one_piece(sweep, printed):
    text = printed(print_sweep, sweep)
    for row in ("sampled 0.34 [0.30, 0.38] 64.0 -61.3 0.20", "20 beams - 5 beams beta 0.05 -0.21 [-0.26, -0.16]"):
        assert row in " ".join(text.split()).replace(MINUS, "-")


def test_narrow_terminals_fold_and_lose_nothing(sweep, printed):
    console = Console(file=io.StringIO(), width=60)
    print_sweep(sweep, console)
    text = console.file.getvalue()
    digits = [sum(letter.isdigit() for letter in part) for part in (text, printed(print_sweep, sweep))]
    assert digits[0] == digits[1] and "…" not in text
