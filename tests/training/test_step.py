import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from qstar_jax.config import MeshOptions, OptimizerOptions
from qstar_jax.losses import make_loss
from qstar_jax.models.decoder import SHARDING_OVERRIDES
from qstar_jax.sharding import BATCH, make_mesh, tree_shardings
from qstar_jax.store.open import param_shardings
from qstar_jax.training.objectives import preference_loss_fn
from qstar_jax.training.optimizers import make_optimizer
from qstar_jax.training.step import TrainState, make_train_step

# AdamW's first step is g / (|g| + eps): with a tiny eps the sign of gradients that are only rounding decides, and no
# two orders of summation agree. With eps far above every |g| the step is as smooth as the gradient. The rate is so high
# that the step moves the parameters about as far as they are large; else their comparison would show nothing.
SMOOTH = OptimizerOptions(learning_rate=30.0, eps=1.0, max_grad_norm=0.0, weight_decay=0.01, schedule="constant")
LOSS = make_loss(beta=0.5, label_smoothing=0.1)
MESHES = {
    "data 8": MeshOptions(data=8, min_shard_size=64),
    "fsdp 8": MeshOptions(data=1, fsdp=8, min_shard_size=64),
    "2 x 2 x 2": MeshOptions(data=2, fsdp=2, tensor=2, min_shard_size=64),
    "data 2, tensor 4": MeshOptions(data=2, tensor=4, min_shard_size=64),
}


@pytest.fixture(scope="module")
def ref_params(tiny_params):
    return jax.tree.map(lambda x: x * 1.05 + 0.01, tiny_params)


@pytest.fixture(scope="module")
def batch_for(pair_batch):
    """`batch_for(mesh)`: eight pairs, of which two have weight 0."""

    def make(mesh):
        return pair_batch(6, seed=3, fill_to=8, layout="shared", shards=mesh.shape["data"] * mesh.shape["fsdp"])

    return make


def place(tree, shardings):
    return jax.tree.map(jax.device_put, tree, shardings)


def one_step(model, params, ref_params, batch, mesh, options):
    """Loss, gradients and the state after one optimizer step, computed on `mesh` by the program that trains."""
    optimizer = make_optimizer(SMOOTH, 10)
    loss_fn = preference_loss_fn(model, LOSS)
    shardings = param_shardings(model, mesh, options)
    with jax.set_mesh(mesh):
        # Copies: what is put where it lies already would be donated away from the other tests.
        params, ref_params = (place(jax.tree.map(jnp.copy, tree), shardings) for tree in (params, ref_params))
        batch = jax.device_put(batch, NamedSharding(mesh, BATCH))
        abstract = jax.eval_shape(optimizer.init, model.abstract_params())
        opt_shardings = tree_shardings(abstract, mesh, options, SHARDING_OVERRIDES)
        opt_state = jax.jit(optimizer.init, out_shardings=opt_shardings)(params)
        state = TrainState(jnp.int32(0), params, opt_state, ref_params)
        # As in a run: out on the shardings on which the state went in, so that its buffers can be taken again.
        replicated = NamedSharding(mesh, PartitionSpec())
        step, finite = jax.device_put((state.step, jnp.bool(True)), replicated)
        state = replace(state, step=step, finite=finite)
        out_shardings = (jax.tree.map(lambda x: x.sharding, state), replicated)
        train_step = jax.jit(make_train_step(loss_fn, optimizer), donate_argnums=0, out_shardings=out_shardings)
        after, metrics = train_step(state, batch)
    # The first moment after one step is a tenth of the gradient: nothing else need be compiled to see it.
    grads = jax.tree.map(lambda x: x * 10, optax.tree.get(after.opt_state, "mu"))
    loss = metrics["loss"][0] / metrics["loss"][1]
    return {"loss": loss, "grads": grads, "before": state, "after": after, "metrics": metrics}


@pytest.fixture(scope="module")
def on_one(tiny_model, tiny_params, ref_params, batch_for, one_device):
    return one_step(tiny_model, tiny_params, ref_params, batch_for(one_device), one_device, MeshOptions())


# The one that cuts along every axis is looked at in every run of the tests.
@pytest.fixture(
    scope="module",
    params=[name if name == "2 x 2 x 2" else pytest.param(name, marks=pytest.mark.slow) for name in MESHES],
)
def on_many(request, tiny_model, tiny_params, ref_params, batch_for):
    options = MESHES[request.param]
    mesh = make_mesh(options)
    batch = batch_for(mesh)
    result = one_step(tiny_model, tiny_params, ref_params, batch, mesh, options)
    return request.param, result | {"batch": batch}


def test_many_devices_compute_what_one_device_computes(on_one, on_many, tiny_params, assert_norm_close):
    _, result = on_many
    assert abs(float(on_one["loss"]) - math.log(2)) > 0.01  # policy and reference do differ
    np.testing.assert_allclose(result["loss"], on_one["loss"], rtol=1e-5)
    assert_norm_close(result["grads"], on_one["grads"], 1e-5)
    assert_norm_close(result["after"].params, on_one["after"].params, 1e-5)
    assert_norm_close(result["after"].opt_state, on_one["after"].opt_state, 1e-5)
    metrics = [jax.tree.map(float, result["metrics"]) for result in (result, on_one)]
    for name in metrics[1]:
        np.testing.assert_allclose(metrics[0][name], metrics[1][name], rtol=1e-5, atol=1e-6, err_msg=name)
    # The step is large enough for the comparison of the parameters to mean something.
    moved = jax.tree.map(lambda a, b: np.linalg.norm(a - b) / np.linalg.norm(b), on_one["after"].params, tiny_params)
    assert min(jax.tree.leaves(moved)) > 1e-2


def test_parameters_and_moments_lie_in_parts(on_many):
    name, result = on_many
    parts = {"data 8": 1, "fsdp 8": 8, "2 x 2 x 2": 4, "data 2, tensor 4": 4}[name]
    state = result["after"]
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.size >= 64]
    big = [x for x in jax.tree.leaves(state.params) if x.size >= 2 * 32 * 16]
    assert len(moments) >= 2 * len(big) > 0
    for x in big + [x for x in moments if x.size >= 2 * 32 * 16]:
        assert {shard.data.size for shard in x.addressable_shards} == {x.size // parts}


def test_the_state_is_donated_but_for_nothing_else(on_many):
    _, result = on_many
    before = result["before"]
    assert all(x.is_deleted() for x in jax.tree.leaves((before.params, before.opt_state)))
    assert not result["batch"].tokens.is_deleted()


def test_the_reference_stays_as_it_is(on_many, ref_params):
    _, result = on_many
    jax.tree.map(np.testing.assert_array_equal, result["after"].ref_params, ref_params)
    assert int(result["after"].step) == 1


def test_the_logged_norm_is_that_before_clipping():
    optimizer = make_optimizer(OptimizerOptions(max_grad_norm=1e-3), 1)
    step = make_train_step(lambda params, ref, batch: (0, {"loss": (5 * params["kernel"].sum(), 1.0)}), optimizer)
    params = {"kernel": jnp.ones(4)}
    _, metrics = step(TrainState(jnp.int32(0), params, optimizer.init(params)), None)
    assert [float(x) for x in metrics["grad_norm"]] == [10.0, 1.0]
