"""Stop strings inside a compiled loop: an automaton a string, fed with tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from qstar_jax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StopStrings:
    """Which tokens complete which string: state s of a string means that its first s characters have just been said.

    Attributes:
        table: Next state of each string, state and token; a string's own length, or what lies behind it, once it is
            complete. Shape [N, states, V].
        lengths: Characters of each string. Shape [N].
    """

    table: Int[Array, "N S V"]
    lengths: Int[Array, " N"]

    @property
    def count(self) -> int:
        """How many strings."""
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
        strings: Strings; an answer ends with the token in which one of them becomes complete.
        tokenizer: Says what each token's text is.
        vocabulary: Tokens of the model.

    Returns:
        The automata, or None if there are no strings.

    Raises:
        InputError: If a string is empty, or no token of the vocabulary can take part in it.
    """
    if not strings:
        return None
    pieces = token_texts(tokenizer, vocabulary)
    tables = [_automaton(string, pieces) for string in strings]
    for string, table in zip(strings, tables, strict=True):
        if len(string) not in _reachable(table):
            raise InputError(f"stop string {string!r}: no sequence of the model's tokens spells it")
    states = max(len(table) for table in tables)
    padded = [np.pad(table, ((0, states - len(table)), (0, 0)), mode="edge") for table in tables]
    return StopStrings(jnp.asarray(np.stack(padded)), jnp.array([len(string) for string in strings]))


def token_texts(tokenizer: "PreTrainedTokenizerBase", vocabulary: int) -> list[str]:
    """The text that each token adds behind another one; a token that is part of a character has the text U+FFFD."""
    anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
    before = tokenizer.decode(anchor, clean_up_tokenization_spaces=False)
    known = min(vocabulary, len(tokenizer))
    texts = tokenizer.batch_decode([[*anchor, token] for token in range(known)], clean_up_tokenization_spaces=False)
    return [text[len(before) :] for text in texts] + [""] * (vocabulary - known)


def _reachable(table: np.ndarray) -> set[int]:
    """States that tokens can lead to."""
    reached, new = set(), {0}
    while new:
        reached |= new
        new = set(np.unique(table[sorted(new)]).tolist()) - reached
    return reached


def _automaton(string: str, pieces: list[str]) -> np.ndarray:
    """Knuth, Morris and Pratt's automaton, run over whole tokens. Shape [characters + 1, V]."""
    if not string:
        raise InputError("a stop string is not empty")
    size = len(string)
    borders = [0] * (size + 1)  # longest proper border of each prefix

    def follow(state: int, character: str) -> int:
        while state and (state == size or string[state] != character):
            state = borders[state]
        return state + 1 if string[state] == character else 0

    for end in range(2, size + 1):
        borders[end] = follow(borders[end - 1], string[end - 1])
    table = np.zeros((size + 1, len(pieces)), np.int16 if size < 2**15 else np.int32)
    table[size] = size
    interesting = set(string)
    for token, piece in enumerate(pieces):
        if not piece:
            table[:size, token] = np.arange(size)  # says nothing
        elif interesting & set(piece):
            for start in range(size):
                state = start
                for character in piece:
                    state = follow(state, character)
                    if state == size:
                        break
                table[start, token] = state
    return table
