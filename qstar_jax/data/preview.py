"""Shows an example before training, marking the tokens that count in the loss."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from rich.text import Text

from qstar_jax.console import visible
from qstar_jax.data.tokenization import Example, Response

_LABELS = {1: (("response", "green"),), 2: (("chosen", "green"), ("rejected", "red"))}
_MISMATCHED = (("response", "green"), ("response to another prompt", "dim"))  # the second measures KTO's baseline
_COLORS = ("green", "cyan", "yellow", "red")  # of the places of a ranking


def preview(example: Example, tokenizer: Any, *, of_steps: bool = False) -> Text:
    """Decodes an example: a dim prompt, colored actions, visible EOS, and labels that do not rely on color.

    What the environment says within a response is dim, between ⟨ and ⟩.

    Args:
        example: The example.
        tokenizer: Its tokenizer.
        of_steps: Whether its responses are single steps, which have no EOS that they could lose.

    Returns:
        Styled text; the data is never interpreted as markup.
    """
    note = "; truncated at the beginning" if example.prompt_truncated else ""
    text = Text()
    text.append(f"prompt ({_tokens(len(example.prompt))}, not in the loss{note})\n", style="bold")
    text.append(_decode(example.prompt, tokenizer), style="dim")
    responses = [response for response in example.responses if len(response.ids)]
    places = [(f"place {place + 1}", _COLORS[min(place, 3)]) for place in range(len(responses))]
    labels = places if len(example.responses) > 2 else _LABELS.get(len(responses), ())
    labels = _MISMATCHED if example.outcome and len(responses) == 2 else labels
    for (name, color), response in zip(labels, responses, strict=True):
        ending = "a step, without EOS" if of_steps else "truncated at the end, without EOS"
        note = f"; {ending}" if response.truncated else ""
        text.append(f"\n\n{name} ({_size(response)}, in the loss{note})\n", style="bold")
        for start, end, style in _stretches(response, color):
            said = _decode_after(example.prompt, response.ids[:start], response.ids[start:end], tokenizer)
            text.append(said if response.action_mask[start] else f"⟨{said}⟩", style=style)
    for name, value in example.outcome.items():
        text.append(f"\n{name}: {np.array2string(value, precision=3)}", style="bold")
    return text


def _size(response: Response) -> str:
    actions, total = response.num_actions, len(response.ids)
    if actions == total:
        return _tokens(total)
    turns = f"{response.num_turns} turn{'s' * (response.num_turns != 1)}"
    return f"{actions} actions of {total} tokens in {turns}"


def _tokens(count: int) -> str:
    return f"{count} token{'s' * (count != 1)}"


def _stretches(response: Response, color: str) -> Iterator[tuple[int, int, str]]:
    """Yields start, end and style of words, of ends of turns (in reverse), and of what the environment says (dim)."""
    turns, count = response.turns.tolist(), len(response.ids)
    last = turns[-1] if response.truncated else None  # a truncated turn has no end
    following = [*turns[1:], last]
    styles = [
        "dim" if turn < 0 else color if turn == after else f"{color} reverse"
        for turn, after in zip(turns, following, strict=True)
    ]
    starts = [i for i in range(count) if i == 0 or (styles[i], turns[i]) != (styles[i - 1], turns[i - 1])]
    for start, end in zip(starts, [*starts[1:], count], strict=True):
        yield start, end, styles[start]


def _decode(ids: Any, tokenizer: Any) -> str:
    text = tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return visible(text)


def _decode_after(prompt: np.ndarray, before: np.ndarray, ids: np.ndarray, tokenizer: Any) -> str:
    """Decodes tokens that follow others: on their own, some tokenizers strip the space before the first."""
    context = np.concatenate([prompt, before])
    known, whole = (_decode(tokens, tokenizer) for tokens in (context, np.concatenate([context, ids])))
    return whole[len(known) :] if whole.startswith(known) else _decode(ids, tokenizer)
