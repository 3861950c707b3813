"""The figures hold the numbers of their records, and are legible where they are shown."""

import copy
from itertools import pairwise

import pytest
from matplotlib.image import imread

from qstar_jax.report.colours import contrast
from qstar_jax.report.figures import (
    PANELS,
    as_svg,
    credit_figure,
    decline_figure,
    panel_figure,
    sweep_figure,
    write_figures,
)
from qstar_jax.report.figures.panel import STYLES, WIDTH

MINUS = "\N{MINUS SIGN}"


@pytest.fixture(scope="module")
def records(credit, sweep, decline) -> dict:
    return {"credit": credit, "sweep": sweep, "decline": decline}


def all_panels(records):
    return [panel for name, record in records.items() for panel in PANELS[name](record)]


def test_points_of_credit_are_the_records(credit):
    detectors, gains = credit_figure(credit).axes
    (chance,) = [line for line in detectors.lines if line.get_label() == "chance"]
    assert chance.get_xdata() == [0.5, 0.5]
    drawn = {box.get_label(): list(box.lines[0].get_xdata()) for box in detectors.containers}
    assert drawn["implicit reward"] == [0.83, 0.91, 0.84, 0.78, 0.62]
    assert drawn["true advantage"] == [0.95] * 5
    labels = [text.get_text().replace("\n", "") for text in detectors.get_yticklabels()]
    assert labels[:2] == ["all errors", "wrong number"] and "⟨U+202E⟩" in labels[4].replace(" ", "")
    assert list(gains.containers[0].lines[0].get_xdata()) == [0.162, 0.321]


def test_no_ceiling_and_no_kinds_are_no_fault(credit):
    lean = copy.deepcopy(credit) | {"kinds": {}, "differences": {}}
    del lean["detectors"]["true advantage"]
    (axes,) = credit_figure(lean, "dark").axes
    assert len(axes.containers) == 3


def test_widths_stand_in_order_and_controls_apart(sweep):
    axes = sweep_figure(sweep).axes
    assert [a.get_title() for a in axes] == [
        "Win rate against the preferred answer",
        "Length of answers",
        "Likelihood of answers",
        "Implicit reward of answers",
        "True reward of answers",
        "What width changes",
    ]
    assert [t.get_text() for t in axes[0].get_xticklabels()] == "sampled greedy 2 3 5 7 10 20".split()
    beams = [line for line in axes[0].lines if str(line.get_label()).startswith("beta")]
    assert [len(line.get_xdata()) for line in beams] == [6, 6, 6]
    assert beams[1].get_ydata()[2] == 0.59
    hollow = [line for line in axes[0].lines if line.get_markerfacecolor() == "none"]
    assert [len(line.get_xdata()) for line in hollow] == [2, 2, 2]
    assert all(line.get_linestyle() == "None" for line in hollow)


def test_what_nobody_measured_has_no_panel(sweep):
    lean = copy.deepcopy(sweep)
    for run in lean["runs"]:
        del run["differences"]
        for point in run["points"]:
            point["true_reward"] = point["implicit_reward"] = None
    assert [panel.title for panel in PANELS["sweep"](lean)] == [p.title for p in PANELS["sweep"](sweep)[:3]]


def test_runs_share_a_scale_and_bands_are_two_errors(decline):
    axes = decline_figure(decline).axes
    assert len({a.get_ylim() for a in axes}) == 1
    with_sft = {line.get_label(): list(line.get_ydata()) for line in axes[0].lines}
    assert with_sft["chosen answers"][-1] == -0.85
    assert with_sft[f"reference's own answers: {MINUS}β KL(π_ref ‖ π)"][-1] == -0.9
    assert axes[0].collections[0].get_paths()[0].vertices[:, 1].min() == pytest.approx(-0.85 - 2 * 0.08)
    assert not axes[2].collections and len(axes[2].lines) == 4  # no errors, no samples of the reference


def test_gaps_are_left_where_nothing_was_measured(decline):
    lean = {"runs": [copy.deepcopy(decline["runs"][0]) | {"stderr": None}]}
    lean["runs"][0]["curves"]["reference"][3] = None
    (panel,) = PANELS["decline"](lean)
    panel_figure(panel, "light")
    assert f"from +0.00 to {MINUS}0.90" in panel.alt


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_series_differ_without_colour_and_are_seen(theme):
    style = STYLES[theme]
    marks = [style.mark(number) for number in range(6)]
    for way in ("color", "marker", "linestyle"):
        assert len({str(mark[way]) for mark in marks}) == 6
    assert all(contrast(mark["color"], style.page) > 2.9 for mark in marks[:4])
    assert contrast(style.ink, style.page) > 7 and contrast(style.quiet, style.page) > 4.5


def shown_ticks(axes) -> list:
    low, high = axes.get_xlim()
    return [text for text in axes.get_xticklabels() if low <= text.get_position()[0] <= high and text.get_text()]


def test_panels_fit_a_telephone(records):
    for panel in all_panels(records):
        figure = panel_figure(panel, "dark")
        figure.draw_without_rendering()
        assert figure.get_size_inches()[0] == WIDTH <= 3.75  # 360 CSS pixels
        (axes,), frame = figure.axes, figure.bbox
        ticks = sorted((text.get_window_extent() for text in shown_ticks(axes)), key=lambda box: box.x0)
        assert all(one.x1 < other.x0 for one, other in pairwise(ticks)), panel.title
        texts = [axes.xaxis.label, axes.yaxis.label, *shown_ticks(axes)]
        texts += [text for legend in figure.legends for text in legend.get_texts()]
        for text in filter(lambda text: text.get_text(), texts):
            box, what = text.get_window_extent(), f"{panel.title}: {text.get_text()!r}"
            assert text.get_fontsize() >= 8, what
            assert frame.x0 - 1 <= box.x0 and box.x1 <= frame.x1 + 1, what
            assert frame.y0 - 1 <= box.y0 and box.y1 <= frame.y1 + 1, what


def test_words_say_what_pictures_show(records):
    alts = [panel.alt for panel in all_panels(records)]
    assert "reference log-probability 0.67" in alts[0]
    assert f"20 beams {MINUS} 5 beams, beta 0.05: {MINUS}0.21" in alts[7]
    assert not any("\u202e" in alt for alt in alts)


def test_files_are_the_same_each_time_and_need_no_fonts(sweep):
    panel = PANELS["sweep"](sweep)[0]
    one, other = (as_svg(panel_figure(panel, "light")) for _ in range(2))
    assert one == other and b"<text" not in one and b"font-family" not in one


def test_pictures_of_what_is_there(records, tmp_path):
    paths = write_figures(tmp_path / "new", credit=records["credit"], decline=records["decline"])
    assert [path.name for path in paths] == ["credit.png", "decline.png"]
    assert all(imread(path).shape[1] > 700 for path in paths)
    assert write_figures(tmp_path) == []


def test_nothing_to_draw_is_refused(decline):
    with pytest.raises(ValueError, match="nothing to draw"):
        decline_figure({"runs": []})
