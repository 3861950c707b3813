"""Stop strings inside a compiled loop: one automaton per string, which reads the bytes of tokens.

It reads bytes because a token may be part of a character: characters that are rare in a tokenizer's training text (a
Chinese full stop, an accented letter, an emoji) are spelled by one token per byte.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from qstar_jax.decoding.token_bytes import SpelledTokens, automaton_of
from qstar_jax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StopStrings:
    """The automata of N stop strings: state s of a string means that the text ends with its first s bytes.

    Attributes:
        table: Next state of each string, state and token; once a string is complete, the state is its length. Higher
            states are those inside a character that does not belong to the string. Shape [N, states, V].
        lengths: Bytes of each string. Shape [N].
    """

    table: Int[Array, "N S V"]
    lengths: Int[Array, " N"]

    @property
    def count(self) -> int:
        """Number of strings."""
        return self.table.shape[0]

    def advance(self, state: Int[Array, "B K N"], token: Int[Array, "B K"]) -> Int[Array, "B K N"]:
        """States after a token."""
        return self.table[jnp.arange(self.count), state, token[..., None]].astype(jnp.int32)

    def completes(self, state: Int[Array, "B K N"]) -> Bool[Array, "B K V"]:
        """Whether a token completes one of the strings. Shape [B, K, V]."""
        after = self.table[jnp.arange(self.count), state]
        return (after == self.lengths[:, None]).any(-2)


def compile_stop_strings(
    strings: Sequence[str], tokenizer: "PreTrainedTokenizerBase", vocabulary: int
) -> StopStrings | None:
    """Prepares stop strings for a model.

    Args:
        strings: Strings; a response ends with the token that completes one of them.
        tokenizer: The model's tokenizer.
        vocabulary: Number of tokens of the model.

    Returns:
        The automata, or None if there are no strings.

    Raises:
        InputError: If a string is empty, is no valid text, or cannot be spelled by tokens.
    """
    if not strings:
        return None
    encoded = [_encoded(string) for string in strings]
    names = tokenizer.convert_ids_to_tokens(list(range(min(vocabulary, len(tokenizer)))))
    tokens = SpelledTokens.of(token_texts(tokenizer, vocabulary), names)
    tables = [tokens.run(automaton_of(string)) for string in encoded]
    reached = [_reachable(table) for table in tables]
    for string, size, states in zip(strings, map(len, encoded), reached, strict=True):
        if size not in states:
            raise InputError(f"stop string {string!r}: no sequence of the model's tokens spells it")
    tables = [table[: max(states) + 1] for table, states in zip(tables, reached, strict=True)]
    states = max(len(table) for table in tables)
    padded = [np.pad(table, ((0, states - len(table)), (0, 0)), mode="edge") for table in tables]
    return StopStrings(jnp.asarray(np.stack(padded)), jnp.array([len(string) for string in encoded]))


def text_before_stop(strings: Sequence[str], tokens: Sequence[int], tokenizer: "PreTrainedTokenizerBase") -> str:
    """Returns the text of a response up to its stop string.

    Args:
        strings: The strings; one of them is complete in the last token.
        tokens: The response's tokens. The text of special tokens may be part of the string, but not of the result.
        tokenizer: Their tokenizer.
    """
    special = set(tokenizer.all_special_ids)
    edges = [at + part for at, token in enumerate(tokens) if token in special for part in (0, 1)]
    whole, *parts = texts_behind(tokenizer, [tokens, *(tokens[:edge] for edge in edges)])
    begins = min((at for at in map(whole.find, strings) if at >= 0), default=len(whole))
    lengths = [max(len(part), begins) for part in parts]
    special_characters = sum(lengths[1::2]) - sum(lengths[::2])  # from the stop string on
    text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text[: max(len(text) - (len(whole) - begins - special_characters), 0)]


def token_texts(tokenizer: "PreTrainedTokenizerBase", vocabulary: int) -> list[str]:
    """The text that each token adds after another one; U+FFFD for a token that is part of a character."""
    known = min(vocabulary, len(tokenizer))
    return texts_behind(tokenizer, [[token] for token in range(known)]) + [""] * (vocabulary - known)


def texts_behind(tokenizer: "PreTrainedTokenizerBase", several: Sequence[Sequence[int]]) -> list[str]:
    """The text of sequences of tokens after other text, special tokens included."""
    anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
    before = tokenizer.decode(anchor, clean_up_tokenization_spaces=False)
    texts = tokenizer.batch_decode([[*anchor, *tokens] for tokens in several], clean_up_tokenization_spaces=False)
    return [text[len(before) :] for text in texts]


def _encoded(string: str) -> bytes:
    if not string:
        raise InputError("stop string '': expected at least one character")
    try:
        return string.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"stop string {string!r}: not valid text, as it has half of a surrogate pair") from None


def _reachable(table: np.ndarray) -> set[int]:
    """States that tokens can lead to."""
    reached, new = set(), {0}
    while new:
        reached |= new
        new = set(np.unique(table[sorted(new)]).tolist()) - reached
    return reached
