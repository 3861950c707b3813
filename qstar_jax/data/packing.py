"""Packs examples into sequences: responses share their prompt, and several prompts share a sequence.

A *block* is a prompt with the responses that share it, and stays within one sequence. It holds prompt[:-1] once, then
for each response a branch prompt[-1] + response[:-1], whose positions continue those of the prompt. Each slot of a
branch thus predicts one token of its response; those that predict an action, and nothing else, enter the log-prob
kernel.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int

from qstar_jax.data.ragged import Lengths, Ragged
from qstar_jax.data.tokenization import Example

Layout = Literal["packed", "shared", "plain"]
FEW = 128  # up to this many scored tokens per shard, padding costs less than compiling another program


@dataclass(frozen=True)
class Blocks:
    """Prompts, each with those of its responses that share it in one sequence.

    Attributes:
        examples: Index of the example of each block in its batch.
        responses: Indices of its responses.
        lengths: Slots that it occupies.
        scored: Slots whose next token is scored: the actions of the responses.
    """

    examples: Int[np.ndarray, " n"]
    responses: Int[np.ndarray, "n G"]
    lengths: Int[np.ndarray, " n"]
    scored: Int[np.ndarray, " n"]

    def __getitem__(self, which: np.ndarray) -> "Blocks":
        """Selects blocks, in the order given."""
        return Blocks(self.examples[which], self.responses[which], self.lengths[which], self.scored[which])


def blocks_of(examples: Sequence[Example] | Ragged | Lengths, layout: Layout) -> Blocks:
    """Lists the blocks of some examples, in their order.

    Args:
        examples: Examples of a batch, or their lengths.
        layout: `plain` repeats the prompt for every response; the others share it.
    """
    lengths = Lengths.of(examples)
    count, places = lengths.responses.shape
    if layout != "plain":
        slots, scored = lengths.prompts - 1 + lengths.responses.sum(1), lengths.actions.sum(1)
        return Blocks(np.arange(count), np.tile(np.arange(places), (count, 1)), slots, scored)
    slots = (lengths.prompts - 1)[:, None] + lengths.responses
    examples_of_blocks, responses = np.divmod(np.arange(count * places), max(places, 1))
    return Blocks(examples_of_blocks, responses[:, None], slots.ravel(), lengths.actions.ravel())


def pack(lengths: Int[np.ndarray, " n"], length: int, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Assigns blocks to sequences.

    Args:
        lengths: Slots of each block, at most `length`.
        length: Slots per sequence.
        layout: `packed` is first fit decreasing: the longest block first, each into the first sequence that has room.
            The others give each block a sequence of its own.

    Returns:
        The sequence of each block, and the blocks in the order of their places: sequence by sequence.
    """
    if layout != "packed":
        return np.arange(len(lengths)), np.arange(len(lengths))
    sequences, free_slots = np.empty(len(lengths), np.int64), np.full(len(lengths), length)
    # The sort is stable, so a batch remains a function of its step.
    longest_first = np.argsort(-lengths, kind="stable")
    for block in longest_first:
        n = np.argmax(free_slots >= lengths[block])
        sequences[block] = n
        free_slots[n] -= lengths[block]
    return sequences, longest_first[np.argsort(sequences[longest_first], kind="stable")]


@dataclass(frozen=True)
class Shapes:
    """The few shapes that batches of a dataset take, so that few programs are compiled.

    Attributes:
        layout: How prompts and responses share sequences.
        length: S, slots per sequence.
        response_length: T, tokens of the longest response.
        sequences: The number of sequences of each shard is a multiple of this.
        scored: The number of scored tokens per shard K is a multiple of this.
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
        examples: Sequence[Example] | Ragged,
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
        lengths = Lengths.of(examples)
        blocks = blocks_of(lengths, layout)
        longest = int(blocks.lengths.max())
        length = _round_up(max(longest, row_length if layout == "packed" else 0), multiple)
        response_length = _round_up(int(lengths.responses.max()), multiple)
        # Steps of a quarter of the batch, and of its actions: most datasets need a few programs. Few actions are scored
        # in a single step.
        sequences = _round_up(batch_size, 4 * shards) // (4 * shards) if layout == "packed" else 1
        per_shard, actions = batch_size / shards, lengths.actions.sum(1)
        quarter, most = per_shard * actions.mean() / 4, per_shard * actions.max()
        scored = _round_up(math.ceil(min(max(quarter, FEW), most)), multiple)
        text_length = _round_up(int(lengths.texts.max()) - 1, multiple) if texts else 0
        return cls(layout, length, response_length, sequences, scored, shards, text_length)


@dataclass(frozen=True)
class Plan:
    """Where the blocks of one batch go.

    Attributes:
        blocks: The blocks, in the order of their places.
        shards: Shard of each block.
        sequences: Its sequence among those of its shard.
        size: (N, K): sequences of the batch, and scored tokens per shard.
    """

    blocks: Blocks
    shards: Int[np.ndarray, " n"]
    sequences: Int[np.ndarray, " n"]
    size: tuple[int, int]


def plan_batch(examples: Sequence[Example] | Ragged, shapes: Shapes, fill_to: int = 0) -> Plan:
    """Packs examples, and finds the size of their batch; arguments as for `make_batch`.

    Raises:
        ValueError: An example does not fit, or has another number of responses than the first.
    """
    lengths = Lengths.of(examples)
    blocks = blocks_of(lengths, shapes.layout)
    _check(lengths, blocks, shapes)
    # Each shard packs its own examples, so that nothing of an example lies on another device.
    count, places = lengths.responses.shape
    per_shard = max(count, fill_to) // shapes.shards
    shards, sequences, order = blocks.examples // per_shard, np.empty(len(blocks.examples), np.int64), []
    for shard in range(shapes.shards):
        own = np.flatnonzero(shards == shard)
        sequences[own], places_of_own = pack(blocks.lengths[own], shapes.length, shapes.layout)
        order.append(own[places_of_own])
    order = np.concatenate(order)
    blocks, shards, sequences = blocks[order], shards[order], sequences[order]
    # Without packing, a full batch always has the same number of sequences.
    per_example = places if shapes.layout == "plain" else 1
    most = int(sequences.max()) + 1 if shapes.layout == "packed" else per_shard * per_example
    scored = int(np.bincount(shards, weights=blocks.scored).max())
    return Plan(
        blocks, shards, sequences, (_round_up(most, shapes.sequences) * shapes.shards, _round_up(scored, shapes.scored))
    )


def _check(lengths: Lengths, blocks: Blocks, shapes: Shapes):
    longest = lengths.responses.max(1, initial=0)[blocks.examples]
    unfit = np.flatnonzero((blocks.lengths > shapes.length) | (longest > shapes.response_length))
    if len(unfit):
        block = unfit[0]
        raise ValueError(
            f"row {lengths.rows[blocks.examples[block]] + 1}: {blocks.lengths[block]} tokens of prompt and responses, "
            f"and a response of {longest[block]}, do not fit into length {shapes.length} and response_length "
            f"{shapes.response_length}; take them from Shapes.of"
        )


def _round_up(number: int, multiple: int) -> int:
    return max(-(-number // multiple), 1) * multiple
