import math
from dataclasses import fields, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from qstar_jax import losses
from qstar_jax.config import LossOptions, MeshOptions, OptimizerOptions
from qstar_jax.data.batches import make_batch
from qstar_jax.data.packing import Shapes
from qstar_jax.errors import InputError
from qstar_jax.models.decoder import SHARDING_OVERRIDES
from qstar_jax.scoring import response_logprobs, score_tokens
from qstar_jax.sharding import BATCH, make_mesh, tree_shardings
from qstar_jax.store.open import param_shardings
from qstar_jax.training import objectives
from qstar_jax.training.metrics import mean_metrics
from qstar_jax.training.objectives import dpo_loss_fn, resolve_loss, sft_loss_fn
from qstar_jax.training.optimizers import learning_rate_schedule, make_optimizer
from qstar_jax.training.step import TrainState, make_train_step

# AdamW's first step is g / (|g| + eps): with a tiny eps the sign of gradients that are only rounding decides, and no
# two orders of summation agree. With eps far above every |g| the step is as smooth as the gradient. The rate is so high
# that the step moves the parameters about as far as they are large; else their comparison would show nothing.
SMOOTH = OptimizerOptions(learning_rate=30.0, eps=1.0, max_grad_norm=0.0, weight_decay=0.01, schedule="constant")
LOSS = LossOptions(beta=0.5, label_smoothing=0.1)
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
def batch(pair_batch):
    return pair_batch(6, seed=3, fill_to=8, layout="shared")  # two examples have weight 0


@pytest.fixture(scope="module")
def scores(tiny_model, tiny_params, ref_params, batch):
    """What policy and reference say of the batch, computed once for all losses."""
    return jax.jit(lambda *inputs: score_tokens(tiny_model, *inputs))(tiny_params, ref_params, batch)


@pytest.fixture
def loss_of_scores(scores, batch):
    """`loss_of_scores(options)`: loss and metrics of the batch, with `scores` in place of passes through a model."""

    def compute(options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(objectives, "score_tokens", lambda *inputs: scores)
            patch.setattr(objectives, "score_policy", lambda *inputs: replace(scores, ref_logp=None))
            return jax.jit(lambda batch: dpo_loss_fn(None, options)(None, None, batch))(batch)

    return compute


def place(tree, shardings):
    return jax.tree.map(jax.device_put, tree, shardings)


def one_step(model, params, ref_params, batch, mesh, options):
    """Loss, gradients and the state after one optimizer step, computed on `mesh` by the program that trains."""
    optimizer = make_optimizer(SMOOTH, 10)
    loss_fn = dpo_loss_fn(model, LOSS)
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
def on_one(tiny_model, tiny_params, ref_params, batch, one_device):
    return one_step(tiny_model, tiny_params, ref_params, batch, one_device, MeshOptions())


# The one that cuts along every axis is looked at in every run of the tests.
@pytest.fixture(
    scope="module",
    params=[name if name == "2 x 2 x 2" else pytest.param(name, marks=pytest.mark.slow) for name in MESHES],
)
def on_many(request, tiny_model, tiny_params, ref_params, batch):
    options = MESHES[request.param]
    return request.param, one_step(tiny_model, tiny_params, ref_params, batch, make_mesh(options), options)


def test_many_devices_compute_what_one_device_computes(on_one, on_many, tiny_params, assert_norm_close):
    _, found = on_many
    assert abs(float(on_one["loss"]) - math.log(2)) > 0.01  # policy and reference do differ
    np.testing.assert_allclose(found["loss"], on_one["loss"], rtol=1e-5)
    assert_norm_close(found["grads"], on_one["grads"], 1e-5)
    assert_norm_close(found["after"].params, on_one["after"].params, 1e-5)
    assert_norm_close(found["after"].opt_state, on_one["after"].opt_state, 1e-5)
    metrics = [jax.tree.map(float, result["metrics"]) for result in (found, on_one)]
    for name in metrics[1]:
        np.testing.assert_allclose(metrics[0][name], metrics[1][name], rtol=1e-5, atol=1e-6, err_msg=name)
    # The step is large enough for the comparison of the parameters to mean something.
    moved = jax.tree.map(lambda a, b: np.linalg.norm(a - b) / np.linalg.norm(b), on_one["after"].params, tiny_params)
    assert min(jax.tree.leaves(moved)) > 1e-2


def test_parameters_and_moments_lie_in_parts(on_many):
    name, found = on_many
    parts = {"data 8": 1, "fsdp 8": 8, "2 x 2 x 2": 4, "data 2, tensor 4": 4}[name]
    state = found["after"]
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.size >= 64]
    big = [x for x in jax.tree.leaves(state.params) if x.size >= 2 * 32 * 16]
    assert len(moments) >= 2 * len(big) > 0
    for x in big + [x for x in moments if x.size >= 2 * 32 * 16]:
        assert {shard.data.size for shard in x.addressable_shards} == {x.size // parts}


def test_the_state_is_donated_but_for_nothing_else(on_many, batch):
    _, found = on_many
    before = found["before"]
    assert all(x.is_deleted() for x in jax.tree.leaves((before.params, before.opt_state)))
    assert not batch.tokens.is_deleted()


def test_the_reference_stays_as_it_is(on_many, ref_params):
    _, found = on_many
    jax.tree.map(np.testing.assert_array_equal, found["after"].ref_params, ref_params)
    assert int(found["after"].step) == 1


def test_no_gradient_flows_into_the_reference(tiny_model, tiny_params, ref_params, batch):
    loss = dpo_loss_fn(tiny_model, LOSS)
    grads = jax.jit(jax.grad(lambda ref: loss(tiny_params, ref, batch)[0]))(ref_params)
    assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(grads))


@pytest.mark.parametrize("objective", ["dpo", "sft"])
def test_rows_of_weight_0_do_not_count(objective, tiny_model, tiny_params, ref_params, pair_batch):
    answers = 2 if objective == "dpo" else 1
    loss_fn = dpo_loss_fn(tiny_model, LOSS) if objective == "dpo" else sft_loss_fn(tiny_model)
    gradient = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    batch = pair_batch(6, answers=answers, layout="shared")
    weights = batch.weights.at[4:].set(0)
    other = replace(batch, tokens=batch.tokens.at[4:].set(7), targets=batch.targets.at[4:].set(9))
    results = [gradient(tiny_params, ref_params, replace(x, weights=weights)) for x in (batch, other)]
    jax.tree.map(np.testing.assert_array_equal, *results)
    counted = gradient(tiny_params, ref_params, batch)[0][0]
    assert abs(float(counted) - float(results[0][0][0])) > 1e-4  # with weight 1 they do count


def test_dpo_equals_a_plain_computation(tiny_model, tiny_params, ref_params, batch):
    loss, metrics = jax.jit(dpo_loss_fn(tiny_model, LOSS))(tiny_params, ref_params, batch)
    logprobs = jax.jit(lambda params: response_logprobs(tiny_model, params, batch)[0])
    logp, ref = (np.asarray(logprobs(p), np.float64).sum(-1)[:6] for p in (tiny_params, ref_params))
    rewards = 0.5 * (logp - ref)
    margin = rewards[:, 0] - rewards[:, 1]
    expected = {
        "loss": (0.9 * np.log1p(np.exp(-margin)) + 0.1 * np.log1p(np.exp(margin))).mean(),
        "rewards/chosen": rewards[:, 0].mean(),
        "squares/rewards/chosen": (rewards[:, 0] ** 2).mean(),
        "rewards/rejected": rewards[:, 1].mean(),
        "rewards/margins": margin.mean(),
        "rewards/accuracies": (margin > 0).mean(),
        "logps/chosen": logp[:, 0].mean(),
        "logps/rejected": logp[:, 1].mean(),
        "lengths/chosen": np.asarray(batch.response_lengths)[:6, 0].mean(),
        "lengths/rejected": np.asarray(batch.response_lengths)[:6, 1].mean(),
        "truncated/chosen": 0.0,
        "truncated/rejected": 0.0,
        "count/scored_tokens": float(batch.response_lengths.sum()),
        "count/tokens": float(batch.response_lengths.sum() + (batch.prompt_lengths[:6] - 1).sum()),
        "count/slots": float(batch.tokens.size),
    }
    assert metrics.keys() == expected.keys()
    for name, (total, weight) in metrics.items():
        np.testing.assert_allclose(total / weight, expected[name], rtol=1e-5, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(loss, expected["loss"], rtol=1e-5)


@pytest.mark.parametrize("answers", [1, 2])
def test_lengths_and_truncation_are_counted_by_hand(answers, tiny_model, tiny_params, ref_params, random_examples):
    examples = random_examples(6, answers=answers)
    cut = [[(i + r) % 3 == 0 for r in range(answers)] for i in range(6)]
    examples = [
        replace(e, responses=tuple(replace(r, truncated=c) for r, c in zip(e.responses, flags, strict=True)))
        for e, flags in zip(examples, cut, strict=True)
    ]
    shapes = Shapes.of(examples, batch_size=4, multiple=4, row_length=64)
    # Two micro-batches; the second has two examples and two that only fill up.
    parts = [make_batch(part, shapes, fill_to=4, at_least=(4, 64)) for part in (examples[:4], examples[4:])]
    batches = jax.tree.map(lambda *x: jnp.stack(x), *parts)
    loss_fn = dpo_loss_fn(tiny_model, LOSS) if answers == 2 else sft_loss_fn(tiny_model)
    optimizer = optax.sgd(0.1)
    state = TrainState(jnp.int32(0), tiny_params, optimizer.init(tiny_params), ref_params)
    _, metrics = jax.jit(make_train_step(loss_fn, optimizer, accumulate=2))(state, batches)
    means = mean_metrics([metrics])
    for r, name in enumerate(("chosen", "rejected") if answers == 2 else ("completion",)):
        assert means[f"lengths/{name}"] == pytest.approx(np.mean([len(e.responses[r].ids) for e in examples]))
        assert means[f"truncated/{name}"] == pytest.approx(np.mean([flags[r] for flags in cut]))
        assert means[f"truncated/{name}"] > 0


def test_sft_is_the_mean_over_tokens_and_not_over_answers(tiny_model, tiny_params, pair_batch):
    batch = pair_batch(5, answers=1)
    loss, metrics = jax.jit(sft_loss_fn(tiny_model))(tiny_params, None, batch)
    logp = np.asarray(jax.jit(lambda params: response_logprobs(tiny_model, params, batch)[0])(tiny_params), np.float64)
    np.testing.assert_allclose(loss, -logp.sum() / batch.response_lengths.sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"][0] / metrics["loss"][1], loss, rtol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        LossOptions(beta=0.2),
        LossOptions(label_smoothing=0.2),
        LossOptions(ld_alpha=0.2),
        LossOptions(divergence="forward_kl"),
        LossOptions(name="ipo"),
        LossOptions(name=["sigmoid", "sft"], weights=[1.0, 0.1]),
    ],
    ids=str,
)
def test_options_of_the_loss_change_it(options, loss_of_scores):
    plain, _ = loss_of_scores(LossOptions())
    other, _ = loss_of_scores(options)
    assert abs(float(plain) - float(other)) > 1e-3


TRAINABLE = [name for name in losses.LOSSES if name not in ("kto", "tdpo1", "tdpo2", "tgdpo")]


@pytest.mark.parametrize("name", TRAINABLE)
def test_every_loss_is_what_it_says_of_the_scores_of_a_batch(name, scores, loss_of_scores):
    loss, metrics = loss_of_scores(LossOptions(name=name))
    real = jax.tree.map(lambda x: x[:6], scores)  # the last two examples only fill up
    expected, record = jax.jit(losses.make_loss(name))(real)
    np.testing.assert_allclose(loss, expected.mean(), rtol=1e-5)
    total, pairs = metrics["rewards/margins"]
    np.testing.assert_allclose(total / pairs, record.margins.mean(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["simpo", "orpo", ["cpo", "sft"]])
def test_losses_without_a_reference_do_not_ask_for_one(name, tiny_model, tiny_params, batch, loss_of_scores):
    loss, metrics = jax.jit(dpo_loss_fn(tiny_model, LossOptions(name=name)))(tiny_params, None, batch)
    assert np.isfinite(loss) and "rewards/accuracies" in metrics
    np.testing.assert_allclose(loss, loss_of_scores(LossOptions(name=name))[0], rtol=1e-5)


@pytest.mark.parametrize(("name", "array"), [("kto", "baseline"), ("tdpo2", "kl"), ("tgdpo", "guide_rewards")])
def test_a_loss_that_reads_more_than_a_batch_gives_is_refused(name, array, tiny_model):
    with pytest.raises(InputError, match=rf"{name}.* needs {array}.*choose another"):
        dpo_loss_fn(tiny_model, LossOptions(name=name))


def test_the_options_are_those_of_the_registry():
    combining = {"name", "weights", "ld_alpha"}
    of_losses = {option for name in TRAINABLE for option in losses.make_loss(name).options[0]}
    assert {field.name for field in fields(LossOptions)} == combining | of_losses


def test_defaults_of_the_loss_are_filled_in_for_the_record():
    resolved = resolve_loss(LossOptions(name="simpo", gamma=1.0))
    assert (resolved.beta, resolved.gamma, resolved.label_smoothing, resolved.tau) == (2.0, 1.0, 0.0, None)
    mixture = LossOptions(name=["sigmoid", "sft"])  # one default for two losses would be wrong
    assert resolve_loss(mixture) == mixture


def rates(steps=10, **options):
    schedule = learning_rate_schedule(OptimizerOptions(learning_rate=1.0, **options), steps)
    return [round(float(schedule(step)), 6) for step in range(steps)]


def test_schedules_by_hand():
    assert rates(schedule="constant") == [1.0] * 10
    assert rates(schedule="linear") == [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    cosine = [round(0.5 * (1 + math.cos(math.pi * step / 10)), 6) for step in range(10)]
    np.testing.assert_allclose(rates(schedule="cosine"), cosine, atol=2e-6)
    # The first of four warm-up steps has a quarter of the rate already, the last one all of it.
    assert rates(schedule="constant", warmup_steps=4) == [0.25, 0.5, 0.75] + [1.0] * 7
    linear = [0.25, 0.5, 0.75, 1.0, *[1 - i / 6 for i in range(6)]]
    np.testing.assert_allclose(rates(schedule="linear", warmup_steps=4), linear, atol=2e-6)
    assert rates(schedule="constant", warmup_steps=1) == [1.0] * 10
    np.testing.assert_allclose(rates(steps=3, warmup_steps=6), [1 / 6, 2 / 6, 3 / 6], atol=2e-6)


def walk(**options):
    """Parameters after three of six steps down a bowl."""
    optimizer = make_optimizer(OptimizerOptions(**{"learning_rate": 0.1, **options}), 6)
    params = {"kernel": jnp.array([1.0, -2.0]), "norm": {"scale": jnp.array([3.0])}}
    state = optimizer.init(params)
    for step in range(3):
        grads = jax.tree.map(lambda x: (2 + step) * x + 0.1, params)  # noqa: B023
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 0.2},
        {"warmup_steps": 3},
        {"schedule": "constant"},
        {"schedule": "cosine"},
        {"weight_decay": 0.1},
        {"beta1": 0.5},
        {"beta2": 0.9},
        {"eps": 0.1},
        {"max_grad_norm": 0.01, "eps": 0.1},
    ],
    ids=str,
)
def test_options_of_the_optimizer_change_the_walk(change):
    plain = walk(**{"eps": 0.1} if "max_grad_norm" in change else {})
    assert np.abs(np.asarray(walk(**change)["kernel"]) - plain["kernel"]).max() > 1e-4


def test_norms_do_not_decay():
    plain, decayed = (walk(weight_decay=decay, max_grad_norm=0.0) for decay in (0.0, 0.5))  # clipping would couple them
    np.testing.assert_array_equal(plain["norm"]["scale"], decayed["norm"]["scale"])
    assert (np.abs(decayed["kernel"]) < np.abs(plain["kernel"])).all()


def test_clipping_by_hand():
    optimizer = make_optimizer(OptimizerOptions(max_grad_norm=1.0, beta1=0.0), 1)
    grads = {"kernel": jnp.array([3.0, 4.0])}
    _, state = optimizer.update(grads, optimizer.init(grads), grads)
    mu = optax.tree.get(state, "mu")["kernel"]
    np.testing.assert_allclose(mu, [0.6, 0.8], rtol=1e-6)
    unclipped = make_optimizer(OptimizerOptions(max_grad_norm=0.0, beta1=0.0), 1)
    _, state = unclipped.update(grads, unclipped.init(grads), grads)
    np.testing.assert_allclose(optax.tree.get(state, "mu")["kernel"], [3.0, 4.0])


def test_the_logged_norm_is_that_before_clipping():
    optimizer = make_optimizer(OptimizerOptions(max_grad_norm=1e-3), 1)
    step = make_train_step(lambda params, ref, batch: (0, {"loss": (5 * params["kernel"].sum(), 1.0)}), optimizer)
    params = {"kernel": jnp.ones(4)}
    _, metrics = step(TrainState(jnp.int32(0), params, optimizer.init(params)), None)
    assert [float(x) for x in metrics["grad_norm"]] == [10.0, 1.0]
