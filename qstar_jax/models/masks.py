"""Who may see whom in rows of tokens."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

# A score that no softmax sees; finite, as differences and gradients of infinities are NaN.
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)

Window = Int[Array, ""] | int | None  # tokens that a query sees, itself and those right before it; None: all


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

    def ids(self, positions: Int[Array, "B S"]) -> Int[Array, "3 B S"]:
        """What `sees` compares beside slots: the block, branch and position of each."""
        return jnp.stack([self.blocks, self.branches, positions])

    def dense(self) -> Bool[Array, "B S S"]:
        """The whole mask, were there no windows."""
        slots = jnp.arange(self.blocks.shape[1])
        ids = self.ids(jnp.zeros_like(self.blocks))  # positions matter to windows only
        return sees((slots[:, None], *ids[..., None]), (slots, *ids[..., None, :]))


def sees(
    query: tuple[Int[Array, "*Q"], ...], key: tuple[Int[Array, "*K"], ...], window: Window = None
) -> Bool[Array, "*QK"]:
    """Says which queries see which keys of a row, for every way to compute attention.

    Args:
        query: Slot, block, branch and position of queries, four arrays.
        key: The same of keys, in shapes that broadcast against the queries'.
        window: A query at position p sees keys at positions above p - window only.

    Returns:
        True where the query sees the key. Queries in shapes [Q, 1] and keys in [1, K] give shape [Q, K].
    """
    slot, block, branch, position = query
    of_slot, of_block, of_branch, of_position = key
    seen = (of_slot <= slot) & (of_block == block) & ((of_branch == 0) | (of_branch == branch))
    return seen if window is None else seen & (position - of_position < window)


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
