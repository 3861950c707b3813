"""Templates: how the prompt of a stage is made from the user's prompt and from what the stages before it wrote."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from string import Formatter

from qstar_jax.errors import InputError

PROMPT = "prompt"  # the name of the user's prompt in templates


@dataclass(frozen=True)
class Template:
    """Text with names of earlier texts in braces.

    Attributes:
        text: The template; `{{` and `}}` stand for braces.
    """

    text: str

    @property
    def names(self) -> tuple[str, ...]:
        """The names in it, in order."""
        return tuple(name for _, name, _, _ in Formatter().parse(self.text) if name is not None)

    def check(self, known: Collection[str], where: str):
        """Refuses a template that cannot be filled in, or that reads nothing.

        Args:
            known: Names of earlier texts.
            where: The option that sets it, for the error.

        Raises:
            InputError: If it names another text, or none, or asks for a format.
        """
        expected = ", ".join(f"{{{name}}}" for name in known)
        try:
            parts = list(Formatter().parse(self.text))
        except ValueError as error:
            raise InputError(f"{where} {self.text!r}: {error}; write {{{{ and }}}} for braces") from error
        for _, name, spec, conversion in parts:
            if name is not None and (spec or conversion or name not in known):
                raise InputError(
                    f"{where} {self.text!r}: {{{name}}} is no text that comes before; expected {expected}, without a "
                    "format, and {{ and }} for braces"
                )
        if not self.names:
            raise InputError(f"{where} {self.text!r} reads none of the texts before it; put in {expected}")

    def fill(self, texts: Mapping[str, str]) -> str:
        """Fills in earlier texts, which are not read as templates themselves."""
        parts = Formatter().parse(self.text)
        return "".join(literal + ("" if name is None else texts[name]) for literal, name, _, _ in parts)
