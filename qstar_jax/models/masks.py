"""Which tokens may attend to which, shared by every implementation of attention."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

# The score of a masked key; finite, because differences and gradients of infinities are NaN.
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)

Window = Int[Array, ""] | int | None  # number of tokens a query sees, including itself; None: all


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Texts:
    """Where the texts of packed sequences lie. A text is a prompt with one of its responses, token after token.

    The tokens of a prompt belong to the texts of all its responses. The sequences of a batch may be sharded over
    devices: numbers count within the sequences, and the texts, of one shard.

    Attributes:
        slots: Slot of each token of each text, counted through the sequences; -1 after its end. Shape [T, L].
        places: The inverse: where each slot occurs, counted through the texts; -1 for unused entries. A slot occurs in
            at most R texts. Shape [N, S, R].
        shards: Shards of sequences and texts.
    """

    slots: Int[Array, "T L"]
    places: Int[Array, "N S R"]
    shards: int = field(default=1, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedMask:
    """Mask of sequences that pack several prompts and responses: causal, within a block, responses kept apart.

    Attributes:
        blocks: Block of each slot; -1 for padding, which sees padding only. Shape [B, S].
        branches: 0 for what the responses of a block share, otherwise the number of the response. Shape [B, S].
        texts: Where the texts lie, for attention that computes them one by one; None if unknown.
        padded: Each sequence holds a single text, which begins at slot 0.
    """

    blocks: Int[Array, "B S"]
    branches: Int[Array, "B S"]
    texts: Texts | None = None
    padded: bool = field(default=False, metadata={"static": True})

    @classmethod
    def of_lengths(cls, lengths: Int[Array, " B"], length: int) -> "PackedMask":
        """Returns the mask of single texts, padded at the end.

        Args:
            lengths: Tokens of each text. Shape [B].
            length: Slots per sequence, S.
        """
        blocks = jnp.where(jnp.arange(length) < lengths[:, None], 0, -1)
        return cls(blocks, jnp.zeros_like(blocks), padded=True)

    def ids(self, positions: Int[Array, "B S"]) -> Int[Array, "3 B S"]:
        """Stacks what `visible` compares besides slots: the block, branch and position of each slot."""
        return jnp.stack([self.blocks, self.branches, positions])

    def dense(self) -> Bool[Array, "B S S"]:
        """Expands the mask, ignoring windows."""
        slots = jnp.arange(self.blocks.shape[1])
        ids = self.ids(jnp.zeros_like(self.blocks))  # positions matter to windows only
        return visible((slots[:, None], *ids[..., None]), (slots, *ids[..., None, :]))


def visible(
    query: tuple[Int[Array, "*Q"], ...], key: tuple[Int[Array, "*K"], ...], window: Window = None
) -> Bool[Array, "*QK"]:
    """Returns which keys of a sequence each query may attend to: the one rule behind every attention kernel.

    Args:
        query: Slot, block, branch and position of the queries, four arrays.
        key: The same for the keys, in shapes that broadcast against those of the queries.
        window: A query at position p sees only keys at positions above p - window.

    Returns:
        True where the query may attend to the key. Queries of shape [Q, 1] and keys of shape [1, K] give [Q, K].
    """
    slot, block, branch, position = query
    key_slot, key_block, key_branch, key_position = key
    mask = (key_slot <= slot) & (key_block == block) & ((key_branch == 0) | (key_branch == branch))
    return mask if window is None else mask & (position - key_position < window)


def right_padded(lengths: Int[Array, " B"], length: int) -> tuple[Int[Array, "B S"], Bool[Array, "B S S"]]:
    """Positions and causal mask of sequences that begin at slot 0 and are padded at the end.

    Args:
        lengths: Number of tokens of each sequence. Shape [B].
        length: Slots per sequence, S.

    Returns:
        (positions, mask), of shapes [B, S] and [B, S, S]. No token attends to padding.
    """
    slots = jnp.arange(length)
    positions = jnp.broadcast_to(slots, (lengths.shape[0], length))
    causal = slots[None, :] <= slots[:, None]
    return positions, causal[None] & (slots[None, None, :] < lengths[:, None, None])
