"""Text that hides or commands is shown."""

from qstar_jax.console import one_line, shorten_middle, visible


def test_control_and_bidi_characters_are_shown():
    assert visible("a\x1b[31mb\r\u202ec\ufeff\u2028\x7f") == "a␛[31mb␍⟨U+202E⟩c⟨U+FEFF⟩⟨U+2028⟩⟨U+007F⟩"


def test_ordinary_text_stays_as_it_is():
    text = "naïve 👩\u200d👧 你好 مرحبا\n\tx  y"
    assert visible(text) == text


def test_one_line_has_no_line_breaks():
    assert one_line("a\n\tb") == "a↵⇥b"


def test_shortening_keeps_both_ends():
    assert shorten_middle("abcdefghij", 10) == "abcdefghij"
    assert shorten_middle("abcdefghij", 5) == "abc […5 characters…] ij"
    assert shorten_middle("abcdefghij", 0) == " […10 characters…] "
