"""Encodes the texts of many rows at once: the library tokenizers uses all cores for a batch, and one for a single text.

What splits a row is a generator: it yields the texts whose tokens it needs, and is sent these.
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, TypeVar

from qstar_jax.data.dropped import Dropped, DroppedRow

ROWS = 1024  # rows whose texts are encoded at once
Span = tuple[int, int]
Made = TypeVar("Made")


@dataclass(frozen=True)
class Text:
    """A text to encode.

    Attributes:
        text: The text.
        specials: Whether to prepend BOS, and what else the tokenizer puts in front.
    """

    text: str
    specials: bool = False


class Encoded:
    """The tokens of a text.

    Tokens that some tokenizers append to a text ([SEP], say) are dropped: a response or EOS follows instead.

    Args:
        encoding: What a fast tokenizer returns, a `tokenizers.Encoding`.
        bos: Id of the tokenizer's BOS; it is kept even if the text has no token.
    """

    def __init__(self, encoding: Any, bos: int | None):
        self._encoding = encoding
        ids, sequences = encoding.ids, encoding.sequence_ids
        length = len(ids)
        while length and sequences[length - 1] is None:
            length -= 1
        self.ids: list[int] = ids[: length or int(ids[:1] == [bos])]

    def end_of(self, count: int) -> int:
        """Returns where the first `count` tokens end in the text, in characters."""
        places = map(self._encoding.token_to_chars, range(min(count, len(self.ids))))
        return max((place[1] for place in places if place is not None), default=0)

    @cached_property
    def offsets(self) -> list[Span]:
        """Where each token begins and ends in the text, in characters."""
        return self._encoding.offsets[: len(self.ids)]


# Yields texts, is sent their tokens, and returns what it makes of them.
Encoding = Generator[Sequence[Text], list[Encoded], Made]


def encode(texts: Sequence[Text], tokenizer: Any) -> list[Encoded]:
    """Encodes texts, each of them once however often it is listed."""
    encoded: dict[Text, Encoded] = {}
    for specials in (False, True):
        batch = list(dict.fromkeys(text for text in texts if text.specials == specials))
        if batch:
            encodings = tokenizer([text.text for text in batch], add_special_tokens=specials, verbose=False).encodings
            encoded |= zip(batch, (Encoded(one, tokenizer.bos_token_id) for one in encodings), strict=True)
    return [encoded[text] for text in texts]


def encode_rows(rows: Iterable[tuple[int, Encoding[Made]]], tokenizer: Any) -> Iterator[Made | Dropped]:
    """Runs the generators of rows, `ROWS` at a time; a thread encodes texts while others are prepared or used.

    Args:
        rows: (index of the row, generator) pairs.
        tokenizer: A fast Hugging Face tokenizer.

    Yields:
        For each row, in order: what its generator returns, or why the row is dropped.
    """
    rows, encoding = iter(rows), None
    with ThreadPoolExecutor(1, "tokenizer") as thread:
        while chunk := [_Row(index, generator) for index, generator in islice(rows, ROWS)]:
            for row in chunk:
                row.send(None)
            ahead = chunk, thread.submit(encode, _texts(chunk), tokenizer)
            if encoding is not None:
                yield from _finish(encoding[0], encoding[1].result(), tokenizer)
            encoding = ahead
        if encoding is not None:
            yield from _finish(encoding[0], encoding[1].result(), tokenizer)


class _Row:
    """A generator, with the texts that it waits for, or else its result."""

    def __init__(self, index: int, generator: Encoding):
        self.index, self._generator = index, generator
        self.texts: Sequence[Text] = ()
        self.waits, self.result = True, None

    def send(self, encoded: list[Encoded] | None):
        try:
            self.texts = self._generator.send(encoded)
        except StopIteration as end:
            self.waits, self.result = False, end.value
        except DroppedRow as error:
            self.waits, self.result = False, Dropped(self.index, str(error), error.fault)


def _texts(rows: Sequence[_Row]) -> list[Text]:
    return [text for row in rows if row.waits for text in row.texts]


def _finish(rows: Sequence[_Row], encoded: list[Encoded], tokenizer: Any) -> Iterator[Any]:
    """Continues rows until all have their results."""
    while waiting := [row for row in rows if row.waits]:
        tokens = iter(encoded)
        for row in waiting:
            row.send(list(islice(tokens, len(row.texts))))
        encoded = encode(_texts(rows), tokenizer)
    yield from (row.result for row in rows)
