"""Where tokens lie in rows: prompts shared by their answers, and several of them in one row.

A *block* is what must lie in one row: one prompt and the answers that share it. It holds prompt[:-1] once, and then for
each answer a branch prompt[-1] + answer[:-1], whose positions go on from the prompt. So every slot of a branch predicts
one token of its answer, each branch has its own first prediction, and nothing else enters the log-prob kernel.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qstar_jax.data.tokenization import Example

Layout = Literal["packed", "shared", "plain"]
FEW = 96  # scored tokens of a row that are not worth a program of their own


@dataclass(frozen=True)
class Block:
    """A prompt and those of its answers that share it in a row.

    Attributes:
        example: Index of the example in its batch.
        answers: Indices of the answers.
        length: Slots that it takes.
        scored: Slots whose next token is scored: the tokens of the answers.
    """

    example: int
    answers: tuple[int, ...]
    length: int
    scored: int


def blocks_of(examples: Sequence[Example], layout: Layout) -> list[Block]:
    """Lists what must lie in one row.

    Args:
        examples: Examples of a batch.
        layout: `plain` repeats the prompt for every answer; the others share it.

    Returns:
        Blocks, in the order of the examples.
    """
    blocks = []
    for i, example in enumerate(examples):
        answers = range(len(example.responses))
        for group in [(r,) for r in answers] if layout == "plain" else [tuple(answers)]:
            scored = sum(len(example.responses[r].ids) for r in group)
            blocks.append(Block(i, group, len(example.prompt) - 1 + scored, scored))
    return blocks


def pack(blocks: Sequence[Block], length: int, layout: Layout) -> list[list[Block]]:
    """Lays blocks into rows.

    Args:
        blocks: Blocks, none longer than `length`.
        length: Slots of a row.
        layout: `packed` puts each block, the longest first, into the first row that has room; the others give each
            block a row of its own.

    Returns:
        Blocks of each row.
    """
    if layout != "packed":
        return [[block] for block in blocks]
    rows: list[list[Block]] = []
    room: list[int] = []
    for block in sorted(
        blocks, key=lambda block: -block.length
    ):  # a stable sort: the batch stays a function of its step
        row = next((i for i, free in enumerate(room) if free >= block.length), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(length)
        rows[row].append(block)
        room[row] -= block.length
    return rows


@dataclass(frozen=True)
class Shapes:
    """The few shapes in which batches of a data set come, so that few programs are compiled.

    Attributes:
        layout: How prompts and answers share rows.
        length: S, slots of a row.
        response_length: T, tokens of the longest answer.
        rows: Rows come in multiples of this.
        scored: K, scored tokens of a row, comes in multiples of this.
    """

    layout: Layout
    length: int
    response_length: int
    rows: int
    scored: int

    @classmethod
    def of(
        cls,
        examples: Sequence[Example],
        layout: Layout = "packed",
        *,
        batch_size: int,
        row_length: int = 0,
        parts: int = 1,
        multiple: int = 8,
    ) -> "Shapes":
        """Finds shapes into which every example fits.

        Args:
            examples: At least one example, with at least one answer each.
            layout: How prompts and answers share rows.
            batch_size: Examples of a batch.
            row_length: Slots of a row where examples are packed; at least those of the longest block are taken.
            parts: Devices over which rows are cut.
            multiple: Lengths are multiples of it, in tokens.

        Returns:
            The shapes.
        """

        def up(number: int, step: int) -> int:
            return max(-(-number // step), 1) * step

        blocks = blocks_of(examples, layout)
        longest = max(block.length for block in blocks)
        length = up(max(longest, row_length if layout == "packed" else 0), multiple)
        response_length = up(max(len(r.ids) for e in examples for r in e.responses), multiple)
        # A quarter of the batch, and of the row: at most sixteen programs, of which most data sets meet two or three.
        # Of short rows `FEW`: there another program costs more time than the empty slots.
        rows = up(up(batch_size, 4) // 4 if layout == "packed" else 1, parts)
        most = length if layout == "packed" else max(block.scored for block in blocks)
        scored = min(max(up(length, 4) // 4, FEW), most)
        return cls(layout, length, response_length, rows, up(scored, multiple))
