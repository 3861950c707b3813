"""The text of each token."""

from collections.abc import Sequence
from functools import partial
from typing import Protocol

_UNFINISHED = "\ufffd"
_LONGEST_CHARACTER = 4  # bytes of UTF-8, so no character takes more tokens


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is used here."""

    def decode(self, token_ids: list[int], **options: bool) -> str:
        """Spells token ids as text."""
        ...


def token_pieces(ids: Sequence[int], tokenizer: Tokenizer) -> tuple[str, ...]:
    """Finds the text of each token, special tokens included.

    A token may hold only part of a character; the token that completes the character then carries all of it. Short
    windows are decoded: a token alone would lose its leading space in some tokenizers, and decoding every prefix would
    take quadratic time.

    Returns:
        One piece per id; joined, they are exactly the decoded text.
    """
    spell = partial(_spell, tokenizer)
    ends: list[int] = []
    window = fresh = 0  # the window begins with tokens before `fresh`, already spelled, as context
    offset = 0  # where the window's text begins in the whole text
    for position in range(len(ids)):
        spelled = spell(ids[window : position + 1])
        settled = spelled.rstrip(_UNFINISHED)
        ends.append(max(offset + len(settled), ends[-1] if ends else 0))
        # Bytes that never complete a character must not let the window grow forever.
        if settled == spelled or position - fresh >= _LONGEST_CHARACTER:
            window, fresh = fresh, position + 1
            offset += len(spelled) - len(spell(ids[window:fresh]))
    text = spell(ids)
    starts = [0, *ends[:-1]] if ends else []
    return tuple(text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=False))


def lone_piece(token_id: int, tokenizer: Tokenizer) -> str:
    """Finds the text of a token on its own, with its leading space.

    It is read after another token, here itself: some tokenizers strip the space from the first token of a text.
    """
    return _spell(tokenizer, [token_id, token_id])[len(_spell(tokenizer, [token_id])) :]


def _spell(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    return tokenizer.decode([int(token) for token in tokens], **options)
