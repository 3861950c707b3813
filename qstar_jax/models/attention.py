"""Attention, computed densely, in blocks of queries, or by flash kernels on TPUs and NVIDIA GPUs."""

import logging
from collections.abc import Callable, Sequence
from functools import cache, partial

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from jaxtyping import Array, Bool, Float, Int

from qstar_jax.models.cudnn_attention import cudnn_attention, why_not
from qstar_jax.models.flash_attention import flash_attention
from qstar_jax.models.masks import MASKED, PackedMask, Window, visible
from qstar_jax.sharding import AXES, axes_size, free_axes, platform

_log = logging.getLogger(__name__)


def masked_attention(
    mask: Bool[Array, "B S S"] | PackedMask,
    positions: Int[Array, "B S"],
    option: str,
    *,
    scale: float,
    softcap: float | None = None,
    windows: Sequence[int | None] = (),
) -> Callable[..., Array]:
    """Selects the implementation of attention for a mask and `compute.attention`.

    The log says once which one is used on a GPU, and why.

    Args:
        mask: True where a query (second axis) may attend to a key (third axis), always computed densely; or a
            `PackedMask`, computed as `option` says.
        positions: Positions of the tokens in their texts, to which windows apply. Shape [B, S].
        option: `compute.attention`.
        scale: Multiplies the scores.
        softcap: Scores s become softcap * tanh(s / softcap).
        windows: The values that a traced window may take.

    Returns:
        Function of queries [B, S, H, D], keys and values [B, S, G, D] and the keyword `window`, returning outputs
        [B, S, H, D]. With a window, a query at position p sees only keys at positions above p - window.
    """
    if option == "auto":
        option = {"tpu": "flash", "gpu": "cudnn if possible"}.get(platform(), "blockwise")
    if isinstance(mask, PackedMask) and option == "dense":
        mask = mask.dense()
    implementations = {
        "blockwise": blockwise_attention,
        "flash": flash_attention,
        "cudnn": partial(cudnn_attention, windows=windows),
        "cudnn if possible": partial(_cudnn_if_possible, windows=windows),
    }
    attention = implementations[option] if isinstance(mask, PackedMask) else dense_attention
    return partial(attention, mask=mask, positions=positions, scale=scale, softcap=softcap)


def _cudnn_if_possible(
    q: Array,
    k: Array,
    v: Array,
    mask: PackedMask,
    *,
    positions: Int[Array, "B S"],
    window: Window = None,
    windows: Sequence[int | None],
    **options,
) -> Array:
    reason = why_not(q, k, v, mask, window=window, windows=windows, **options)
    _log_once(f"attention: blockwise, not cuDNN: {reason}" if reason else "attention: cuDNN")
    if reason:
        return blockwise_attention(q, k, v, mask, positions=positions, window=window, **options)
    return cudnn_attention(q, k, v, mask, positions=positions, window=window, windows=windows, **options)


@cache
def _log_once(message: str):
    _log.info(message)


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
    """Attention that materializes all scores; arguments as for `blockwise_attention`, but the mask is an array."""
    if window is not None:
        mask &= positions[:, :, None] - positions[:, None] < window
    return _attend_densely(q, k, v, mask, partial(scale_and_cap, scale=scale, softcap=softcap))


def blockwise_attention(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S G D"],
    v: Float[Array, "B S G D"],
    mask: PackedMask,
    *,
    positions: Int[Array, "B S"],
    window: Window = None,
    scale: float,
    softcap: float | None = None,
    block_size: int = 128,
) -> Float[Array, "B S H D"]:
    """Attention that computes scores for `block_size` queries at a time, and recomputes them in the backward pass.

    Neither the [B, H, S, S] scores nor the [B, S, S] mask is ever materialized: memory grows with S * block_size.

    Args:
        q: Queries. Shape [B, S, H, D].
        k: Keys, in G groups of heads. Shape [B, S, G, D].
        v: Values. Shape [B, S, G, D].
        mask: Which queries may attend to which keys.
        positions: Positions of the tokens in their texts. Shape [B, S].
        window: A query at position p sees only keys at positions above p - window; may be traced.
        scale: Multiplies the scores.
        softcap: Scores s become softcap * tanh(s / softcap).
        block_size: Queries per block of scores.

    Returns:
        Outputs. Shape [B, S, H, D].
    """
    # Looping over sequences and groups of heads turns attention into plain matrix products, several times faster on a
    # CPU. Sequences that are sharded over devices must be computed in one batch.
    loop = platform() == "cpu" and axes_size(free_axes(*AXES)) == 1
    attend = _attend_sequentially if loop else _attend_batched
    is_visible, score = partial(visible, window=window), partial(scale_and_cap, scale=scale, softcap=softcap)
    return attend(q, k, v, mask.ids(positions), is_visible, score, block_size)


def scale_and_cap(products: Float[Array, "*N"], scale: float, softcap: float | None) -> Float[Array, "*N"]:
    """Turns query-key products into scores: scales them, then caps them softly to +-softcap if there is a cap."""
    scores = products * scale
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def _attend_densely(q: Array, k: Array, v: Array, mask: Bool[Array, "B Q S"], score: Callable[[Array], Array]) -> Array:
    # The heads of a group share its keys and values: no key is repeated.
    q = rearrange(q, "b q (g h) d -> b q g h d", g=k.shape[2])
    scores = score(jnp.einsum("bqghd,bsgd->bghqs", q, k, preferred_element_type=jnp.float32))
    # Softmax in float32, then back to the dtype of the values.
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, MASKED), axis=-1).astype(v.dtype)
    return rearrange(jnp.einsum("bghqs,bsgd->bqghd", weights, v), "b q g h d -> b q (g h) d")


def _attend_sequentially(
    q: Array,
    k: Array,
    v: Array,
    ids: Int[Array, "3 B S"],
    is_visible: Callable[[tuple, tuple], Array],
    score: Callable[[Array], Array],
    block_size: int,
) -> Array:
    batch, length, heads, width = q.shape
    groups = k.shape[2]
    heads_per_group = heads // groups
    # One iteration of the loop per sequence and group of heads.
    q = rearrange(q, "b s (g h) d -> (b g) h s d", g=groups)
    k, v = (rearrange(x, "b s g d -> (b g) s d") for x in (k, v))
    ids = repeat(ids, "i b s -> (b g) i s", g=groups)

    @jax.checkpoint
    def attend(inputs: tuple[Array, ...]) -> Array:
        q, k, v, ids = inputs
        # Inside the loop, XLA generates the slots on the fly instead of reading an array.
        slots, outputs = jnp.arange(length), []
        for start in range(0, length, block_size):
            # Causality: keys after the block are skipped, not just masked.
            stop = min(start + block_size, length)
            block = rearrange(q[:, start:stop], "h s d -> (h s) d")
            scores = score(jnp.matmul(block, k[:stop].T, preferred_element_type=jnp.float32))
            # Mask what lies in other blocks and branches, or outside the window.
            mask = is_visible(
                (slots[start:stop, None], *ids[:, start:stop, None]), (slots[:stop], *ids[:, None, :stop])
            )
            scores = jnp.where(mask, scores.reshape(heads_per_group, stop - start, stop), MASKED)
            # Average the values with the softmax weights.
            weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(-1, stop)
            outputs.append((weights @ v[:stop]).reshape(heads_per_group, stop - start, width))
        return jnp.concatenate(outputs, axis=1)

    out = jax.lax.map(attend, (q, k, v, ids))
    return rearrange(out, "(b g) h s d -> b s (g h) d", b=batch)


def _attend_batched(
    q: Array,
    k: Array,
    v: Array,
    ids: Int[Array, "3 B S"],
    is_visible: Callable[[tuple, tuple], Array],
    score: Callable[[Array], Array],
    block_size: int,
) -> Array:
    # Split the queries, padded to whole blocks, along a leading axis to map over.
    length = q.shape[1]
    size = min(block_size, length)
    pad, slots = -length % size, jnp.arange(length)
    blocks = rearrange(jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0))), "b (n s) h d -> n b s h d", s=size)
    block_ids = rearrange(jnp.pad(ids, ((0, 0), (0, 0), (0, pad))), "i b (n s) -> n i b s", s=size)

    # One block of queries of every sequence against all keys, recomputed in the backward pass.
    @jax.checkpoint
    def attend(block: tuple[Array, Array, Array]) -> Array:
        start, q, query_ids = block
        mask = is_visible((start + slots[:size, None], *query_ids[..., None]), (slots, *ids[..., None, :]))
        return _attend_densely(q, k, v, mask, score)

    out = jax.lax.map(attend, (size * jnp.arange(len(blocks)), blocks, block_ids))
    return rearrange(out, "n b s h d -> b (n s) h d")[:, :length]
