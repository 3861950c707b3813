"""Every fast path to loss and gradient equals the plain one in float32: a response per sequence, one micro-batch."""

import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax.config import ComputeOptions, DataOptions, MeshOptions, OptimizerOptions
from qstar_jax.data.batches import make_batch
from qstar_jax.data.feeder import Feeder
from qstar_jax.data.loading import Dataset
from qstar_jax.data.packing import Shapes
from qstar_jax.data.tokenization import Response
from qstar_jax.losses import make_loss
from qstar_jax.models import attention
from qstar_jax.models.attention import _attend_batched, _attend_sequentially, blockwise_attention, scale_and_cap
from qstar_jax.models.masks import PackedMask, visible
from qstar_jax.scoring import score_policy
from qstar_jax.sharding import make_mesh
from qstar_jax.training.objectives import preference_loss_fn, sft_loss_fn
from qstar_jax.training.optimizers import make_optimizer
from qstar_jax.training.step import TrainState, make_train_step

EOS = 2
LOSS = make_loss(beta=0.5, label_smoothing=0.1)


@pytest.fixture(scope="module")
def examples(random_examples):
    """Eight pairs: a prompt of one token, an empty response, truncated ones; most responses end with EOS."""
    examples = random_examples(8, seed=5)
    ended = [
        replace(e, responses=tuple(Response(np.append(r.ids[:-1], EOS).astype(np.int32), False) for r in e.responses))
        for e in examples
    ]
    ended[3] = replace(ended[3], responses=(ended[3].responses[0], Response(np.zeros(0, np.int32), True)))
    ended[6] = replace(ended[6], responses=tuple(Response(r.ids, True) for r in examples[6].responses))
    return ended


@pytest.fixture(scope="module")
def ref_params(tiny_params):
    return jax.tree.map(lambda x: x * 1.05 + 0.01, tiny_params)


@pytest.fixture(scope="module")
def same(assert_norm_close):
    """Loss and gradients within 1e-5, relative; metrics too, or within 1e-5 where they nearly cancel."""

    def check(actual, expected):
        assert_norm_close(actual[0], expected[0], 1e-5)
        assert actual[1].keys() == expected[1].keys()
        for name, value in expected[1].items():
            np.testing.assert_allclose(actual[1][name], value, rtol=1e-5, atol=1e-5, err_msg=name)

    return check


def batch_of(examples, layout, row_length=48, **options):
    shapes = Shapes.of(examples, layout, batch_size=len(examples), row_length=row_length, multiple=4)
    return jax.tree.map(jnp.asarray, make_batch(examples, shapes, **options))


def loss_and_gradient(loss_fn, params, ref_params, batch):
    (loss, metrics), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params, ref_params, batch)
    means = {name: s / d for name, (s, d) in metrics.items() if not name.startswith("count/")}
    return {"loss": loss, "grads": grads}, means


@pytest.fixture(scope="module")
def plain(tiny_model, tiny_params, ref_params, examples):
    batch = batch_of(examples, "plain")
    return loss_and_gradient(preference_loss_fn(tiny_model, LOSS), tiny_params, ref_params, batch)


@pytest.mark.parametrize("attention", ["dense", "blockwise"])
@pytest.mark.parametrize("layout", ["shared", "packed"])
def test_layouts(layout, attention, tiny_model, tiny_params, ref_params, examples, plain, same):
    model = replace(tiny_model, compute=ComputeOptions(attention=attention))
    batch = batch_of(examples, layout)
    actual = loss_and_gradient(preference_loss_fn(model, LOSS), tiny_params, ref_params, batch)
    same(actual, plain)


def test_attention_by_blocks_of_long_rows(one_device):
    """Rows of several blocks, the last one short; both ways to compute them, values and gradients."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 37, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    blocks = jnp.asarray(np.repeat([[0, 1, -1]], 2, 0).repeat([18, 15, 4], axis=1))
    branches = jnp.asarray(np.repeat([[0, 1, 2, 0, 1, 0]], 2, 0).repeat([9, 5, 4, 9, 6, 4], axis=1))
    mask = PackedMask(blocks, branches)

    def total(attend, q, k, v):
        out = attend(q, k, v)
        return (jnp.where(blocks[..., None, None] >= 0, out, 0.0) ** 2).sum(), out

    score = partial(scale_and_cap, scale=8**-0.5, softcap=None)

    def dense(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, mask=mask.dense()[:, None])

    ways = {
        way: lambda q, k, v, blockwise=blockwise: blockwise(q, k, v, mask.ids(blocks), visible, score, 8)
        for way, blockwise in (("rows", _attend_sequentially), ("sides", _attend_batched))
    }
    gradient = jax.jit(jax.value_and_grad(total, argnums=(1, 2, 3), has_aux=True), static_argnums=0)
    expected = gradient(dense, q, k, v)
    for attend in ways.values():
        for x, y in zip(jax.tree.leaves(gradient(attend, q, k, v)), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_the_faster_way_is_taken_on_one_device_only(one_device, monkeypatch):
    taken = []
    for name in ("_attend_sequentially", "_attend_batched"):
        monkeypatch.setattr(attention, name, lambda q, *rest, name=name: taken.append(name) or q)
    x, mask = jnp.zeros((8, 4, 2, 8)), PackedMask(*jnp.zeros((2, 8, 4), int))
    for mesh in (one_device, make_mesh(MeshOptions(data=8))):
        with jax.set_mesh(mesh):
            blockwise_attention(x, x, x, mask, positions=mask.blocks, scale=1.0)
    assert taken == ["_attend_sequentially", "_attend_batched"]


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialisation(remat, tiny_model, tiny_params, ref_params, examples, plain, same):
    model = replace(tiny_model, compute=ComputeOptions(remat=remat))
    actual = loss_and_gradient(preference_loss_fn(model, LOSS), tiny_params, ref_params, batch_of(examples, "packed"))
    same(actual, plain)


def test_cached_reference(tiny_model, tiny_params, ref_params, examples, plain, same):
    logps = jax.jit(lambda *x: score_policy(tiny_model, *x).logp)(ref_params, batch_of(examples, "plain"))
    cached = [
        [np.asarray(logps[b, r, : len(response.ids)]) for r, response in enumerate(example.responses)]
        for b, example in enumerate(examples)
    ]
    batch = batch_of(examples, "packed", ref_logps=cached)
    actual = loss_and_gradient(preference_loss_fn(tiny_model, LOSS), tiny_params, None, batch)
    same(actual, plain)


@pytest.mark.parametrize("layout", ["plain", "shared", "packed"])
def test_first_loss_is_ln_2(layout, tiny_model, tiny_params, examples):
    loss_fn = jax.jit(preference_loss_fn(tiny_model, make_loss()))
    loss, _ = loss_fn(tiny_params, tiny_params, batch_of(examples, layout))
    np.testing.assert_allclose(loss, math.log(2), rtol=1e-6)


# An optimizer whose update shows the gradient itself.
PLAIN_STEP = OptimizerOptions(
    name="rmsprop", decay=0.0, eps=1e3, learning_rate=1e4, max_grad_norm=0.0, schedule="constant"
)


def one_step(loss_fn, examples, params, ref_params, mesh, accumulate, layout="packed"):
    dataset = Dataset(examples, (), "pairs.jsonl")
    options = DataOptions(layout=layout)
    feeder = Feeder(dataset, 8, mesh, options, "train.batch_size", accumulate=accumulate)
    optimizer = make_optimizer(PLAIN_STEP, 10)
    state = TrainState(jnp.int32(0), params, optimizer.init(params), ref_params)
    with jax.set_mesh(mesh):
        state, metrics = jax.jit(make_train_step(loss_fn, optimizer, accumulate=accumulate))(
            state, feeder.at_step(0, 0)
        )
    means = {name: s / d for name, (s, d) in metrics.items() if name != "count/slots"}
    return {"change": jax.tree.map(jnp.subtract, state.params, params)}, means


@pytest.mark.thin("dpo")
@pytest.mark.parametrize("objective", ["dpo", "sft"])
def test_accumulation_is_exact(objective, tiny_model, tiny_params, ref_params, examples, one_device, same):
    """1 x 8 = 2 x 4 = 8 x 1, although the denominators of micro-batches, which count tokens, differ."""
    loss_fn, reference, rows = preference_loss_fn(tiny_model, LOSS), ref_params, examples
    if objective == "sft":
        loss_fn, reference = sft_loss_fn(tiny_model), None
        rows = [replace(e, responses=e.responses[:1]) for e in examples]
    whole, halves, eighths = (
        one_step(loss_fn, rows, tiny_params, reference, one_device, accumulate) for accumulate in (1, 2, 8)
    )
    assert np.linalg.norm(jax.tree.leaves(whole[0])[0]) > 1e-3
    same(halves, whole)
    same(eighths, whole)
