"""Regular expressions that options name: what is none, or finds no end in some text, is refused by name."""

from dataclasses import dataclass

import regex

from qstar_jax.errors import InputError

MAX_SECONDS = 5.0  # of processor time for one text; an ordinary pattern takes microseconds for a response


@dataclass(frozen=True)
class Pattern:
    """A regular expression, and the option that names it.

    Attributes:
        compiled: The expression.
        name: The option with its value, for errors.
    """

    compiled: regex.Pattern[str]
    name: str

    @classmethod
    def compile(cls, expression: str, name: str, flags: int = 0) -> "Pattern":
        """Compiles an expression.

        Raises:
            InputError: If it is none.
        """
        try:
            return cls(regex.compile(expression, flags), name)
        except regex.error as error:
            raise InputError(f"{name}: no regular expression ({error})") from error

    def find(self, text: str) -> list[regex.Match[str]]:
        """Finds all matches in a text, from left to right.

        Raises:
            InputError: If there is no end to it: the time of a repeat inside a repeat, such as (a|aa)+, can double
                with every character.
        """
        try:
            return list(self.compiled.finditer(text, timeout=MAX_SECONDS))
        except TimeoutError as error:
            raise InputError(
                f"{self.name}: still searching after {MAX_SECONDS:g} s in a text of {len(text)} characters, "
                f"{text[:40]!r}...; write it without a repeat of what can match in several ways, such as (a|aa)+"
            ) from error
