"""What the terminal shows: messages, progress, and model text made safe to look at."""

import time
import unicodedata
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_JOINERS = "\u200c\u200d"  # hold emoji and Indic letters together; harmless, and breaking them would spoil the text
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # control, format (bidi, zero width, tags), lone surrogate, separators

T = TypeVar("T")


def say(console: Console | None, text: str):
    """Prints a message as it is: no markup, no highlighting, no line breaks of rich's own, nothing that acts or hides.

    Args:
        console: Where to print; None prints nothing.
        text: The message.
    """
    if console is not None:
        console.print(visible(text), markup=False, highlight=False, soft_wrap=True)


class Bar:
    """A progress bar, shown while it is entered as a context manager; without a terminal nothing is shown.

    Args:
        console: Where to show it.
        description: Label of the bar.
        total: How many items there are.
        done: How many of them are done already.
    """

    def __init__(self, console: Console, description: str, total: int, done: int = 0):
        label, note = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[note]}", markup=False)
        columns = (label, BarColumn(), MofNCompleteColumn(), note, TimeElapsedColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._progress.add_task(one_line(description), total=total, completed=done, note="")

    def __enter__(self) -> "Bar":
        """Shows the bar."""
        self._progress.start()
        return self

    def __exit__(self, *_):
        """Leaves the bar as it is."""
        self._progress.stop()

    def update(self, done: int, note: str = ""):
        """Moves the bar to `done` items, and shows `note` after the counts."""
        self._progress.update(self._task, completed=done, note=note)

    def track(self, items: Iterable[T], description: str, total: int) -> Iterator[T]:
        """Shows a second bar below this one while items are consumed; see `track`."""
        task = self._progress.add_task(one_line(description), total=total, note="")
        yield from self._progress.track(items, task_id=task)


def track(console: Console | None, items: Iterable[T], description: str, total: int, after: float = 0.0) -> Iterator[T]:
    """Shows a progress bar while items are consumed.

    Args:
        console: Where to show it; None shows nothing.
        items: What to iterate over.
        description: Label of the bar.
        total: How many items there are.
        after: Show nothing for so many seconds, and nothing at all if the items end sooner.

    Yields:
        The items.
    """
    if console is None:
        yield from items
        return
    done, start, items = 0, time.monotonic(), iter(items)
    while time.monotonic() - start < after:
        try:
            item = next(items)
        except StopIteration:
            return
        yield item
        done += 1
    with Bar(console, description, total, done) as bar:
        for item in items:
            yield item
            done += 1
            bar.update(done)


def visible(text: str) -> str:
    """Shows what would otherwise act or hide; newlines and tabs stay.

    Returns:
        The text, with ESC as a control picture and such as U+202E (right-to-left override) spelled out.
    """
    return "".join(_show(character) for character in text)


def one_line(text: str) -> str:
    """Shows text on one line, for tables and labels.

    Returns:
        `visible(text)` with newlines and tabs as signs.
    """
    return visible(text).replace("\n", "↵").replace("\t", "⇥")


def shorten_middle(text: str, limit: int) -> str:
    """Leaves out the middle of a long text: a prompt says most at its beginning and its end.

    Returns:
        The text itself, or its two ends around a note of how much is missing.
    """
    head, tail = limit - limit // 2, limit // 2
    shortened = f"{text[:head]} […{len(text) - head - tail} characters…] {text[len(text) - tail :]}"
    return text if len(text) <= max(limit, len(shortened)) else shortened


def _show(character: str) -> str:
    if character in "\n\t" or character in _JOINERS or unicodedata.category(character) not in _HIDDEN:
        return character
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)  # the block of control pictures
    return f"⟨U+{code:04X}⟩"
