"""The TPU kernels: run as plain JAX here, lowered for TPUs, and compiled for them where libtpu is installed."""

import subprocess
import sys
import textwrap
from dataclasses import replace
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from qstar_jax.config import ComputeOptions, MeshOptions
from qstar_jax.errors import InputError
from qstar_jax.models import attention
from qstar_jax.models.attention import blockwise_attention, dense_attention, masked_attention
from qstar_jax.models.decoder_config import LayerKind
from qstar_jax.models.flash_attention import _reach, flash_attention
from qstar_jax.models.masks import PackedMask
from qstar_jax.models.rope import Rope
from qstar_jax.sharding import AXES, make_mesh


def plainly(q, k, v, mask, **options):
    """Without a window or a cap, with the usual scale."""
    positions = jnp.broadcast_to(jnp.arange(q.shape[1]), q.shape[:2])
    return flash_attention(q, k, v, mask, **{"positions": positions, "scale": q.shape[-1] ** -0.5} | options)


interpreted = partial(plainly, block_size=128, interpret=True)
WINDOWS_AND_CAP = {  # of a model of two layers
    "layers": (LayerKind(Rope(10000.0), window=3), LayerKind(Rope(10000.0))),
    "score_softcap": 2.0,
    "attention_scale": 0.6,
}
SHAPE = (150, 4, 2, 8)  # of most tests, as each shape is compiled anew: two tiles, the second one short


def packed_mask(length: int, rows: int = 4) -> PackedMask:
    """Rows of three blocks with two or three branches each, cut elsewhere in every row; 1/16 and more is padding."""
    blocks, branches = np.full((rows, length), -1), np.zeros((rows, length), int)
    for row in range(rows):
        cuts = np.linspace(0, length * (15 - row % 3) // 16, 4).astype(int)
        for block, (start, stop) in enumerate(pairwise(cuts)):
            blocks[row, start:stop] = block
            responses = np.linspace(start + (stop - start) // 3, stop, 3 + (block + row) % 2).astype(int)
            for response, (a, b) in enumerate(pairwise(responses)):
                branches[row, a:b] = response + 1
    return PackedMask(jnp.asarray(blocks), jnp.asarray(branches))


def scattered_mask(length: int, rows: int = 4) -> PackedMask:
    """Blocks and branches in no order at all."""
    rng = np.random.default_rng(1)
    return PackedMask(*(jnp.asarray(rng.integers(low, 3, (rows, length))) for low in (-1, 0)))


def one_block(length: int, rows: int = 4) -> PackedMask:
    """Plain causal rows."""
    return PackedMask(*jnp.zeros((2, rows, length), int))


def positions_of(mask: PackedMask) -> jax.Array:
    """Places in blocks, where each branch goes on from what its block shares; 0 in padding. Shape [B, S]."""
    before = jnp.tril(jnp.ones((mask.blocks.shape[1],) * 2, bool), -1)
    return jnp.where(mask.blocks < 0, 0, (mask.dense() & before).sum(-1))


def dense(q, k, v, mask):
    return jax.nn.dot_product_attention(q, k, v, mask=mask.dense()[:, None])


def arrays(length, heads, groups, width, rows=4, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=(rows, length, n, width)), dtype) for n in (heads, groups, groups))


@partial(jax.jit, static_argnums=0)
def outputs_and_gradients(attend, q, k, v, mask):
    out, pull_back = jax.vjp(lambda *x: attend(*x, mask), q, k, v)
    slope = jax.random.normal(jax.random.key(3), out.shape).astype(out.dtype)
    return dict(zip(("out", "dq", "dk", "dv"), (out, *pull_back(slope)), strict=True))


@pytest.mark.thin("150-4-2-8", "37-4-1-8")
@pytest.mark.parametrize(
    ("length", "heads", "groups", "width"),
    [
        SHAPE,
        (300, 6, 2, 24),  # three tiles
        (256, 2, 2, 64),  # no padding
        (37, 4, 1, 8),  # shorter than a tile
    ],
)
def test_dense_attention_is_met_forward_and_backward(length, heads, groups, width, assert_norm_close):
    x = arrays(length, heads, groups, width)
    for make_mask in (packed_mask, scattered_mask, one_block):
        mask = make_mask(length)
        assert_norm_close(outputs_and_gradients(interpreted, *x, mask), outputs_and_gradients(dense, *x, mask), 1e-5)


def test_bfloat16_loses_what_its_eight_bits_lose(assert_norm_close):
    x, mask = arrays(*SHAPE, dtype=jnp.bfloat16), packed_mask(SHAPE[0])
    actual = outputs_and_gradients(interpreted, *x, mask)
    assert {y.dtype for y in actual.values()} == {jnp.dtype(jnp.bfloat16)}
    exact = outputs_and_gradients(dense, *(y.astype(jnp.float32) for y in x), mask)
    assert_norm_close(actual, exact, 1e-2)  # 2.5 units of the last place, 2 ** -8


def test_what_may_not_be_seen_changes_no_bit():
    (q, k, v), mask = arrays(*SHAPE), packed_mask(SHAPE[0])
    before, visible = outputs_and_gradients(interpreted, q, k, v, mask)["out"], np.asarray(mask.dense())
    for slot in (0, 20, 30, 45, 60, 128, 141, 149):
        other = k.at[:, slot].add(1.0), v.at[:, slot].multiply(-3.0)
        changed = outputs_and_gradients(interpreted, q, *other, mask)["out"] != before
        np.testing.assert_array_equal(changed.any((2, 3)), visible[:, :, slot], err_msg=str(slot))


def seen_tiles(mask, positions, window, size):
    """Whether a query of one tile has a key of another in its block and window, whatever their branches are."""
    block, slots = mask.blocks, jnp.arange(mask.blocks.shape[1])
    seen = (block[:, :, None] == block[:, None]) & (slots[:, None] >= slots)
    seen &= positions[:, :, None] - positions[:, None] < window
    return seen.reshape(len(block), -1, size, len(slots) // size, size).any((2, 4))


@pytest.mark.parametrize("window", [1, 7, 16, 17, 40, 2**31 - 1])
def test_tiles_reach_as_far_as_windows_and_no_further(window):
    size, tiles = 16, jnp.arange(8)
    for make_mask in (packed_mask, one_block, scattered_mask):
        mask = make_mask(8 * size)
        positions = positions_of(mask)
        distance = jnp.where(seen_tiles(mask, positions, window, size), tiles[:, None] - tiles, 0)
        actual = _reach(*(x.reshape(4, 8, size) for x in (mask.blocks, positions)), jnp.int32(window))
        for reach, needed in zip(actual, (distance.max(2), distance.max(1)), strict=True):
            assert (reach >= needed).all()
            if make_mask is not scattered_mask:
                np.testing.assert_array_equal(reach, needed)


def test_what_lies_behind_the_window_is_not_even_read():
    """A tile that was read would bring its NaN with it, at whatever weight."""
    (q, k, v), mask = arrays(384, 2, 1, 8, rows=2), one_block(384, rows=2)
    attend = partial(interpreted, mask=mask)
    rotten = [x.at[:, :128].set(jnp.nan) for x in (k, v)]

    @jax.jit
    def last_tile(q, k, v, window):
        return jax.value_and_grad(lambda q: (attend(q, k, v, window=window)[:, 256:] ** 2).sum())(q)

    for window, reads in ((129, False), (130, True)):
        out, dq = last_tile(q, *rotten, jnp.int32(window))
        assert np.isnan(out) == reads and np.isnan(dq[:, 256:]).any() == reads

    @jax.jit
    def first_tile(k, v, window):  # what the queries of the last tile are must not matter
        out, pull_back = jax.vjp(lambda k, v: attend(q.at[:, 256:].set(jnp.nan), k, v, window=window), k, v)
        return [x[:, :128] for x in pull_back(jnp.ones_like(out))]

    for window, reads in ((129, False), (130, True)):
        assert np.isnan(first_tile(k, v, jnp.int32(window))).any() == reads


def test_tiles_reach_as_far_as_they_must():
    size = 16
    for make_mask in (packed_mask, scattered_mask, one_block):
        mask = make_mask(8 * size)
        seen = mask.dense().reshape(4, 8, size, 8, size).any((2, 4))
        distance = jnp.where(seen, jnp.arange(8)[:, None] - jnp.arange(8), 0)
        back, ahead = _reach(mask.blocks.reshape(4, 8, size), None, None)
        assert (back >= distance.max(2)).all() and (ahead >= distance.max(1)).all()
    blocks = jnp.repeat(jnp.array([[0, 0, 1, 2, 2, 2, -1, -1]]), size, axis=1).reshape(1, 8, size)
    back, ahead = _reach(blocks, None, None)
    np.testing.assert_array_equal(back, [[0, 1, 0, 0, 1, 2, 0, 1]])
    np.testing.assert_array_equal(ahead, [[1, 0, 0, 2, 1, 0, 1, 0]])


def test_eight_devices_compute_what_one_does(assert_norm_close):
    x, mask = arrays(*SHAPE), packed_mask(SHAPE[0])
    expected = outputs_and_gradients(interpreted, *x, mask)
    with jax.set_mesh(make_mesh(MeshOptions(data=2, fsdp=2, tensor=2))):
        actual = outputs_and_gradients(interpreted, *x, mask)
    assert len(actual["out"].sharding.device_set) == 8
    assert_norm_close(actual, expected, 1e-6)


def long_dimensions(jaxpr, length: int) -> int:
    """The most dimensions of at least `length` that any array computed in it has, also within kernels."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    counts = [sum(n >= length for n in getattr(x.aval, "shape", ())) for e in jaxpr.eqns for x in e.outvars]
    params = [x for e in jaxpr.eqns for v in e.params.values() for x in (v if isinstance(v, tuple | list) else [v])]
    inner = [long_dimensions(x, length) for x in params if hasattr(getattr(x, "jaxpr", x), "eqns")]
    return max(counts + inner, default=0)


def test_no_array_has_two_dimensions_of_the_length():
    x, mask = jax.eval_shape(lambda: (arrays(2048, 2, 1, 8), packed_mask(2048)))
    assert long_dimensions(jax.make_jaxpr(partial(outputs_and_gradients, interpreted))(*x, mask), 2048) == 1
    assert long_dimensions(jax.make_jaxpr(partial(outputs_and_gradients, dense))(*x, mask), 2048) == 2


@pytest.mark.parametrize("softcap", [None, 50.0])
@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1, 2)])
def test_the_kernels_lower_for_tpus(sizes, windowed, softcap):
    device = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    mesh = AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, abstract_device=device)
    x, mask = jax.eval_shape(lambda: (arrays(300, 4, 2, 64, dtype=jnp.bfloat16), packed_mask(300)))
    form = {"softcap": softcap, "interpret": False}

    @jax.jit
    def compiled(window, *x):
        return outputs_and_gradients(partial(plainly, window=window if windowed else None, **form), *x)

    with jax.sharding.use_abstract_mesh(mesh):
        lowered = compiled.trace(jnp.int32(9), *x, mask).lower(lowering_platforms=("tpu",))
    assert lowered.as_text().count("@tpu_custom_call(") == 3


@pytest.mark.compiled
def test_the_kernels_compile_for_tpus():
    """By the real compiler, for a v5e of four chips that need not be there; in a process of its own."""
    pytest.importorskip("libtpu")
    script = """
        from functools import partial
        import jax, jax.numpy as jnp
        from jax.sharding import NamedSharding, PartitionSpec as P
        from qstar_jax.config import MeshOptions
        from qstar_jax.models.flash_attention import flash_attention
        from qstar_jax.models.masks import PackedMask
        from qstar_jax.plan.topology import topology_devices
        from qstar_jax.sharding import BATCH, make_mesh

        devices = topology_devices("v5e:2x2")

        def step(window, softcap, q, k, v, dout, blocks, branches):
            form = {"positions": blocks, "scale": q.shape[-1] ** -0.5, "interpret": False}
            attend = partial(flash_attention, mask=PackedMask(blocks, branches), window=window, softcap=softcap, **form)
            out, pull_back = jax.vjp(attend, q, k, v)
            return out, pull_back(dout)

        number = jax.ShapeDtypeStruct((), jnp.int32)
        for options, shape, window, softcap in (
            (MeshOptions(data=1), (4, 2048, 32, 8, 128), None, None),
            (MeshOptions(data=1), (4, 2048, 9, 3, 64), None, None),
            (MeshOptions(data=1), (4, 2048, 9, 3, 64), number, None),
            (MeshOptions(data=1), (4, 2048, 8, 4, 256), number, 50.0),
            (MeshOptions(data=2, tensor=2), (4, 2048, 32, 8, 128), None, None),
            (MeshOptions(data=2, tensor=2), (4, 2048, 8, 4, 256), number, 50.0),
        ):
            batch, length, heads, groups, width = shape
            mesh = make_mesh(options, devices[: options.data * options.tensor])
            with jax.set_mesh(mesh):
                spec = NamedSharding(mesh, P(*BATCH, None, "tensor"))
                q, k = (
                    jax.ShapeDtypeStruct((batch, length, n, width), jnp.bfloat16, sharding=spec)
                    for n in (heads, groups)
                )
                ids = jax.ShapeDtypeStruct((batch, length), jnp.int32, sharding=NamedSharding(mesh, BATCH))
                compiled = jax.jit(step, static_argnums=1).lower(window, softcap, q, k, k, q, ids, ids).compile()
            assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 3
            scores = 4 * batch * heads * length * length // len(mesh.devices.flat)  # one float32 array of them
            assert compiled.memory_analysis().temp_size_in_bytes < scores / 8
        print("compiled")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert done.stdout.strip() == "compiled", done.stderr


def test_what_cannot_be_computed_is_said():
    x, mask = arrays(16, 2, 1, 8), packed_mask(16)
    with pytest.raises(InputError, match=r"need a TPU, and JAX runs on cpu; set compute\.attention to blockwise"):
        plainly(*x, mask)
    with pytest.raises(InputError, match="block_size is 100"):
        plainly(*x, mask, block_size=100, interpret=True)
    with (
        jax.set_mesh(make_mesh(MeshOptions(data=4, fsdp=2))),
        pytest.raises(InputError, match=r"4 sequences cannot be sharded over mesh\.data \* mesh\.fsdp = 8 devices"),
    ):
        interpreted(*x, mask)
    with (
        jax.set_mesh(make_mesh(MeshOptions(data=1, tensor=2), jax.devices()[:2])),
        pytest.raises(InputError, match=r"2 heads in 1 groups cannot be sharded over mesh\.tensor = 2"),
    ):
        interpreted(*x, mask)


def test_each_option_means_one_way(monkeypatch):
    mask = packed_mask(16)
    ways = {"blockwise": blockwise_attention, "flash": flash_attention, "dense": dense_attention}
    for backend, auto in {"tpu": "flash", "cpu": "blockwise"}.items():  # for GPUs, see test_cudnn_attention.py
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        for option in ("auto", *ways):
            choose = partial(masked_attention, positions=mask.blocks, option=option, scale=1.0)
            assert choose(mask).func is ways[auto if option == "auto" else option]
            assert choose(mask.dense()).func is ways["dense"]


@pytest.mark.parametrize("changes", [{}, WINDOWS_AND_CAP], ids=["plain", "windows and cap"])
def test_a_model_trains_the_same(changes, monkeypatch, tiny_model, tiny_params, assert_norm_close):
    tokens = jnp.asarray(np.random.default_rng(0).integers(3, 60, (2, 48)))
    mask = packed_mask(48, rows=2)
    positions, config = positions_of(mask), replace(tiny_model.config, **changes)

    def gradient(attention):
        model = replace(tiny_model, config=config, compute=ComputeOptions(attention=attention, remat="full"))
        return jax.jit(jax.grad(lambda params: (model.hidden_states(params, tokens, positions, mask) ** 3).sum()))(
            tiny_params
        )

    with pytest.raises(InputError, match=r"compute\.attention flash"):
        gradient("flash")
    monkeypatch.setattr(attention, "flash_attention", partial(flash_attention, block_size=128, interpret=True))
    assert_norm_close(gradient("flash")["layers"], gradient("dense")["layers"], 1e-5)
