"""Shows an example before training, marking the tokens that count in the loss."""

from typing import Any

import numpy as np
from rich.text import Text

from qstar_jax.data.tokenization import Example

_LABELS = {1: (("response", "green"),), 2: (("chosen", "green"), ("rejected", "red"))}
_COLORS = ("green", "cyan", "yellow", "red")  # of the places of a ranking
# Escape control characters in the data, which a terminal would execute.
_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def preview(example: Example, tokenizer: Any) -> Text:
    """Decodes an example: a dim prompt, colored responses, visible EOS, and labels that do not rely on color.

    Returns:
        Styled text; the data is never interpreted as markup.
    """
    note = "; truncated at the beginning" if example.prompt_truncated else ""
    text = Text()
    text.append(f"prompt ({len(example.prompt)} tokens, not in the loss{note})\n", style="bold")
    text.append(_decode(example.prompt, tokenizer), style="dim")
    responses = [response for response in example.responses if len(response.ids)]
    places = [(f"place {place + 1}", _COLORS[min(place, 3)]) for place in range(len(responses))]
    labels = places if len(example.responses) > 2 else _LABELS.get(len(responses), ())
    for (name, color), response in zip(labels, responses, strict=True):
        note = "; truncated at the end, without EOS" if response.truncated else ""
        text.append(f"\n\n{name} ({len(response.ids)} tokens, in the loss{note})\n", style="bold")
        body = response.ids if response.truncated else response.ids[:-1]
        text.append(_decode(body, tokenizer), style=color)
        text.append(_decode(response.ids[len(body) :], tokenizer), style=f"{color} reverse")
    for name, value in example.outcome.items():
        text.append(f"\n{name}: {np.array2string(value, precision=3)}", style="bold")
    return text


def _decode(ids: Any, tokenizer: Any) -> str:
    text = tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text.translate(_ESCAPES)
