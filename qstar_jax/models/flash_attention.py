"""Flash attention for TPUs (arXiv 2205.14135, 2307.08691) over packed sequences.

Scores are computed one tile at a time, in VMEM. A tile is [keys, queries], so that the per-query statistics (ids,
maximum and sum of the softmax) are rows; columns would be padded to 128 lanes each.

In shapes, the kernels pad S to n tiles of T slots, and each of the G groups of keys and values serves H / G heads.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from qstar_jax.errors import InputError
from qstar_jax.models.masks import MASKED, PackedMask, Window, visible
from qstar_jax.sharding import BATCH, axes_size, free_axes, platform

_LANES = 128  # width of a TPU vector, and the minimum size of a tile
_FIRST, _LAST = ((0,), (0,)), ((1,), (1,))  # contracting dimensions of x.T @ y and of x @ y.T


def flash_attention(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S G D"],
    v: Float[Array, "B S G D"],
    mask: PackedMask,
    *,
    positions: Int[Array, "B S"],
    window: Window = None,
    scale: float,
    softcap: float | None = None,
    block_size: int = 512,
    interpret: bool | None = None,
) -> Float[Array, "B S H D"]:
    """Attention whose scores never leave on-chip memory, forward and backward: HBM use grows with S, not its square.

    Tiles of future keys, and tiles in which no query has a key in its block and window, are not even read. Under a
    mesh, each device computes its shard of the batch (axes data and fsdp) and of the heads (axis tensor).

    Args:
        q: Queries. Shape [B, S, H, D].
        k: Keys, in G groups of heads. Shape [B, S, G, D].
        v: Values. Shape [B, S, G, D].
        mask: Which queries may attend to which keys.
        positions: Positions of the tokens in their texts. Shape [B, S].
        window: A query at position p sees only keys at positions above p - window; may be traced.
        scale: Multiplies the scores.
        softcap: Scores s become softcap * tanh(s / softcap).
        block_size: Maximum number of keys and of queries per tile; a multiple of 128.
        interpret: True runs the kernels as plain JAX, slowly, on any device; False compiles them for a TPU whether or
            not there is one; None compiles them after checking that JAX runs on a TPU.

    Returns:
        Outputs in the dtype of v; scores, softmax and sums are float32. Shape [B, S, H, D].

    Raises:
        InputError: If JAX does not run on a TPU, or the mesh does not divide the batch or the groups of heads.
    """
    if interpret is None and platform() != "tpu":
        raise InputError(
            f"compute.attention flash: its kernels need a TPU, and JAX runs on {platform()}; set "
            "compute.attention to blockwise, or to auto, which selects flash on TPUs only"
        )
    if block_size < _LANES or block_size % _LANES:
        raise InputError(f"flash_attention: block_size is {block_size}; expected a multiple of {_LANES}")
    static = _Static(_tile_size(q.shape[1], block_size), scale, softcap, bool(interpret))
    attend, ids, window = partial(_attend, static), mask.ids(positions), None if window is None else jnp.int32(window)
    batch_axes, head_axes = free_axes(*BATCH[0]), free_axes("tensor")
    shards, tensor = axes_size(batch_axes), axes_size(head_axes)
    if shards * tensor > 1:  # XLA cannot shard a kernel by itself
        if q.shape[0] % shards:
            raise InputError(
                f"compute.attention flash: a batch of {q.shape[0]} sequences cannot be sharded over mesh.data * "
                f"mesh.fsdp = {shards} devices; change the batch or the mesh, or set compute.attention to "
                "blockwise"
            )
        if k.shape[2] % tensor:  # what divides the groups divides the heads
            raise InputError(
                f"compute.attention flash: {q.shape[2]} heads in {k.shape[2]} groups cannot be sharded over "
                f"mesh.tensor = {tensor} devices; set mesh.tensor to a divisor of {k.shape[2]}, or compute.attention "
                "to blockwise"
            )
        head_spec, id_spec = PartitionSpec(batch_axes, None, head_axes), PartitionSpec(None, batch_axes)
        specs = head_spec, head_spec, head_spec, id_spec, PartitionSpec()
        axes = {*batch_axes, *head_axes}
        attend = jax.shard_map(attend, in_specs=specs, out_specs=head_spec, axis_names=axes, check_vma=False)
    return attend(q, k, v, ids, window)


@dataclass(frozen=True)
class _Static:
    """Compile-time settings of the kernels: slots per tile, scale and cap of the scores, interpreter mode."""

    size: int
    scale: float
    softcap: float | None
    interpret: bool


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: _Static, q: Array, k: Array, v: Array, ids: Int[Array, "3 B s"], window: Window) -> Array:
    return _forward(static, q, k, v, ids, window)[0]


def _forward(static: _Static, q: Array, k: Array, v: Array, ids: Int[Array, "3 B s"], window: Window):
    length, size = q.shape[1], static.size
    q, k, v = (_to_tiles(x, size) for x in (q, k, v))
    batch, heads, padded, width = q.shape
    # The backward pass recomputes the softmax from its log-sum-exp, one number per query and head.
    outputs = {
        "out": jax.ShapeDtypeStruct(q.shape, v.dtype),
        "lse": jax.ShapeDtypeStruct((batch, heads, 1, padded), jnp.float32),
    }
    accumulators = [(width, size), (1, size), (1, size)]  # of the outputs, the maximum and the sum
    out, lse = _run(_forward_kernel, static, ids, window, {"q": q, "k": k, "v": v}, outputs, accumulators)
    return _from_tiles(out, length), (q, k, v, out, lse, ids, window)


def _backward(static: _Static, residuals: tuple, dout: Array):
    q, k, v, out, lse, ids, window = residuals
    length, size = dout.shape[1], static.size
    accumulators = [(size, q.shape[-1])]
    dout = _to_tiles(dout, size)
    # The gradient through a softmax is weights * (dweights - delta), where delta, the sum of weights * dweights over
    # keys, equals out . dout.
    delta = (out.astype(jnp.float32) * dout.astype(jnp.float32)).sum(-1)[:, :, None]
    inputs = {"q": q, "k": k, "v": v, "dout": dout, "lse": lse, "delta": delta}
    # Two passes over the tiles: one accumulates over keys for dq, the other over queries and heads for dk and dv.
    (dq,) = _run(_dq_kernel, static, ids, window, inputs, {"q": q}, accumulators)
    dk, dv = _run(_dkv_kernel, static, ids, window, inputs, {"k": k, "v": v}, accumulators * 2, by_key=True)
    return *(_from_tiles(x, length) for x in (dq, dk, dv)), None, None


_attend.defvjp(_forward, _backward)


def _run(
    kernel, static: _Static, ids: Int[Array, "3 B s"], window: Window, inputs, outputs, accumulators, *, by_key=False
) -> list[Array]:
    """Runs a kernel over the tiles of scores.

    The grid is (sequence, head, tile of queries, step): at step i, the queries meet the keys i tiles before them. With
    `by_key`, it is (sequence, group, tile of keys, head of the group, step): the keys meet the queries i tiles after
    them. A step beyond the reach of a tile computes nothing, and its reads repeat the last tile, which is free.

    Args:
        kernel: Function of a function that computes scores (see `_scores`), the reach, and references to the inputs,
            outputs and accumulators.
        static: Compile-time settings.
        ids: Ids of the slots, for `visible`.
        window: For `visible`.
        inputs: Name -> array of S slots; the name selects how it is tiled.
        outputs: Name -> shape and dtype.
        accumulators: Shapes of the float32 buffers that persist across steps.
        by_key: See above.
    """
    (batch, heads, length, width), groups = inputs["q"].shape, inputs["k"].shape[1]
    size, heads_per_group, tiles = static.size, heads // groups, length // static.size
    # Padding comes after all tokens, so no token attends to it.
    ids = jnp.pad(ids, ((0, 0), (0, 0), (0, length - ids.shape[2])), constant_values=-1)
    blocks, _, positions = ids.reshape(3, batch, tiles, size)
    # Scalars are prefetched, so that block indices can depend on them.
    scalars = [_reach(blocks, positions, window)[by_key], *([] if window is None else [window.reshape(1)])]
    inner = (heads_per_group, tiles) if by_key else (tiles,)

    # Map a grid index to (sequence, head, group, tile of queries, tile of keys).
    def at(b, head_or_group, tile, *rest):
        *head, step, reach = rest[: len(inner) + 1]
        distance = jnp.minimum(step, reach[b, tile])
        if by_key:
            return b, head_or_group * heads_per_group + head[0], head_or_group, tile + distance, tile
        return b, head_or_group, head_or_group // heads_per_group, tile, tile - distance

    def spec(shape, index):
        return pl.BlockSpec(shape, lambda *indices: index(*at(*indices)))

    # Tiles of arrays indexed by query, by key, and with one number per query.
    query_spec = spec((None, None, size, width), lambda b, h, g, query, key: (b, h, query, 0))
    key_spec = spec((None, None, size, width), lambda b, h, g, query, key: (b, g, key, 0))
    row_spec = spec((None, None, 1, size), lambda b, h, g, query, key: (b, h, 0, query))
    specs = {"q": query_spec, "k": key_spec, "v": key_spec, "out": query_spec, "dout": query_spec}
    specs |= {"lse": row_spec, "delta": row_spec}
    query_ids = spec((None, 3, size), lambda b, h, g, query, key: (b, 0, query))
    key_ids = spec((None, size, 3), lambda b, h, g, query, key: (b, key, 0))

    def run_kernel(reach, *refs):
        step = pl.program_id(2 + len(inner))
        limit, query_ids, key_ids, *refs = (None, *refs) if window is None else refs
        kernel(partial(_scores, static, step, query_ids, key_ids, limit), reach, *refs)

    return pl.pallas_call(
        run_kernel,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs.values()],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(batch, groups if by_key else heads, tiles, *inner),
            in_specs=[query_ids, key_ids, *(specs[name] for name in inputs)],
            out_specs=[specs[name] for name in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in accumulators],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3 + ("arbitrary",) * len(inner)),
        interpret=static.interpret,
        name=f"flash{kernel.__name__}",
    )(*scalars, rearrange(ids, "i b s -> b i s"), rearrange(ids, "i b s -> b s i"), *inputs.values())


def _reach(
    blocks: Int[Array, "B n T"], positions: Int[Array, "B n T"], window: Window
) -> tuple[Int[Array, "B n"], Int[Array, "B n"]]:
    """Computes how many tiles back the queries of a tile may see a key, and how many tiles on its keys may be seen.

    Both are upper bounds: branches are ignored, and blocks are assumed to be in order.
    """
    # Two tiles meet if their ranges of blocks overlap. Padding counts as the last block, which keeps ranges short.
    blocks = jnp.where(blocks < 0, jnp.iinfo(blocks.dtype).max, blocks)
    low, high = blocks.min(-1), blocks.max(-1)
    meet = (low[:, :, None] <= high[:, None]) & (low[:, None] <= high[:, :, None])
    if window is not None:
        # A block that spans two tiles is the last of the keys' tile and the first of the queries' tile: it is in reach
        # if its first query there and its last key lie within the window.
        last = jnp.where(blocks == high[..., None], positions, -1).max(-1)
        first = jnp.where(blocks == low[..., None], positions, jnp.iinfo(positions.dtype).max).min(-1)
        meet &= (low[:, :, None] < high[:, None]) | (first[:, :, None] - last[:, None] < window)
    # The largest distance between tiles that meet, per tile of queries and per tile of keys.
    tiles = jnp.arange(blocks.shape[1], dtype=jnp.int32)
    distance = jnp.where(meet, tiles[:, None] - tiles, 0)  # [B, queries, keys]; negative where keys come after queries
    return distance.max(2), distance.max(1)


def _forward_kernel(score, reach, q, k, v, out, lse, weighted, maximum, total):
    row, tile, step, steps = pl.program_id(0), pl.program_id(2), pl.program_id(3), pl.num_programs(3)

    @pl.when(step == 0)
    def _():
        weighted[...], maximum[...] = jnp.zeros_like(weighted), jnp.full_like(maximum, MASKED)
        total[...] = jnp.zeros_like(total)

    # Online softmax: rescale the running sums to the new maximum, then add this tile. The first tile includes each
    # query's own key, so the maximum is never that of masked scores alone.
    @pl.when(step <= reach[row, tile])
    def _():
        scores, _ = score(q, k)
        new_maximum = jnp.maximum(maximum[...], scores.max(0, keepdims=True))
        weights, rescale = jnp.exp(scores - new_maximum), jnp.exp(maximum[...] - new_maximum)
        weighted[...] = rescale * weighted[...] + _product(v[...], weights.astype(v.dtype), _FIRST)
        total[...] = rescale * total[...] + weights.sum(0, keepdims=True)
        maximum[...] = new_maximum

    # Normalize once, after the last tile.
    @pl.when(step == steps - 1)
    def _():
        out[...] = (weighted[...] / total[...]).T.astype(out.dtype)
        lse[...] = maximum[...] + jnp.log(total[...])


def _dq_kernel(score, reach, q, k, v, dout, lse, delta, dq, q_sum):
    row, tile, step, steps = pl.program_id(0), pl.program_id(2), pl.program_id(3), pl.num_programs(3)

    @pl.when(step == 0)
    def _():
        q_sum[...] = jnp.zeros_like(q_sum)

    # dq = sum over keys of dscores * k.
    @pl.when(step <= reach[row, tile])
    def _():
        _, dscores = _weights_and_dscores(score, q, k, v, dout, lse, delta)
        q_sum[...] += _product(dscores.astype(k.dtype), k[...], _FIRST)

    @pl.when(step == steps - 1)
    def _():
        dq[...] = q_sum[...].astype(dq.dtype)


def _dkv_kernel(score, reach, q, k, v, dout, lse, delta, dk, dv, k_sum, v_sum):
    row, tile = pl.program_id(0), pl.program_id(2)
    head, heads, step, steps = pl.program_id(3), pl.num_programs(3), pl.program_id(4), pl.num_programs(4)

    @pl.when((head == 0) & (step == 0))
    def _():
        k_sum[...], v_sum[...] = jnp.zeros_like(k_sum), jnp.zeros_like(v_sum)

    # Over the queries of all heads of the group: dk = sum of dscores * q, and dv = sum of weights * dout.
    @pl.when(step <= reach[row, tile])
    def _():
        weights, dscores = _weights_and_dscores(score, q, k, v, dout, lse, delta)
        k_sum[...] += jnp.dot(dscores.astype(q.dtype), q[...], preferred_element_type=jnp.float32)
        v_sum[...] += jnp.dot(weights.astype(dout.dtype), dout[...], preferred_element_type=jnp.float32)

    @pl.when((head == heads - 1) & (step == steps - 1))
    def _():
        dk[...], dv[...] = k_sum[...].astype(dk.dtype), v_sum[...].astype(dv.dtype)


def _scores(static, step, query_ids, key_ids, window, q, k) -> tuple[Float[Array, "T T"], Float[Array, "T T"] | float]:
    """Computes the scores [keys, queries] of a tile `step` tiles before its queries, and d scores / d products."""
    scores, slope = _product(k[...], q[...], _LAST) * static.scale, static.scale
    if static.softcap is not None:
        bounded = jnp.tanh(scores / static.softcap)
        scores, slope = static.softcap * bounded, static.scale * (1 - bounded**2)
    # Only the difference of slots matters, so they are counted from the start of the tile of keys.
    slot = [jax.lax.broadcasted_iota(jnp.int32, scores.shape, axis) for axis in (0, 1)]
    key = (slot[0], *(key_ids[:, i : i + 1] for i in range(3)))
    query = (slot[1] + step * static.size, *(query_ids[i : i + 1] for i in range(3)))
    return jnp.where(visible(query, key, None if window is None else window[0]), scores, MASKED), slope


def _weights_and_dscores(score, q, k, v, dout, lse, delta):
    # Recompute the softmax weights of the tile from the saved log-sum-exp.
    scores, slope = score(q, k)
    weights = jnp.exp(scores - lse[...])
    dweights = _product(v[...], dout[...], _LAST)
    return weights, weights * (dweights - delta[...]) * slope


def _product(x: Array, y: Array, contracting) -> Array:
    return jax.lax.dot_general(x, y, (contracting, ((), ())), preferred_element_type=jnp.float32)


def _tile_size(length: int, block_size: int) -> int:
    # The smallest tile that needs no more tiles than `block_size`, to minimize padding.
    tiles = -(-length // block_size)
    return -(-length // (tiles * _LANES)) * _LANES


def _to_tiles(x: Float[Array, "B s H D"], size: int) -> Float[Array, "B H S D"]:
    return jnp.pad(rearrange(x, "b s h d -> b h s d"), ((0, 0), (0, 0), (0, -x.shape[1] % size), (0, 0)))


def _from_tiles(x: Float[Array, "B H S D"], length: int) -> Float[Array, "B s H D"]:
    return rearrange(x[:, :, :length], "b h s d -> b s h d")
