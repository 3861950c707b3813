"""Packs examples into sequences: responses share their prompt, and several prompts share a sequence.

A *block* is a prompt with the responses that share it, and stays within one sequence. It holds prompt[:-1] once, then
for each response a branch prompt[-1] + response[:-1], whose positions continue those of the prompt. Each slot of a
branch thus predicts one token of its response; those that predict an action, and nothing else, enter the log-prob
kernel.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qstar_jax.data.tokenization import Example

Layout = Literal["packed", "shared", "plain"]
FEW = 96  # up to this many scored tokens per sequence, padding costs less than compiling another program


@dataclass(frozen=True)
class Block:
    """A prompt and those of its responses that share it in one sequence.

    Attributes:
        example: Index of the example in its batch.
        responses: Indices of the responses.
        length: Slots that it occupies.
        scored: Slots whose next token is scored: the actions of the responses.
    """

    example: int
    responses: tuple[int, ...]
    length: int
    scored: int


def blocks_of(examples: Sequence[Example], layout: Layout) -> list[Block]:
    """Lists the blocks of some examples, in their order.

    Args:
        examples: Examples of a batch.
        layout: `plain` repeats the prompt for every response; the others share it.
    """
    blocks = []
    for i, example in enumerate(examples):
        responses = range(len(example.responses))
        for group in [(r,) for r in responses] if layout == "plain" else [tuple(responses)]:
            length = len(example.prompt) - 1 + sum(len(example.responses[r].ids) for r in group)
            blocks.append(Block(i, group, length, sum(example.responses[r].num_actions for r in group)))
    return blocks


def pack(blocks: Sequence[Block], length: int, layout: Layout) -> list[list[Block]]:
    """Assigns blocks to sequences.

    Args:
        blocks: Blocks, none longer than `length`.
        length: Slots per sequence.
        layout: `packed` is first fit decreasing: the longest block first, each into the first sequence that has room.
            The others give each block a sequence of its own.
    """
    if layout != "packed":
        return [[block] for block in blocks]
    sequences: list[list[Block]] = []
    free_slots: list[int] = []
    # The sort is stable, so a batch remains a function of its step.
    for block in sorted(blocks, key=lambda block: -block.length):
        n = next((n for n, free in enumerate(free_slots) if free >= block.length), len(sequences))
        if n == len(sequences):
            sequences.append([])
            free_slots.append(length)
        sequences[n].append(block)
        free_slots[n] -= block.length
    return sequences


@dataclass(frozen=True)
class Shapes:
    """The few shapes that batches of a dataset take, so that few programs are compiled.

    Attributes:
        layout: How prompts and responses share sequences.
        length: S, slots per sequence.
        response_length: T, tokens of the longest response.
        sequences: The number of sequences of each shard is a multiple of this.
        scored: The number of scored tokens per sequence K is a multiple of this.
        shards: Devices over which a batch is sharded; each has its own examples and their sequences.
        text_length: L, tokens of the longest text, where batches list their texts (see `Texts`); otherwise 0.
    """

    layout: Layout
    length: int
    response_length: int
    sequences: int
    scored: int
    shards: int = 1
    text_length: int = 0

    @classmethod
    def of(
        cls,
        examples: Sequence[Example],
        layout: Layout = "packed",
        *,
        batch_size: int,
        row_length: int = 0,
        shards: int = 1,
        multiple: int = 8,
        texts: bool = False,
    ) -> "Shapes":
        """Finds shapes that every example fits.

        Args:
            examples: At least one example, with at least one response each.
            layout: How prompts and responses share sequences.
            batch_size: Examples per batch.
            row_length: Slots per sequence where examples are packed; at least the length of the longest block.
            shards: Devices over which a batch is sharded.
            multiple: Lengths are multiples of it, in tokens.
            texts: Whether batches list their texts.
        """
        blocks = blocks_of(examples, layout)
        longest = max(block.length for block in blocks)
        length = _round_up(max(longest, row_length if layout == "packed" else 0), multiple)
        response_length = _round_up(max(len(r.ids) for e in examples for r in e.responses), multiple)
        # Steps of a quarter of the batch, and of the sequence: at most sixteen programs, of which most datasets need
        # two or three. For short sequences in steps of at least `FEW`.
        sequences = _round_up(batch_size, 4 * shards) // (4 * shards) if layout == "packed" else 1
        most = length if layout == "packed" else max(block.scored for block in blocks)
        scored = _round_up(min(max(_round_up(length, 4) // 4, FEW), most), multiple)
        longest_text = max(len(e.prompt) - 1 + len(r.ids) for e in examples for r in e.responses)
        text_length = _round_up(longest_text, multiple) if texts else 0
        return cls(layout, length, response_length, sequences, scored, shards, text_length)


@dataclass(frozen=True)
class Plan:
    """Where the blocks of one batch go.

    Attributes:
        shards: Blocks of each sequence of each shard.
        size: (N, K): sequences of the batch, and scored tokens per sequence.
    """

    shards: list[list[list[Block]]]
    size: tuple[int, int]


def plan_batch(examples: Sequence[Example], shapes: Shapes, fill_to: int = 0) -> Plan:
    """Packs examples, and finds the size of their batch; arguments as for `make_batch`.

    Raises:
        ValueError: An example does not fit, or has another number of responses than the first.
    """
    blocks, responses = blocks_of(examples, shapes.layout), len(examples[0].responses)
    _check(examples, blocks, shapes)
    # Each shard packs its own examples, so that nothing of an example lies on another device.
    per_shard = max(len(examples), fill_to) // shapes.shards
    own = [[block for block in blocks if block.example // per_shard == i] for i in range(shapes.shards)]
    shards = [pack(blocks, shapes.length, shapes.layout) for blocks in own]
    # Without packing, a full batch always has the same number of sequences.
    per_example = responses if shapes.layout == "plain" else 1
    count = max(map(len, shards)) if shapes.layout == "packed" else per_shard * per_example
    scored = max(sum(block.scored for block in sequence) for sequences in shards for sequence in sequences)
    return Plan(shards, (_round_up(count, shapes.sequences) * shapes.shards, _round_up(scored, shapes.scored)))


def _check(examples: Sequence[Example], blocks: Sequence[Block], shapes: Shapes):
    responses = len(examples[0].responses)
    for example in examples:
        if len(example.responses) != responses:
            raise ValueError(
                f"row {example.row + 1} has {len(example.responses)} responses and the first of its batch {responses}; "
                "all examples of a dataset need the same number"
            )
    for block in blocks:
        example = examples[block.example]
        longest = max(len(r.ids) for r in example.responses)
        if block.length > shapes.length or longest > shapes.response_length:
            raise ValueError(
                f"row {example.row + 1}: {block.length} tokens of prompt and responses, and a response of {longest}, "
                f"do not fit into length {shapes.length} and response_length {shapes.response_length}; "
                "take them from Shapes.of"
            )


def _round_up(number: int, multiple: int) -> int:
    return max(-(-number // multiple), 1) * multiple
