"""Attention of rows of tokens, computed densely, in blocks or in a TPU's kernels."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from jaxtyping import Array, Bool, Float, Int

from qstar_jax.models.flash_attention import flash_attention
from qstar_jax.models.masks import MASKED, RowMask, Window, sees


def masked_attention(
    mask: Bool[Array, "B S S"] | RowMask,
    positions: Int[Array, "B S"],
    option: str,
    *,
    scale: float,
    softcap: float | None = None,
) -> Callable[..., Array]:
    """Turns a mask and `compute.attention` into attention: the one place that chooses how it is computed.

    Args:
        mask: True where a query (second axis) may see a key (third axis), which is always computed densely; or a
            `RowMask`, which is computed as `option` says.
        positions: Of the tokens in their texts, from which windows count. Shape [B, S].
        option: `compute.attention`.
        scale: Factor of the scores.
        softcap: Scores s become softcap * tanh(s / softcap).

    Returns:
        Function of queries [B, S, H, D], keys and values [B, S, G, D], and by keyword of a `window`, that gives outputs
        [B, S, H, D]: a query at position p sees keys at positions above p - window only.
    """
    if option == "auto":
        option = "flash" if jax.default_backend() == "tpu" else "blockwise"
    if isinstance(mask, RowMask) and option == "dense":
        mask = mask.dense()
    ways = {"blockwise": blockwise_attention, "flash": flash_attention}
    way = ways[option] if isinstance(mask, RowMask) else dense_attention
    return partial(way, mask=mask, positions=positions, scale=scale, softcap=softcap)


def dense_attention(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S G D"],
    v: Float[Array, "B S G D"],
    mask: Bool[Array, "B S S"],
    *,
    positions: Int[Array, "B S"],
    window: Window = None,
    scale: float,
    softcap: float | None = None,
) -> Float[Array, "B S H D"]:
    """Attention whose scores all exist at one time; arguments as those of `blockwise_attention`, the mask as array."""
    if window is not None:
        mask &= positions[:, :, None] - positions[:, None] < window
    return _attend_densely(q, k, v, mask, partial(scores_of, scale=scale, softcap=softcap))


def blockwise_attention(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S G D"],
    v: Float[Array, "B S G D"],
    mask: RowMask,
    *,
    positions: Int[Array, "B S"],
    window: Window = None,
    scale: float,
    softcap: float | None = None,
    block_size: int = 128,
) -> Float[Array, "B S H D"]:
    """Attention whose scores exist for `block_size` queries at a time, and again in the backward pass.

    Neither the [B, H, S, S] scores nor the [B, S, S] mask is ever built: memory grows with S * block_size.

    Args:
        q: Queries. Shape [B, S, H, D].
        k: Keys, in G groups of heads. Shape [B, S, G, D].
        v: Values. Shape [B, S, G, D].
        mask: Who may see whom.
        positions: Of the tokens in their texts. Shape [B, S].
        window: A query at position p sees keys at positions above p - window only; it may be traced.
        scale: Factor of the scores.
        softcap: Scores s become softcap * tanh(s / softcap).
        block_size: Queries of a row whose scores exist at one time.

    Returns:
        Outputs. Shape [B, S, H, D].
    """
    # One row and group of heads after the other gives products of plain matrices, which a CPU multiplies several times
    # faster; but rows that lie on several devices must be computed side by side.
    by_row = jax.default_backend() == "cpu" and jax.sharding.get_abstract_mesh().size <= 1
    attend = _attend_row_by_row if by_row else _attend_side_by_side
    see, score = partial(sees, window=window), partial(scores_of, scale=scale, softcap=softcap)
    return attend(q, k, v, mask.ids(positions), see, score, block_size)


def scores_of(products: Float[Array, "*N"], scale: float, softcap: float | None) -> Float[Array, "*N"]:
    """Scores of products of queries and keys: scaled, then softly bounded to +-softcap where there is one."""
    scores = products * scale
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def _attend_densely(q: Array, k: Array, v: Array, mask: Bool[Array, "B Q S"], score: Callable[[Array], Array]) -> Array:
    q = rearrange(q, "b q (g h) d -> b q g h d", g=k.shape[2])
    scores = score(jnp.einsum("bqghd,bsgd->bghqs", q, k, preferred_element_type=jnp.float32))
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, MASKED), axis=-1).astype(v.dtype)
    return rearrange(jnp.einsum("bghqs,bsgd->bqghd", weights, v), "b q g h d -> b q (g h) d")


def _attend_row_by_row(
    q: Array,
    k: Array,
    v: Array,
    ids: Int[Array, "3 B S"],
    see: Callable[[tuple, tuple], Array],
    score: Callable[[Array], Array],
    block_size: int,
) -> Array:
    batch, length, heads, width = q.shape
    groups = k.shape[2]
    share = heads // groups
    q = rearrange(q, "b s (g h) d -> (b g) h s d", g=groups)
    k, v = (rearrange(x, "b s g d -> (b g) s d") for x in (k, v))
    ids = repeat(ids, "i b s -> (b g) i s", g=groups)

    @jax.checkpoint
    def attend(row: tuple[Array, ...]) -> Array:
        q, k, v, ids = row
        slots, outputs = jnp.arange(length), []  # made within the loop, where XLA counts them and reads no array
        for start in range(0, length, block_size):
            # Keys after the block are not even multiplied.
            stop = min(start + block_size, length)
            block = rearrange(q[:, start:stop], "h s d -> (h s) d")
            scores = score(jnp.matmul(block, k[:stop].T, preferred_element_type=jnp.float32))
            seen = see((slots[start:stop, None], *ids[:, start:stop, None]), (slots[:stop], *ids[:, None, :stop]))
            scores = jnp.where(seen, scores.reshape(share, stop - start, stop), MASKED)
            weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(-1, stop)
            outputs.append((weights @ v[:stop]).reshape(share, stop - start, width))
        return jnp.concatenate(outputs, axis=1)

    out = jax.lax.map(attend, (q, k, v, ids))
    return rearrange(out, "(b g) h s d -> b s (g h) d", b=batch)


def _attend_side_by_side(
    q: Array,
    k: Array,
    v: Array,
    ids: Int[Array, "3 B S"],
    see: Callable[[tuple, tuple], Array],
    score: Callable[[Array], Array],
    block_size: int,
) -> Array:
    length = q.shape[1]
    size = min(block_size, length)
    short, slots = -length % size, jnp.arange(length)
    blocks = rearrange(jnp.pad(q, ((0, 0), (0, short), (0, 0), (0, 0))), "b (n s) h d -> n b s h d", s=size)
    ids_of_blocks = rearrange(jnp.pad(ids, ((0, 0), (0, 0), (0, short))), "i b (n s) -> n i b s", s=size)

    @jax.checkpoint
    def attend(block: tuple[Array, Array, Array]) -> Array:
        start, q, own_ids = block
        seen = see((start + slots[:size, None], *own_ids[..., None]), (slots, *ids[..., None, :]))
        return _attend_densely(q, k, v, seen, score)

    out = jax.lax.map(attend, (size * jnp.arange(len(blocks)), blocks, ids_of_blocks))
    return rearrange(out, "n b s h d -> b (n s) h d")[:, :length]
