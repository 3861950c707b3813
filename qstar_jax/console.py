"""What the terminal shows: messages, progress, and model text made safe to look at."""

import unicodedata
from collections.abc import Iterable
from typing import TypeVar

from rich.console import Console
from rich.progress import track as rich_track

T = TypeVar("T")

_JOINERS = "\u200c\u200d"  # hold emoji and Indic letters together; harmless, and breaking them would spoil the text
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # control, format (bidi, zero width, tags), lone surrogate, separators


def say(console: Console, text: str):
    """Prints a message exactly as it is: no markup, no highlighting, no line breaks of its own.

    Args:
        console: Where to print.
        text: The message.
    """
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def track(console: Console, items: Iterable[T], description: str, total: int) -> Iterable[T]:
    """Shows a progress bar while items are consumed; nothing where there is no terminal.

    Args:
        console: Where to show it.
        items: What to iterate over.
        description: Label of the bar.
        total: How many items there are.

    Returns:
        An iterable over the same items.
    """
    return rich_track(items, description, total, console=console, disable=not console.is_terminal)


def visible(text: str) -> str:
    """Shows what would otherwise act or hide; newlines and tabs stay.

    Args:
        text: Any text of a model or a user.

    Returns:
        The text, with ESC as a control picture and such as U+202E (right-to-left override) spelled out.
    """
    return "".join(_show(character) for character in text)


def one_line(text: str) -> str:
    """Shows text on one line, for tables and labels.

    Args:
        text: Any text of a model or a user.

    Returns:
        `visible(text)` with newlines and tabs as signs.
    """
    return visible(text).replace("\n", "↵").replace("\t", "⇥")


def shorten_middle(text: str, limit: int) -> str:
    """Leaves out the middle of a long text: a prompt says most at its beginning and its end.

    Args:
        text: Any text.
        limit: Most characters to keep of it.

    Returns:
        The text itself, or its two ends around a note of how much is missing.
    """
    if len(text) <= limit:
        return text
    head, tail = limit - limit // 2, limit // 2
    return f"{text[:head]} […{len(text) - head - tail} characters…] {text[len(text) - tail :]}"


def _show(character: str) -> str:
    if character in "\n\t" or character in _JOINERS or unicodedata.category(character) not in _HIDDEN:
        return character
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)  # the block of control pictures
    return f"⟨U+{code:04X}⟩"
