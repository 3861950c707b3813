"""cuDNN's attention: its gathers run here on XLA's attention (see also test_attention.py), its programs for an H100."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from qstar_jax.config import ComputeOptions, MeshOptions
from qstar_jax.data.batches import make_batch
from qstar_jax.data.packing import Shapes
from qstar_jax.data.tokenization import Example, Response
from qstar_jax.errors import InputError
from qstar_jax.models import attention, cudnn_attention
from qstar_jax.models.attention import masked_attention
from qstar_jax.models.decoder_config import LayerKind
from qstar_jax.models.masks import PackedMask, Texts
from qstar_jax.models.rope import Rope
from qstar_jax.scoring import score_policy
from qstar_jax.sharding import BATCH, make_mesh

on_xla = partial(cudnn_attention.cudnn_attention, implementation="xla")
WINDOWS = {"layers": (LayerKind(Rope(10000.0), window=3), LayerKind(Rope(10000.0), window=5))}


@pytest.fixture
def cudnn_on_xla(monkeypatch):
    monkeypatch.setattr(attention, "cudnn_attention", on_xla)


def examples(responses=2):
    """Five prompts with responses; all lengths differ, and one response is empty."""
    rng = np.random.default_rng(0)

    def ids(length):
        return rng.integers(3, 60, length).astype(np.int32)

    return [
        Example(ids(prompt), False, tuple(Response(ids(prompt % 4 * 2 + 3 * r), False) for r in range(responses)), row)
        for row, prompt in enumerate((4, 9, 3, 1, 6))
    ]


def batch_of(layout, row_length=40, shards=1, **options):
    shapes = Shapes.of(examples(), layout, batch_size=5, row_length=row_length, shards=shards, **options)
    return jax.tree.map(jnp.asarray, make_batch(examples(), shapes))


def arrays(batch, heads=4, groups=2, width=8, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=(*batch.tokens.shape, n, width)), dtype) for n in (heads, groups, groups))


def test_two_responses_to_a_prompt_by_hand():
    # The prompt's values are 0 and 4, the responses' 8 and 12; equal scores average over what a query sees.
    mask = PackedMask(
        jnp.array([[0, 0, 0, 0]]),
        jnp.array([[0, 0, 1, 2]]),
        Texts(jnp.array([[0, 1, 2], [0, 1, 3]]), jnp.array([[[0, 3], [1, 4], [2, -1], [5, -1]]])),
    )
    q, k, v = (jnp.array(x, jnp.float32).reshape(1, 4, 1, 1) for x in ([0] * 4, [1] * 4, [0, 4, 8, 12]))
    out = on_xla(q, k, v, mask, positions=jnp.array([[0, 1, 2, 2]]), scale=1.0)
    np.testing.assert_allclose(out.ravel(), [0, 2, 4, 16 / 3], rtol=1e-6)


@pytest.mark.parametrize("layout", ["packed", "shared", "plain"])
def test_a_model_scores_and_trains_the_same(layout, cudnn_on_xla, tiny_model, tiny_params, assert_norm_close):
    batch = batch_of(layout, texts=True)

    @partial(jax.jit, static_argnums=0)
    def logp_and_gradient(model):
        def loss(params):
            logp = score_policy(model, params, batch).logp
            return (logp**2).sum(), logp

        (_, logp), gradient = jax.value_and_grad(loss, has_aux=True)(tiny_params)
        return {"logp": logp, **gradient["layers"]}

    for layers in ({}, WINDOWS):
        model = replace(tiny_model, config=replace(tiny_model.config, **layers))
        results = [
            logp_and_gradient(replace(model, compute=ComputeOptions(attention=option))) for option in ("cudnn", "dense")
        ]
        assert_norm_close(*results, 1e-5)


@pytest.mark.parametrize("windows", [(), (None,), (5, None)])
def test_a_static_window_need_not_be_among_those_of_traced_ones(windows):
    batch = batch_of("packed", texts=True)
    mask, x = PackedMask(batch.blocks, batch.branches, batch.texts), arrays(batch)
    out = on_xla(*x, mask, positions=batch.positions, window=3, scale=1.0, windows=windows)
    expected = masked_attention(mask, batch.positions, "dense", scale=1.0)(*x, window=3)
    inside = batch.blocks >= 0
    np.testing.assert_allclose(out[inside], expected[inside], rtol=1e-5, atol=1e-5)


def test_what_may_not_be_seen_changes_no_bit():
    batch = batch_of("packed", texts=True)
    mask, (q, k, v) = PackedMask(batch.blocks, batch.branches, batch.texts), arrays(batch)
    attend = jax.jit(partial(on_xla, mask=mask, positions=batch.positions, scale=1.0))
    before, visible = attend(q, k, v), np.asarray(mask.dense())
    for slot in range(q.shape[1]):
        changed = attend(q, k.at[:, slot].add(1.0), v.at[:, slot].multiply(-3.0)) != before
        expected = visible[:, :, slot] & (batch.blocks >= 0)
        np.testing.assert_array_equal(changed.any((2, 3)), expected, err_msg=str(slot))


def test_what_cudnn_leaves_behind_the_end_of_a_text_reaches_nothing(monkeypatch):
    batch, attend = batch_of("packed", texts=True), jax.nn.dot_product_attention

    def leave_nan(q, k, v, *, query_seq_lengths, **options):
        inside = jnp.arange(q.shape[1]) < query_seq_lengths[:, None]
        out = attend(q, k, v, query_seq_lengths=query_seq_lengths, **options)
        return jnp.where(inside[..., None, None], out, jnp.nan)

    monkeypatch.setattr(jax.nn, "dot_product_attention", leave_nan)
    packed = PackedMask(batch.blocks, batch.branches, batch.texts)
    padded = PackedMask.of_lengths(jnp.arange(len(batch.tokens)) + 5, batch.tokens.shape[1])
    for mask in (packed, padded):
        out, pull_back = jax.vjp(partial(on_xla, mask=mask, positions=mask.blocks, scale=1.0), *arrays(batch))
        padding = (mask.blocks < 0)[..., None, None]
        for x in (out, *pull_back(jnp.ones_like(out))):
            assert np.isfinite(x).all() and not np.where(padding, x, 0).any()


@pytest.fixture
def compiled_for_h100s(devices_of):
    """`compiled(count, length, window)`: attention and its gradients over two responses each, on so many H100s."""

    def compiled(count, length, window=None, windows=()):
        mesh = make_mesh(MeshOptions(data=count), devices_of("h100:1x1x2")[:count])

        def step(q, k, v, mask, window):
            attend = masked_attention(mask, mask.blocks, "auto", scale=0.125, windows=windows)
            out, pull_back = jax.vjp(partial(attend, window=window), q, k, v)
            return pull_back(out)

        def shape(*sizes, dtype=jnp.int32):
            return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, BATCH))

        q, k = (shape(8, length, heads, 64, dtype=jnp.bfloat16) for heads in (32, 8))
        texts = Texts(shape(16, length // 2 + 64), shape(8, length, 2), count)
        mask_of_texts = PackedMask(shape(8, length), shape(8, length), texts)
        window = window and jax.ShapeDtypeStruct((), jnp.int32)
        with jax.set_mesh(mesh):
            return jax.jit(step).lower(q, k, k, mask_of_texts, window).compile()

    return compiled


def test_programs_for_an_h100(compiled_for_h100s):
    short, long = compiled_for_h100s(1, 1024), compiled_for_h100s(1, 4096)
    counts = [long.as_text().count(f'"__cudnn$fmhaSoftmax{backward}"') for backward in ("", "Backward")]
    assert counts == [2, 1]  # forward, and again in the backward pass
    # Memory grows with the length, not with its square.
    temporary = [program.memory_analysis().temp_size_in_bytes for program in (short, long)]
    assert 3 * temporary[0] < temporary[1] < 4.5 * temporary[0]


def test_programs_for_two_h100s_and_windows(compiled_for_h100s):
    text = compiled_for_h100s(2, 1024, window=256, windows=(256, None)).as_text()
    assert text.count('"__cudnn$fmhaSoftmaxBackward"') == 2  # one for each branch
    assert "conditional(" in text
    # The texts of a sequence are on its device.
    assert not any(name in text for name in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))


def test_why_not():
    batch = batch_of("packed", texts=True)
    mask, x = PackedMask(batch.blocks, batch.branches, batch.texts), arrays(batch)
    options = {"window": None, "windows": (), "scale": 1.0, "softcap": None}

    def reason(mask=mask, implementation="xla", **changes):
        return cudnn_attention.why_not(*x, mask, implementation=implementation, **options | changes)

    assert reason() is None
    assert "needs an NVIDIA GPU, and JAX runs on cpu" in reason(implementation="cudnn")
    assert "cannot cap scores, and this model caps them at 2.0" in reason(softcap=2.0)
    assert "the window is traced" in reason(window=jnp.int32(3))
    assert reason(window=jnp.int32(3), windows=(3, None)) is None
    assert "does not list the texts" in reason(PackedMask(batch.blocks, batch.branches))
    with jax.set_mesh(make_mesh(MeshOptions(data=2), jax.devices()[:2])):
        assert "in 1 shards, not in mesh.data * mesh.fsdp = 2" in reason()
    with jax.set_mesh(make_mesh(MeshOptions(data=8))):
        assert "cannot be sharded over mesh.data * mesh.fsdp = 8" in reason()
    with jax.set_mesh(make_mesh(MeshOptions(data=1, tensor=4), jax.devices()[:4])):
        assert "2 groups of heads cannot be sharded over mesh.tensor = 4" in reason()


def test_auto_takes_it_on_a_gpu_where_it_can_and_says_so_once(monkeypatch):
    batch = batch_of("packed", texts=True)
    mask, (q, k, v) = PackedMask(batch.blocks, batch.branches, batch.texts), arrays(batch)
    monkeypatch.setattr(attention, "platform", lambda: "gpu")
    reasons = iter([None, None, "cuDNN is not there", "cuDNN is not there"])
    monkeypatch.setattr(attention, "why_not", lambda *_, **__: next(reasons))
    monkeypatch.setattr(attention, "cudnn_attention", on_xla)
    attention._log_once.cache_clear()
    said = []
    monkeypatch.setattr(attention._log, "info", said.append)
    outs = [masked_attention(mask, batch.positions, "auto", scale=1.0)(q, k, v) for _ in range(4)]
    assert said == ["attention: cuDNN", "attention: blockwise, not cuDNN: cuDNN is not there"]
    for out in outs:
        np.testing.assert_allclose(out[batch.blocks >= 0], outs[0][batch.blocks >= 0], rtol=1e-5, atol=1e-5)


def test_what_is_asked_for_is_refused_where_it_cannot_be():
    batch = batch_of("packed", texts=True)
    mask = PackedMask(batch.blocks, batch.branches, batch.texts)
    with pytest.raises(InputError, match=r"compute\.attention cudnn: it needs an NVIDIA GPU.* to blockwise"):
        masked_attention(mask, batch.positions, "cudnn", scale=1.0)(*arrays(batch))
