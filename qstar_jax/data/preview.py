"""Shows an example before training, marking the tokens that count in the loss."""

from typing import Any

import numpy as np
from rich.text import Text

from qstar_jax.data.tokenization import Example

_LABELS = {1: (("response", "green"),), 2: (("chosen", "green"), ("rejected", "red"))}
_MISMATCHED = (("response", "green"), ("response to another prompt", "dim"))  # the second measures KTO's baseline
_COLORS = ("green", "cyan", "yellow", "red")  # of the places of a ranking
# Escape control characters in the data, which a terminal would execute.
_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def preview(example: Example, tokenizer: Any) -> Text:
    """Decodes an example: a dim prompt, colored actions, visible EOS, and labels that do not rely on color.

    What the environment says within a response is dim, between ⟨ and ⟩.

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
    labels = _MISMATCHED if example.outcome and len(responses) == 2 else labels
    for (name, color), response in zip(labels, responses, strict=True):
        note = "; truncated at the end, without EOS" if response.truncated else ""
        actions, total = response.num_actions, len(response.ids)
        size = f"{total} tokens" if actions == total else f"{actions} actions of {total} tokens"
        text.append(f"\n\n{name} ({size}, in the loss{note})\n", style="bold")
        body = total if response.truncated else total - 1
        for start, end in _runs(response.action_mask[:body]):
            said = _decode(response.ids[start:end], tokenizer)
            is_action = response.action_mask[start]
            text.append(said if is_action else f"⟨{said}⟩", style=color if is_action else "dim")
        text.append(_decode(response.ids[body:], tokenizer), style=f"{color} reverse")
    for name, value in example.outcome.items():
        text.append(f"\n{name}: {np.array2string(value, precision=3)}", style="bold")
    return text


def _runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """Returns the (start, end) of stretches where a mask stays the same."""
    ends = [*(np.flatnonzero(mask[1:] != mask[:-1]) + 1).tolist(), len(mask)]
    return [(start, end) for start, end in zip([0, *ends], ends, strict=False) if start < end]


def _decode(ids: Any, tokenizer: Any) -> str:
    text = tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text.translate(_ESCAPES)
