"""Flash attention for TPUs (arXiv 2205.14135, 2307.08691), of rows that hold several prompts and answers.

Scores exist one tile at a time, in the memory beside the processor. A tile is [keys, queries]: what belongs to a query
(who it is, the maximum and the sum of its softmax) is then a row; a column would take 128 times its size in memory.

Letters in shapes: within the kernels S is padded to n tiles of T slots, and of the H heads H / G share one of G groups.
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
from qstar_jax.models.masks import MASKED, RowMask, Window, sees
from qstar_jax.sharding import BATCH

_LANES = 128  # of a TPU's vectors: no tile is narrower
_FIRST, _LAST = ((0,), (0,)), ((1,), (1,))  # which dimension of both factors a product sums over: x.T @ y, x @ y.T


def flash_attention(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S G D"],
    v: Float[Array, "B S G D"],
    mask: RowMask,
    *,
    positions: Int[Array, "B S"],
    window: Window = None,
    scale: float,
    softcap: float | None = None,
    block_size: int = 512,
    interpret: bool | None = None,
) -> Float[Array, "B S H D"]:
    """Attention whose scores never leave the processor, forward and backward: memory grows with S, not its square.

    Keys after a tile's queries, and tiles where no query has a key in its block and window, are not even read. Under
    a mesh, each device computes its rows of the batch (axes data and fsdp) and its heads (axis tensor).

    Args:
        q: Queries. Shape [B, S, H, D].
        k: Keys, in G groups of heads. Shape [B, S, G, D].
        v: Values. Shape [B, S, G, D].
        mask: Who may see whom.
        positions: Of the tokens in their texts. Shape [B, S].
        window: A query at position p sees keys at positions above p - window only; it may be traced.
        scale: Factor of the scores.
        softcap: Scores s become softcap * tanh(s / softcap).
        block_size: At most so many keys and queries meet in a tile; a multiple of 128.
        interpret: True runs the kernels as plain JAX, slowly, on any device; False compiles them for a TPU, be there
            one or not. None compiles them too, but first sees whether JAX runs on a TPU.

    Returns:
        Outputs in v's type; scores, softmax and sums are float32. Shape [B, S, H, D].

    Raises:
        InputError: If JAX does not run on a TPU, or the mesh does not divide rows or groups of heads.
    """
    if interpret is None and jax.default_backend() != "tpu":
        raise InputError(
            f"compute.attention flash: its kernels are for TPUs, and JAX runs on {jax.default_backend()} here; set "
            "compute.attention to blockwise, or to auto, which takes flash on TPUs only"
        )
    if block_size < _LANES or block_size % _LANES:
        raise InputError(f"flash_attention: block_size is {block_size}; expected a multiple of {_LANES}")
    form = _Form(_tile_size(q.shape[1], block_size), scale, softcap, bool(interpret))
    attend, ids, window = partial(_attend, form), mask.ids(positions), None if window is None else jnp.int32(window)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size > 1:  # XLA cannot cut a kernel by itself
        rows, tensor = mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["tensor"]
        if q.shape[0] % rows:
            raise InputError(
                f"compute.attention flash: a batch of {q.shape[0]} rows cannot be cut over mesh.data * mesh.fsdp = "
                f"{rows} devices; change the batch or the mesh, or set compute.attention to blockwise"
            )
        if k.shape[2] % tensor:  # what divides the groups divides the heads
            raise InputError(
                f"compute.attention flash: {q.shape[2]} heads in {k.shape[2]} groups cannot be cut over mesh.tensor = "
                f"{tensor} devices; set mesh.tensor to a divisor of {k.shape[2]}, or compute.attention to blockwise"
            )
        heads, of_ids = PartitionSpec(*BATCH, None, "tensor"), PartitionSpec(None, *BATCH)
        specs = heads, heads, heads, of_ids, PartitionSpec()
        attend = jax.shard_map(attend, in_specs=specs, out_specs=heads, check_vma=False)
    return attend(q, k, v, ids, window)


@dataclass(frozen=True)
class _Form:
    """What is fixed when a kernel is compiled: slots of a tile, scale and cap of scores, whether to interpret it."""

    size: int
    scale: float
    softcap: float | None
    interpret: bool


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(form: _Form, q: Array, k: Array, v: Array, ids: Int[Array, "3 B s"], window: Window) -> Array:
    return _forward(form, q, k, v, ids, window)[0]


def _forward(form: _Form, q: Array, k: Array, v: Array, ids: Int[Array, "3 B s"], window: Window):
    length, size = q.shape[1], form.size
    q, k, v = (_to_tiles(x, size) for x in (q, k, v))
    batch, heads, padded, width = q.shape
    outputs = {
        "out": jax.ShapeDtypeStruct(q.shape, v.dtype),
        "lse": jax.ShapeDtypeStruct((batch, heads, 1, padded), jnp.float32),
    }
    sums = [(width, size), (1, size), (1, size)]
    out, lse = _run(_forward_kernel, form, ids, window, {"q": q, "k": k, "v": v}, outputs, sums)
    return _from_tiles(out, length), (q, k, v, out, lse, ids, window)


def _backward(form: _Form, residuals: tuple, dout: Array):
    q, k, v, out, lse, ids, window = residuals
    length, size = dout.shape[1], form.size
    sums = [(size, q.shape[-1])]
    dout = _to_tiles(dout, size)
    # The softmax passes on weights * (dweights - delta), where delta = sum(weights * dweights) over keys = out . dout.
    delta = (out.astype(jnp.float32) * dout.astype(jnp.float32)).sum(-1)[:, :, None]
    inputs = {"q": q, "k": k, "v": v, "dout": dout, "lse": lse, "delta": delta}
    (dq,) = _run(_dq_kernel, form, ids, window, inputs, {"q": q}, sums)
    dk, dv = _run(_dkv_kernel, form, ids, window, inputs, {"k": k, "v": v}, sums * 2, by_key=True)
    return *(_from_tiles(x, length) for x in (dq, dk, dv)), None, None


_attend.defvjp(_forward, _backward)


def _run(
    kernel, form: _Form, ids: Int[Array, "3 B s"], window: Window, inputs, outputs, sums, *, by_key=False
) -> list[Array]:
    """Runs a kernel on the tiles of scores.

    The grid is (row of the batch, head, tile of queries, step): at a step the queries meet the keys so many tiles
    before them. Where `by_key`, it is (row, group, tile of keys, head of the group, step): the keys meet the queries so
    many tiles after them. A step beyond a tile's reach computes nothing, and reads again what the last one read, which
    costs nothing.

    Args:
        kernel: Function of what makes scores (see `_scores`), the reach, and, as references, the three that follow.
        form: What is fixed.
        ids: Of the slots, for `sees`.
        window: For `sees`.
        inputs: Name -> array of S slots; the name tells which part of it belongs to a tile.
        outputs: Name -> shape and type.
        sums: Shapes of what is kept, in float32, from one step to the next.
        by_key: See above.

    Returns:
        The outputs.
    """
    (batch, heads, length, width), groups = inputs["q"].shape, inputs["k"].shape[1]
    size, share, tiles = form.size, heads // groups, length // form.size
    # What fills the last tile comes after all tokens, so that none sees it.
    ids = jnp.pad(ids, ((0, 0), (0, 0), (0, length - ids.shape[2])), constant_values=-1)
    blocks, _, positions = ids.reshape(3, batch, tiles, size)
    scalars = [_reach(blocks, positions, window)[by_key], *([] if window is None else [window.reshape(1)])]
    inner = (share, tiles) if by_key else (tiles,)

    def at(b, head_or_group, tile, *rest):  # row, head, group, tile of queries, tile of keys
        *head, step, reach = rest[: len(inner) + 1]
        other = jnp.minimum(step, reach[b, tile])
        if by_key:
            return b, head_or_group * share + head[0], head_or_group, tile + other, tile
        return b, head_or_group, head_or_group // share, tile, tile - other

    def spec(shape, index):
        return pl.BlockSpec(shape, lambda *indices: index(*at(*indices)))

    of_query = spec((None, None, size, width), lambda b, h, g, query, key: (b, h, query, 0))
    of_key = spec((None, None, size, width), lambda b, h, g, query, key: (b, g, key, 0))
    of_score = spec((None, None, 1, size), lambda b, h, g, query, key: (b, h, 0, query))
    specs = {"q": of_query, "k": of_key, "v": of_key, "out": of_query, "dout": of_query}
    specs |= {"lse": of_score, "delta": of_score}
    query_ids = spec((None, 3, size), lambda b, h, g, query, key: (b, 0, query))
    key_ids = spec((None, size, 3), lambda b, h, g, query, key: (b, key, 0))

    def run_kernel(reach, *refs):
        step = pl.program_id(2 + len(inner))
        limit, query_ids, key_ids, *refs = (None, *refs) if window is None else refs
        kernel(partial(_scores, form, step, query_ids, key_ids, limit), reach, *refs)

    return pl.pallas_call(
        run_kernel,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs.values()],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(batch, groups if by_key else heads, tiles, *inner),
            in_specs=[query_ids, key_ids, *(specs[name] for name in inputs)],
            out_specs=[specs[name] for name in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in sums],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3 + ("arbitrary",) * len(inner)),
        interpret=form.interpret,
        name=f"flash{kernel.__name__}",
    )(*scalars, rearrange(ids, "i b s -> b i s"), rearrange(ids, "i b s -> b s i"), *inputs.values())


def _reach(
    blocks: Int[Array, "B n T"], positions: Int[Array, "B n T"], window: Window
) -> tuple[Int[Array, "B n"], Int[Array, "B n"]]:
    """How many tiles back a tile's queries may see a key, and how many tiles on a tile's keys may be seen.

    Branches are not looked at, and where blocks do not follow each other, both numbers may be larger than they must be.
    """
    blocks = jnp.where(blocks < 0, jnp.iinfo(blocks.dtype).max, blocks)  # a row's end, which keeps the ranges short
    low, high = blocks.min(-1), blocks.max(-1)
    meet = (low[:, :, None] <= high[:, None]) & (low[:, None] <= high[:, :, None])
    if window is not None:
        # Where a block goes on from tile to tile, it is the last one of the keys' and the first one of the queries'.
        last = jnp.where(blocks == high[..., None], positions, -1).max(-1)
        first = jnp.where(blocks == low[..., None], positions, jnp.iinfo(positions.dtype).max).min(-1)
        meet &= (low[:, :, None] < high[:, None]) | (first[:, :, None] - last[:, None] < window)
    tiles = jnp.arange(blocks.shape[1], dtype=jnp.int32)
    distance = jnp.where(meet, tiles[:, None] - tiles, 0)  # [B, queries, keys]; negative where keys come after queries
    return distance.max(2), distance.max(1)


def _forward_kernel(score, reach, q, k, v, out, lse, sums, top, total):
    row, tile, step, steps = pl.program_id(0), pl.program_id(2), pl.program_id(3), pl.num_programs(3)

    @pl.when(step == 0)
    def _():
        sums[...], top[...] = jnp.zeros_like(sums), jnp.full_like(top, MASKED)
        total[...] = jnp.zeros_like(total)

    # The first step holds each query's own key, so that `top` is the score of one that it sees.
    @pl.when(step <= reach[row, tile])
    def _():
        scores, _ = score(q, k)
        higher = jnp.maximum(top[...], scores.max(0, keepdims=True))
        weights, shrink = jnp.exp(scores - higher), jnp.exp(top[...] - higher)
        sums[...] = shrink * sums[...] + _product(v[...], weights.astype(v.dtype), _FIRST)
        total[...] = shrink * total[...] + weights.sum(0, keepdims=True)
        top[...] = higher

    @pl.when(step == steps - 1)
    def _():
        out[...] = (sums[...] / total[...]).T.astype(out.dtype)
        lse[...] = top[...] + jnp.log(total[...])


def _dq_kernel(score, reach, q, k, v, dout, lse, delta, dq, sums):
    row, tile, step, steps = pl.program_id(0), pl.program_id(2), pl.program_id(3), pl.num_programs(3)

    @pl.when(step == 0)
    def _():
        sums[...] = jnp.zeros_like(sums)

    @pl.when(step <= reach[row, tile])
    def _():
        _, dscores = _weights_and_dscores(score, q, k, v, dout, lse, delta)
        sums[...] += _product(dscores.astype(k.dtype), k[...], _FIRST)

    @pl.when(step == steps - 1)
    def _():
        dq[...] = sums[...].astype(dq.dtype)


def _dkv_kernel(score, reach, q, k, v, dout, lse, delta, dk, dv, k_sums, v_sums):
    row, tile = pl.program_id(0), pl.program_id(2)
    head, heads, step, steps = pl.program_id(3), pl.num_programs(3), pl.program_id(4), pl.num_programs(4)

    @pl.when((head == 0) & (step == 0))
    def _():
        k_sums[...], v_sums[...] = jnp.zeros_like(k_sums), jnp.zeros_like(v_sums)

    @pl.when(step <= reach[row, tile])
    def _():
        weights, dscores = _weights_and_dscores(score, q, k, v, dout, lse, delta)
        k_sums[...] += jnp.dot(dscores.astype(q.dtype), q[...], preferred_element_type=jnp.float32)
        v_sums[...] += jnp.dot(weights.astype(dout.dtype), dout[...], preferred_element_type=jnp.float32)

    @pl.when((head == heads - 1) & (step == steps - 1))
    def _():
        dk[...], dv[...] = k_sums[...].astype(dk.dtype), v_sums[...].astype(dv.dtype)


def _scores(form, step, query_ids, key_ids, window, q, k) -> tuple[Float[Array, "T T"], Float[Array, "T T"] | float]:
    """Scores [keys, queries] of a tile whose keys lie `step` tiles before its queries, and their slope by products."""
    scores, slope = _product(k[...], q[...], _LAST) * form.scale, form.scale
    if form.softcap is not None:
        bounded = jnp.tanh(scores / form.softcap)
        scores, slope = form.softcap * bounded, form.scale * (1 - bounded**2)
    slot = [jax.lax.broadcasted_iota(jnp.int32, scores.shape, axis) for axis in (0, 1)]
    key = (slot[0], *(key_ids[:, i : i + 1] for i in range(3)))
    query = (slot[1] + step * form.size, *(query_ids[i : i + 1] for i in range(3)))
    return jnp.where(sees(query, key, None if window is None else window[0]), scores, MASKED), slope


def _weights_and_dscores(score, q, k, v, dout, lse, delta):
    scores, slope = score(q, k)
    weights = jnp.exp(scores - lse[...])
    dweights = _product(v[...], dout[...], _LAST)
    return weights, weights * (dweights - delta[...]) * slope


def _product(x: Array, y: Array, summed) -> Array:
    return jax.lax.dot_general(x, y, (summed, ((), ())), preferred_element_type=jnp.float32)


def _tile_size(length: int, block_size: int) -> int:
    # As few tiles as of `block_size`, but no longer than they must be, so that little is padded.
    tiles = -(-length // block_size)
    return -(-length // (tiles * _LANES)) * _LANES


def _to_tiles(x: Float[Array, "B s H D"], size: int) -> Float[Array, "B H S D"]:
    return jnp.pad(rearrange(x, "b s h d -> b h s d"), ((0, 0), (0, 0), (0, -x.shape[1] % size), (0, 0)))


def _from_tiles(x: Float[Array, "B H S D"], length: int) -> Float[Array, "B s H D"]:
    return rearrange(x[:, :, :length], "b h s d -> b s h d")
