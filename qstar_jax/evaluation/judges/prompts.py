"""What a language model is asked when it judges, and how its reply is read.

The built-in questions have the structure of the ones in the paper's appendix (TL;DR) and in the DPO paper (HH): first
one sentence of comparison, then, on a new line, a letter.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qstar_jax.errors import InputError

FIELDS = ("prompt", "a", "b")

TLDR = """\
Which of the two summaries below does better at summarizing the most important points of the forum post?

Post:
{prompt}

Summary A:
{a}

Summary B:
{b}

FIRST write one sentence that compares the two summaries and says which one you prefer and why. SECOND, on a new line, \
write only "A" or "B" for your choice. Use this format:
Comparison: <one sentence of comparison, with the reason>
Preferred: <"A" or "B">"""

HH = """\
Which of the two responses below is more helpful to the person who sent this query to a chatbot?

Query:
{prompt}

Response A:
{a}

Response B:
{b}

FIRST write one sentence that compares the two responses and says which one you find more helpful and why. SECOND, on \
a new line, write only "A" or "B" for the more helpful one. Use this format:
Comparison: <one sentence of comparison, with the reason>
More helpful: <"A" or "B">"""

_OPENING, _CLOSING = r"""[\s*_>#"'`(<\[-]*""", r"""[\s*_"'`)>\].]*"""


@dataclass(frozen=True)
class Template:
    """A question to the judge.

    Args:
        name: What the user calls it.
        text: The question, with {prompt}, {a} and {b}; other braces are text.
        label: What stands before the letter in a reply, as in "Preferred: A"; None: anything short.
    """

    name: str
    text: str
    label: str | None

    def render(self, prompt: str, a: str, b: str) -> str:
        """Fills the fields in; white space around them is dropped, as it would tell the responses apart."""
        values = dict(zip(FIELDS, (prompt.strip(), a.strip(), b.strip()), strict=True))
        # In one pass: what a post or a response has in braces is not filled in again.
        return re.sub(r"\{(prompt|a|b)\}", lambda match: values[match[1]], self.text)

    def parse(self, reply: str) -> Literal["A", "B"] | None:
        """Reads the letter out of a reply.

        Returns:
            The letter of the lines "label: letter", or else of a last line that is nothing but a letter. None where
            there is no such line, or they contradict each other. The letter must end its line: "Preferred: A or B" and
            "Preferred: A clear summary" are no decisions.
        """
        label = r"[^:\n]{1,40}?" if self.label is None else re.escape(self.label)
        labelled = rf"{_OPENING}(?i:{label}){_CLOSING}:{_OPENING}(?i:(?:summary|response|answer)\s+)?([AB]){_CLOSING}"
        lines = [line for line in reply.splitlines() if line.strip()]
        letters = {match[1] for line in lines if (match := re.fullmatch(labelled, line))}
        if not letters and lines and (match := re.fullmatch(f"{_OPENING}([AB]){_CLOSING}", lines[-1])):
            letters = {match[1]}
        return letters.pop() if len(letters) == 1 else None

    @property
    def reminder(self) -> str:
        """What is said to a model whose reply has no letter; at temperature 0 the bare question would fail again."""
        label = f"{self.label}: " if self.label else ""
        return f'Your reply does not end as asked. Write one line only, either {label}"A" or {label}"B".'


TEMPLATES = {"tldr": Template("tldr", TLDR, "Preferred"), "hh": Template("hh", HH, "More helpful")}


def load_template(name: str) -> Template:
    """Finds a question by its name, or reads it from the user's file.

    Args:
        name: `tldr`, `hh`, or the path of a text file with {prompt}, {a} and {b}.

    Raises:
        InputError: If there is no such file, or a field is missing in it.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    path = Path(name).expanduser()
    if not path.is_file():
        raise InputError(
            f"judge.prompt {name!r}: expected {', '.join(TEMPLATES)} or a text file with {{prompt}}, {{a}} and {{b}} "
            "(found: no such file)"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"judge.prompt {path}: not a readable text file in UTF-8 ({error})") from error
    missing = [f"{{{field}}}" for field in FIELDS if f"{{{field}}}" not in text]
    if missing:
        raise InputError(
            f"judge.prompt {path}: no {' and no '.join(missing)} in it; the prompt goes where {{prompt}} stands, the "
            "two responses where {a} and {b} stand"
        )
    return Template(str(path), text, None)
