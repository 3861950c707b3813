"""Regular expressions that options and files name: what is none, or finds no end in some text, is refused by name."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import regex

from qstar_jax.errors import InputError

T = TypeVar("T")

MAX_SECONDS = 5.0  # of processor time for one text; an ordinary pattern takes microseconds for a response
_MAX_REPEATS = 1_000_000  # regex writes out (a{1000}){1000}, which takes half a gigabyte


@dataclass(frozen=True)
class Pattern:
    """A regular expression, and what names it.

    Attributes:
        compiled: The expression.
        name: The option or the file with the expression, for errors.
    """

    compiled: regex.Pattern[str]
    name: str

    @classmethod
    def compile(cls, expression: str, name: str, flags: int = 0) -> "Pattern":
        """Compiles an expression.

        Raises:
            InputError: If it is none, or would take gigabytes.
        """
        counts = [max(map(int, re.findall(r"\d+", count))) for count in re.findall(r"\{[\d, ]*\d[\d, ]*\}", expression)]
        if (repeats := math.prod(counts)) > _MAX_REPEATS:
            raise InputError(f"{name}: {repeats:,} repeats in all; expected at most {_MAX_REPEATS:,}")
        try:
            return cls(regex.compile(expression, flags), name)
        except regex.error as error:
            raise InputError(f"{name}: no regular expression ({error})") from error
        except RecursionError as error:
            raise InputError(f"{name}: no regular expression (nested too deeply)") from error

    def find(self, text: str) -> list[regex.Match[str]]:
        """Finds all matches in a text, from left to right.

        Raises:
            InputError: If there is no end to it: the time of a repeat inside a repeat, such as (a|aa)+, can double
                with every character.
        """
        return self._within_limit(lambda timeout: list(self.compiled.finditer(text, timeout=timeout)), text)

    def match(self, text: str, *, whole: bool = False) -> regex.Match[str] | None:
        """Matches a text from its beginning, and up to its end if `whole`.

        Raises:
            InputError: As for `find`.
        """
        match = self.compiled.fullmatch if whole else self.compiled.match
        return self._within_limit(lambda timeout: match(text, timeout=timeout), text)

    def _within_limit(self, search: Callable[[float], T], text: str) -> T:
        try:
            return search(MAX_SECONDS)
        except TimeoutError as error:
            raise InputError(
                f"{self.name}: still searching after {MAX_SECONDS:g} s in a text of {len(text)} characters, "
                f"{text[:40]!r}...; write it without a repeat of what can match in several ways, such as (a|aa)+"
            ) from error
