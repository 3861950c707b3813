"""Who may see whom in rows of tokens."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowMask:
    """Who may see whom in rows that hold several prompts and answers: causal, within a block, answers kept apart.

    Attributes:
        blocks: Block of each slot; -1 for padding, which sees padding only. Shape [B, S].
        branches: 0 for what a block's answers share, otherwise the answer's number. Shape [B, S].
    """

    blocks: Int[Array, "B S"]
    branches: Int[Array, "B S"]

    def between(self, queries: Int[Array, "B Q 3"]) -> Bool[Array, "B Q S"]:
        """Mask of some queries, given as (slot, block, branch) each, and all keys."""
        slot, block, branch = queries[..., None, 0], queries[..., None, 1], queries[..., None, 2]
        keys, branches = self.blocks[:, None, :], self.branches[:, None, :]
        causal = jnp.arange(self.blocks.shape[1]) <= slot
        return causal & (keys == block) & ((branches == 0) | (branches == branch))

    def queries(self) -> Int[Array, "B S 3"]:
        """The (slot, block, branch) of every slot."""
        slots = jnp.broadcast_to(jnp.arange(self.blocks.shape[1]), self.blocks.shape)
        return jnp.stack([slots, self.blocks, self.branches], axis=-1)

    def dense(self) -> Bool[Array, "B S S"]:
        """The whole mask."""
        return self.between(self.queries())


def right_padded(lengths: Int[Array, " B"], length: int) -> tuple[Int[Array, "B S"], Bool[Array, "B S S"]]:
    """Positions and causal mask of rows that begin at slot 0 and are padded at their end.

    Args:
        lengths: Tokens of each row. Shape [B].
        length: Slots of a row, S.

    Returns:
        (positions, mask): shapes [B, S] and [B, S, S]. Padding sees what it likes and is seen by nothing before it.
    """
    slots = jnp.arange(length)
    positions = jnp.broadcast_to(slots, (lengths.shape[0], length))
    causal = slots[None, :] <= slots[:, None]
    return positions, causal[None] & (slots[None, None, :] < lengths[:, None, None])


def left_padded(lengths: Int[Array, " B"], length: int) -> tuple[Int[Array, "B S"], Bool[Array, "B S S"]]:
    """Positions and causal mask of rows that end at the last slot and are padded at their beginning.

    Args:
        lengths: Tokens of each row. Shape [B].
        length: Slots of a row, S.

    Returns:
        (positions, mask): shapes [B, S] and [B, S, S]. Padding sees itself only.
    """
    slots = jnp.arange(length)
    start = length - lengths[:, None]
    positions = jnp.maximum(slots - start, 0)
    causal = slots[None, :] <= slots[:, None]
    return positions, causal[None] & ((slots >= start)[:, None, :] | jnp.eye(length, dtype=bool))
