"""Shows an example before training, marking the tokens that count in the loss."""

from typing import Any

from rich.text import Text

from qstar_jax.data.tokenization import Example

_LABELS = {1: (("response", "green"),), 2: (("chosen", "green"), ("rejected", "red"))}
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
    for (name, color), response in zip(_LABELS.get(len(example.responses), ()), example.responses, strict=True):
        note = "; truncated at the end, without EOS" if response.truncated else ""
        text.append(f"\n\n{name} ({len(response.ids)} tokens, in the loss{note})\n", style="bold")
        body = response.ids if response.truncated else response.ids[:-1]
        text.append(_decode(body, tokenizer), style=color)
        text.append(_decode(response.ids[len(body) :], tokenizer), style=f"{color} reverse")
    return text


def _decode(ids: Any, tokenizer: Any) -> str:
    text = tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text.translate(_ESCAPES)
