"""An example as text with its mask, so that one sees before training which tokens count in the loss."""

from typing import Any

from rich.text import Text

from qstar_jax.data.tokenization import Example, Response

_ANSWERS = {1: (("answer", "green"),), 2: (("chosen", "green"), ("rejected", "red"))}
# Control characters of a data file are shown, as a terminal would obey them.
_VISIBLE = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def preview(example: Example, tokenizer: Any) -> Text:
    """Decodes an example: the prompt dim, the answers in colour, EOS visible, labels that also read without colour.

    Args:
        example: A prompt with one answer or with two (chosen, rejected).
        tokenizer: The tokenizer that made its ids.

    Returns:
        Styled text; what the data says is never taken for markup.
    """
    cut = "; truncated: its beginning is cut off" if example.prompt_truncated else ""
    text = Text()
    text.append(f"prompt ({len(example.prompt)} tokens, not in the loss{cut})\n", style="bold")
    text.append(_decode(example.prompt, tokenizer), style="dim")
    for (name, colour), response in zip(_ANSWERS.get(len(example.responses), ()), example.responses, strict=True):
        _append_answer(text, name, colour, response, tokenizer)
    return text


def _append_answer(text: Text, name: str, colour: str, response: Response, tokenizer: Any) -> None:
    cut = "; truncated: its end and EOS are cut off" if response.truncated else ""
    text.append(f"\n\n{name} ({len(response.ids)} tokens, in the loss{cut})\n", style="bold")
    body = response.ids if response.truncated else response.ids[:-1]
    text.append(_decode(body, tokenizer), style=colour)
    text.append(_decode(response.ids[len(body) :], tokenizer), style=f"{colour} reverse")


def _decode(ids: Any, tokenizer: Any) -> str:
    text = tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text.translate(_VISIBLE)
