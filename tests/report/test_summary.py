"""Findings on a terminal of 80 columns without colour."""

from dataclasses import replace

from qstar_jax.report.summary import print_findings


def test_findings_say_whether_in_words(findings, printed):
    text = printed(print_findings, findings)
    for words in ("find the wrong tokens: reproduced", "for reward: not reproduced", "after SFT: cannot be told"):
        assert words in text
    assert '<script>alert("x")</script>⟨U+202E⟩' in text and "\x1b" not in text


def test_markup_is_text(findings, printed):
    text = printed(print_findings, [replace(findings[0], measured="[red]0.8[/red] [0.7, 0.9]")], force_terminal=True)
    assert "[red]0.8[/red] [0.7, 0.9]" in text
