"""Tokens as sequences of bytes, and automata that read them.

Tokenizers spell rare characters in two ways. Byte-level ones write every byte as a character of its own; bytes are put
together across tokens, whatever these are. Those with a byte fallback have tokens such as `<0x0A>`; a run of these is
decoded as characters if all of it is valid UTF-8, else as one U+FFFD per byte. So an automaton reads three kinds of
symbols: bytes of text (0 to 255), bytes of the fallback (256 more), and, where there is a fallback, `TEXT` before any
other token, which ends a run.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FALLBACK, TEXT = 256, 512
_SYMBOLS = 513
_PART = "\ufffd"  # what decoders write for bytes that are no character
_VISIBLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_HIDDEN = sorted(set(range(256)) - set(_VISIBLE))
# How byte-level tokenizers write bytes, since GPT-2: visible ones as they are, the others from U+0100 on.
_BYTE_OF = {chr(byte): byte for byte in _VISIBLE} | {chr(256 + i): byte for i, byte in enumerate(_HIDDEN)}

_AT_BOUNDARY, _INVALID = (), (0, 0, 0)  # of a run: between characters; or (bytes to come, bounds of the next of them)


@dataclass(frozen=True)
class SpelledTokens:
    """The symbols of every token of a vocabulary.

    Attributes:
        symbols: Symbols of the tokens in `order`, padded at their ends. Shape [V, longest].
        order: Tokens, longest first. Shape [V].
        lengths: Number of symbols of each of them. Shape [V].
    """

    symbols: np.ndarray
    order: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, texts: Sequence[str], names: Sequence[str]) -> "SpelledTokens":
        """Finds the symbols of all tokens.

        Args:
            texts: What each token adds to a decoded text; U+FFFD for a token that is part of a character.
            names: How the tokenizer itself writes them; for the first tokens, those that it knows.
        """
        fallback = [_fallback_byte(text, name) for text, name in zip(texts, names, strict=False)]
        before = [] if all(byte is None for byte in fallback) else [TEXT]
        spelled = [
            [*before, *_bytes_of(text, name)] if byte is None else [byte]
            for text, name, byte in zip(texts, names, fallback, strict=False)
        ]
        spelled += [[]] * (len(texts) - len(names))  # decoders drop what they do not know
        lengths = np.array([len(symbols) for symbols in spelled])
        order = np.argsort(-lengths, kind="stable")
        padded = np.zeros((len(spelled), lengths.max()), np.int16)
        for row, token in zip(padded, order, strict=True):
            row[: lengths[token]] = spelled[token]
        return cls(padded, order, lengths[order])

    def run(self, automaton: np.ndarray) -> np.ndarray:
        """Reads every token from every state.

        Args:
            automaton: Next state, by state and symbol. Shape [S, symbols].

        Returns:
            State after each token. Shape [S, V].
        """
        start = np.arange(len(automaton), dtype=automaton.dtype)
        state = np.repeat(start[:, None], len(self.order), axis=1)
        for at in range(self.symbols.shape[1]):
            count = np.searchsorted(-self.lengths, -at)  # tokens that are longer than this
            state[:, :count] = automaton[state[:, :count], self.symbols[:count, at]]
        after = np.empty_like(state)
        after[:, self.order] = state
        return after


def _fallback_byte(text: str, name: str) -> int | None:
    """The symbol of a token that stands for a byte; None if it does not."""
    match = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", name or "")
    return FALLBACK + int(match[1], 16) if match and text != name else None


def _bytes_of(text: str, name: str) -> list[int]:
    """The bytes of a token that is no byte of a fallback."""
    if _PART in text and name and all(character in _BYTE_OF for character in name):
        return [_BYTE_OF[character] for character in name]
    return list(text.encode("utf-8"))


def automaton_of(string: bytes) -> np.ndarray:
    """Makes the Knuth-Morris-Pratt automaton of a string of whole characters, for all symbols.

    Args:
        string: The string in UTF-8; not empty.

    Returns:
        Next state, by state and symbol, shape [S, symbols]. State s up to the string's length means that the text
        ends with its first s bytes; the state of its length is never left. Other states are for runs of fallback bytes
        that are not valid UTF-8, or not yet.
    """
    size, follow = len(string), _followers(string)
    numbers: dict[tuple[int, tuple[int, ...]], int] = {(matched, _AT_BOUNDARY): matched for matched in range(size + 1)}
    waiting = list(numbers)[:size]
    rows = {size: [size] * _SYMBOLS}

    def number(matched: int, run: tuple[int, ...]) -> int:
        if (matched, run) not in numbers:
            numbers[matched, run] = len(numbers)
            waiting.append((matched, run))
        return numbers[matched, run]

    while waiting:
        matched, run = waiting.pop()
        row = [follow[matched][byte] for byte in range(256)]
        for byte in range(256):
            after = _run_after(run, byte)
            row.append(number(0 if after == _INVALID else follow[matched][byte], after))
        row.append(matched if run == _AT_BOUNDARY else 0)
        rows[numbers[matched, run]] = row
    return np.array([rows[i] for i in range(len(rows))], np.int16 if len(rows) < 2**15 else np.int32)


def _followers(string: bytes) -> list[list[int]]:
    """Bytes of the string matched after each byte, by bytes matched before it."""
    follow, border = [], 0  # the border: bytes matched if all but the first of those matched so far are read
    for matched, byte in enumerate(string):
        row = [*follow[border]] if matched else [0] * 256
        row[byte] = matched + 1
        follow.append(row)
        border = follow[border][byte] if matched else 0
    return follow


def _run_after(run: tuple[int, ...], byte: int) -> tuple[int, ...]:
    """Where a run of bytes is after one more, by the table of well-formed UTF-8 (Unicode 3.9, table 3-7)."""
    if run == _INVALID:
        return _INVALID
    if run:
        left, low, high = run
        if not low <= byte <= high:
            return _INVALID
        return (left - 1, 0x80, 0xBF) if left > 1 else _AT_BOUNDARY
    if byte < 0x80:
        return _AT_BOUNDARY
    if 0xC2 <= byte <= 0xDF:
        return (1, 0x80, 0xBF)
    if 0xE0 <= byte <= 0xEF:
        return (2, {0xE0: 0xA0}.get(byte, 0x80), {0xED: 0x9F}.get(byte, 0xBF))
    if 0xF0 <= byte <= 0xF4:
        return (3, {0xF0: 0x90}.get(byte, 0x80), {0xF4: 0x8F}.get(byte, 0xBF))
    return _INVALID
