"""What holds for the views of every insight."""

import io

from matplotlib.image import imread
from rich.console import Console

from qstar_jax.report.insights import show, view_of, write_figure
from qstar_jax.report.numbers import MINUS


def test_words_say_what_pictures_show(credit, sweep, decline):
    alts = [panel.alt for record in (credit, sweep, decline) for panel in view_of(record).panels(record)]
    assert "reference log-probability 0.67" in alts[0]
    assert f"20 beams {MINUS} 5 beams, beta 0.05: {MINUS}0.21" in alts[7]
    assert not any("\u202e" in alt for alt in alts)


def test_figures_are_named_after_their_record(credit, decline, tmp_path):
    paths = [write_figure(record, tmp_path / "new") for record in (credit, decline)]
    assert [path.name for path in paths] == ["credit.png", "decline.png"]
    assert all(imread(path).shape[1] > 700 for path in paths)


def test_a_record_is_printed_and_drawn(decline, tmp_path):
    console = Console(file=io.StringIO(), width=80)
    show(decline, tmp_path, console)
    assert "without SFT" in console.file.getvalue() and (tmp_path / "decline.png").is_file()
    assert console.file.getvalue().endswith(f"decline: {tmp_path / 'decline.json'}, {tmp_path / 'decline.png'}\n")
