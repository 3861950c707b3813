"""The views of decline."""

from dataclasses import replace

import pytest

from qstar_jax.report.insights.decline import facts, panels, print_decline, tables
from qstar_jax.report.numbers import MINUS, NONE
from qstar_jax.report.panel import panel_figure, sheet_figure


def test_runs_share_a_scale_and_bands_are_two_errors(decline):
    axes = sheet_figure(panels(decline), "light").axes
    assert len({a.get_ylim() for a in axes}) == 1
    with_sft = {line.get_label(): list(line.get_ydata()) for line in axes[0].lines}
    assert with_sft["chosen responses"][-1] == -0.85
    assert with_sft[f"reference's own responses: {MINUS}β KL(π_ref ‖ π)"][-1] == -0.9
    assert axes[0].collections[0].get_paths()[0].vertices[:, 1].min() == pytest.approx(-0.85 - 2 * 0.08)
    assert not axes[2].collections and len(axes[2].lines) == 4  # no errors, no samples of the reference


def test_captions_say_whether_rewards_fall_beyond_noise(decline):
    assert [panel.finding for panel in panels(decline)] == [
        f"Rewards of chosen responses fall to {MINUS}0.85 ± 0.16.",
        "Rewards of chosen responses rise to +0.42 ± 0.16.",
        "Rewards of chosen responses end at +0.10.",  # no errors were logged
    ]
    run = decline.runs[0]
    noisy = replace(run, stderr={"chosen": [0.5] * len(run.steps)})
    (panel,) = panels(replace(decline, runs=(noisy,)))
    assert panel.finding == f"Rewards of chosen responses neither rise nor fall beyond noise: {MINUS}0.85 ± 1.00."


def test_gaps_are_left_where_nothing_was_measured(decline):
    run = decline.runs[0]
    reference = [*run.curves["reference"][:3], None, *run.curves["reference"][4:]]
    lean = replace(decline, runs=(replace(run, stderr={}, curves=run.curves | {"reference": reference}),))
    (panel,) = panels(lean)
    panel_figure(panel, "light")
    assert f"from +0.00 to {MINUS}0.90" in panel.alt
    (table,) = tables(lean, most=100)
    assert [row[-1] for row in table.rows[2:5]] == [f"{MINUS}0.11", NONE, f"{MINUS}0.23"]


def test_a_run_without_a_verdict_says_so(decline, printed):
    silent = replace(decline, runs=(replace(decline.runs[0], verdict=""),))
    assert "no verdict" in facts(silent)[0] and "fell" not in printed(print_decline, silent)


def test_decline_ends_with_the_verdict(decline, printed):
    text = printed(print_decline, decline)
    assert text.count("rewards of chosen answers fell") == 3
    assert f"{MINUS}0.85 ± 0.08" in text and text.count("step") == 3
