"""Panels are legible where they are shown."""

from itertools import pairwise

import pytest

from qstar_jax.report.colours import contrast
from qstar_jax.report.insights import view_of
from qstar_jax.report.panel import STYLES, WIDTH, as_svg, panel_figure, sheet_figure


@pytest.fixture(scope="module")
def panels(credit, sweep, decline) -> list:
    """All panels of all insights."""
    return [panel for record in (credit, sweep, decline) for panel in view_of(record).panels(record)]


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


def test_panels_fit_a_phone(panels):
    for panel in panels:
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


def test_files_are_the_same_each_time_and_need_no_fonts(panels):
    one, other = (as_svg(panel_figure(panels[2], "light")) for _ in range(2))
    assert one == other and b"<text" not in one and b"font-family" not in one


def test_nothing_to_draw_is_refused():
    with pytest.raises(ValueError, match="nothing to draw"):
        sheet_figure([], "light")
