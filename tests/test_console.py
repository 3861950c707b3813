"""Messages, progress, and text of a model on the terminal."""

import io

import pytest
from rich.console import Console

from qstar_jax.console import Bar, one_line, say, shorten_middle, track, visible


def test_control_and_bidi_characters_are_shown():
    assert visible("a\x1b[31mb\r\u202ec\ufeff\u2028\x7f") == "a␛[31mb␍⟨U+202E⟩c⟨U+FEFF⟩⟨U+2028⟩⟨U+007F⟩"


def test_ordinary_text_stays_as_it_is():
    text = "naïve 👩\u200d👧 你好 مرحبا\n\tx  y"
    assert visible(text) == text


def test_one_line_has_no_line_breaks():
    assert one_line("a\n\tb") == "a↵⇥b"


def test_shortening_keeps_both_ends():
    assert shorten_middle("abcdefghij", 10) == "abcdefghij"
    assert shorten_middle("abcdefghij" * 4, 5) == "abc […35 characters…] ij"
    assert shorten_middle("abcdefghij", 5) == "abcdefghij"  # the note would be longer than what it replaces
    assert shorten_middle("abcdefghij" * 4, 0) == " […40 characters…] "


def console(terminal):
    return Console(file=io.StringIO(), force_terminal=terminal, width=120)


def test_messages_are_printed_as_they_are():
    out = console(terminal=False)
    say(out, "[red]path/" + "x" * 100)
    assert out.file.getvalue() == "[red]path/" + "x" * 100 + "\n"
    say(None, "nobody reads this")


def test_a_bar_counts_items_and_shows_a_note():
    out = console(terminal=True)
    with Bar(out, "generating", total=4, done=1) as bar:
        bar.update(2, "3.0 tokens/s")
    assert "generating" in (text := out.file.getvalue()) and "2/4" in text and "3.0 tokens/s" in text


def test_a_bar_is_named_after_a_file_that_may_have_any_name():
    out = console(terminal=True)
    with Bar(out, "reading [red]\x1b[2J\u202e", total=1) as bar:
        list(bar.track("a", "[/red]\x07", total=1))
    assert "reading [red]␛[2J⟨U+202E⟩" in (text := out.file.getvalue()) and "[/red]␇" in text
    assert not {"\x1b[2J", "\u202e", "\x07"} & {text[i : i + n] for n in (1, 4) for i in range(len(text))}


@pytest.mark.parametrize("terminal", [True, False])
def test_tracked_items_come_through_and_without_a_terminal_nothing_is_shown(terminal):
    out = console(terminal)
    assert list(track(out, "abc", "letters", total=3)) == ["a", "b", "c"]
    assert ("3/3" in out.file.getvalue()) == terminal
    assert list(track(None, "abc", "letters", total=3)) == ["a", "b", "c"]
