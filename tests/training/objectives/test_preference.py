import math
from dataclasses import fields, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qstar_jax import losses
from qstar_jax.config import LossOptions
from qstar_jax.data.batches import make_batch
from qstar_jax.data.packing import Shapes
from qstar_jax.data.tokenization import Example, Response
from qstar_jax.errors import InputError
from qstar_jax.losses import make_loss
from qstar_jax.mdp import TokenScores
from qstar_jax.scoring import score_policy, score_tokens
from qstar_jax.training.metrics import mean_metrics
from qstar_jax.training.objectives import preference_loss_fn, preference_objective, sft_loss_fn
from qstar_jax.training.step import TrainState, make_train_step

MODULE = "qstar_jax.training.objectives.preference"
LOSS = make_loss(beta=0.5, label_smoothing=0.1)


def test_a_pair_and_its_metrics_by_hand(loss_of):
    """log pi / pi_ref of chosen and rejected responses is 3 and 1 nats; beta is 0.5."""
    loss, means = loss_of(make_loss(beta=0.5), [3.0, 1.0])
    assert loss == pytest.approx(-math.log(1 / (1 + math.exp(-(1.5 - 0.5)))))
    assert means["rewards/chosen"] == 1.5 and means["rewards/rejected"] == 0.5
    assert means["rewards/margins"] == 1.0 and means["rewards/accuracies"] == 1.0


def test_a_ranking_of_three_and_its_metrics_by_hand(loss_of):
    """Plackett-Luce: the first of three is drawn, then the second of the other two; here the last two are swapped."""
    loss, means = loss_of(make_loss("plackett_luce", beta=0.5), [4.0, 0.0, 2.0])
    first = math.exp(2) / (math.exp(2) + math.exp(0) + math.exp(1))
    second = math.exp(0) / (math.exp(0) + math.exp(1))
    assert loss == pytest.approx(-math.log(first * second))
    assert [means[f"rewards/place_{place}"] for place in (1, 2, 3)] == [2.0, 0.0, 1.0]
    assert means["rewards/margins"] == 2.0 - 0.5 and means["rewards/accuracies"] == pytest.approx(2 / 3)
    assert means["lengths/place_3"] == 2.0


def test_a_model_learns_a_ranking(tiny_model, tiny_params, pair_batch):
    batch = pair_batch(4, responses=3)
    loss_fn = preference_loss_fn(tiny_model, make_loss("plackett_luce"))
    optimizer = optax.sgd(0.3)
    state = TrainState(jnp.int32(0), tiny_params, optimizer.init(tiny_params), tiny_params)
    train_step = jax.jit(make_train_step(loss_fn, optimizer))
    history = []
    for _ in range(5):
        state, metrics = train_step(state, batch)
        history.append(mean_metrics([metrics]))
    assert history[0]["loss"] == pytest.approx(math.log(6), rel=1e-5)  # one of 3! orders
    assert history[-1]["loss"] < history[0]["loss"] - 0.1 and history[-1]["rewards/margins"] > 0.1


def test_plackett_luce_is_named_sigmoid_where_pairs_are_read():
    objective = preference_objective(make_loss("plackett_luce", beta=0.5))
    assert objective.description == "plackett_luce(beta=0.5) (plackett_luce is sigmoid on pairs)"


def test_what_the_objective_says_of_its_loss():
    objective = preference_objective(make_loss(beta=0.5))
    assert objective.kind == "preferences" and objective.uses_reference and not objective.couples_examples
    assert objective.beta == 0.5 and objective.loss_at_reference == pytest.approx(math.log(2))
    assert objective.description == "sigmoid(beta=0.5, label_smoothing=0.0, divergence=reverse_kl)"
    assert preference_objective(make_loss("aot")).couples_examples
    without = preference_objective(make_loss("simpo"))
    assert not without.uses_reference and without.loss_at_reference is None and without.beta is None


@pytest.fixture
def loss_of(monkeypatch):
    """`loss_of(loss, log_ratios)`: loss and metrics of one example, whose responses have two tokens each."""

    def compute(loss, log_ratios):
        ids = np.array([5, 6], np.int32)
        examples = [Example(ids, False, tuple(Response(ids, False) for _ in log_ratios), 0)]
        batch = make_batch(examples, Shapes.of(examples, batch_size=1))
        logp = jnp.where(batch.action_mask, jnp.array(log_ratios)[:, None] / 2, 0.0)
        scores = TokenScores(logp, jnp.zeros_like(logp), None, batch.action_mask)
        monkeypatch.setattr(f"{MODULE}.score_tokens", lambda *inputs: scores)
        loss, metrics = preference_loss_fn(None, loss)(None, None, batch)
        return float(loss), mean_metrics([metrics])

    return compute


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
    """`loss_of_scores(**options)`: loss and metrics of the batch, with `scores` in place of passes through a model."""

    def compute(**options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(f"{MODULE}.score_tokens", lambda *inputs: scores)
            patch.setattr(f"{MODULE}.score_policy", lambda *inputs: replace(scores, ref_logp=None))
            return jax.jit(lambda batch: preference_loss_fn(None, make_loss(**options))(None, None, batch))(batch)

    return compute


def test_dpo_equals_a_plain_computation(tiny_model, tiny_params, ref_params, batch):
    loss, metrics = jax.jit(preference_loss_fn(tiny_model, LOSS))(tiny_params, ref_params, batch)
    logprobs = jax.jit(lambda params: score_policy(tiny_model, params, batch).logp)
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


def test_no_gradient_flows_into_the_reference(tiny_model, tiny_params, ref_params, batch):
    loss = preference_loss_fn(tiny_model, LOSS)
    grads = jax.jit(jax.grad(lambda ref: loss(tiny_params, ref, batch)[0]))(ref_params)
    assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(grads))


@pytest.mark.parametrize("objective", ["dpo", "sft"])
def test_rows_of_weight_0_do_not_count(objective, tiny_model, tiny_params, ref_params, pair_batch):
    responses = 2 if objective == "dpo" else 1
    loss_fn = preference_loss_fn(tiny_model, LOSS) if objective == "dpo" else sft_loss_fn(tiny_model)
    gradient = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    batch = pair_batch(6, responses=responses, layout="shared")
    weights = batch.weights.at[4:].set(0)
    of_others = batch.index[4:][batch.action_mask[4:]]
    other = replace(batch, tokens=batch.tokens.at[4:].set(7), targets=batch.targets.at[0, of_others].set(9))
    results = [gradient(tiny_params, ref_params, replace(x, weights=weights)) for x in (batch, other)]
    jax.tree.map(np.testing.assert_array_equal, *results)
    counted = gradient(tiny_params, ref_params, batch)[0][0]
    assert abs(float(counted) - float(results[0][0][0])) > 1e-4  # with weight 1 they do count


@pytest.mark.parametrize("responses", [1, 2])
def test_lengths_and_truncation_are_counted_by_hand(responses, tiny_model, tiny_params, ref_params, random_examples):
    examples = random_examples(6, responses=responses)
    truncated = [[(i + r) % 3 == 0 for r in range(responses)] for i in range(6)]
    examples = [
        replace(e, responses=tuple(replace(r, truncated=c) for r, c in zip(e.responses, flags, strict=True)))
        for e, flags in zip(examples, truncated, strict=True)
    ]
    shapes = Shapes.of(examples, batch_size=4, multiple=4, row_length=64)
    # Two micro-batches; the second has two examples and two that only fill up.
    parts = [make_batch(part, shapes, fill_to=4, at_least=(4, 64)) for part in (examples[:4], examples[4:])]
    batches = jax.tree.map(lambda *x: jnp.stack(x), *parts)
    loss_fn = preference_loss_fn(tiny_model, LOSS) if responses == 2 else sft_loss_fn(tiny_model)
    optimizer = optax.sgd(0.1)
    state = TrainState(jnp.int32(0), tiny_params, optimizer.init(tiny_params), ref_params)
    _, metrics = jax.jit(make_train_step(loss_fn, optimizer, accumulate=2))(state, batches)
    means = mean_metrics([metrics])
    for r, name in enumerate(("chosen", "rejected") if responses == 2 else ("completion",)):
        assert means[f"lengths/{name}"] == pytest.approx(np.mean([len(e.responses[r].ids) for e in examples]))
        assert means[f"truncated/{name}"] == pytest.approx(np.mean([flags[r] for flags in truncated]))
        assert means[f"truncated/{name}"] > 0


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.2},
        {"label_smoothing": 0.2},
        {"ld_alpha": 0.2},
        {"divergence": "forward_kl"},
        {"name": "ipo"},
        {"name": ["sigmoid", "sft"], "weights": [1.0, 0.1]},
    ],
    ids=str,
)
def test_options_of_the_loss_change_it(options, loss_of_scores):
    plain, _ = loss_of_scores()
    other, _ = loss_of_scores(**options)
    assert abs(float(plain) - float(other)) > 1e-3


READ_MORE = {"kto", "a_star", "qrpo", "dmpo", "tdpo1", "tdpo2", "tgdpo", "weighted_sigmoid"}
TRAINABLE = [n for n in losses.LOSSES if n not in READ_MORE]


@pytest.mark.parametrize("name", TRAINABLE)
def test_every_loss_is_what_it_says_of_the_scores_of_a_batch(name, scores, loss_of_scores):
    loss, metrics = loss_of_scores(name=name)
    real = jax.tree.map(lambda x: x[:6], scores)  # the last two examples only fill up
    expected, record = jax.jit(losses.make_loss(name))(real)
    np.testing.assert_allclose(loss, expected.mean(), rtol=1e-5)
    total, pairs = metrics["rewards/margins"]
    np.testing.assert_allclose(total / pairs, record.margins.mean(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["simpo", "orpo", ["cpo", "sft"]])
def test_losses_without_a_reference_do_not_ask_for_one(name, tiny_model, tiny_params, batch, loss_of_scores):
    loss, metrics = jax.jit(preference_loss_fn(tiny_model, make_loss(name=name)))(tiny_params, None, batch)
    assert np.isfinite(loss) and "rewards/accuracies" in metrics
    np.testing.assert_allclose(loss, loss_of_scores(name=name)[0], rtol=1e-5)


@pytest.mark.parametrize(("name", "array"), [("kto", "baseline"), (["sigmoid", "kto"], "baseline")])
def test_a_loss_that_reads_more_than_a_batch_has_is_refused(name, array):
    with pytest.raises(InputError, match=rf"kto.* needs {array}.*choose another"):
        preference_objective(make_loss(name=name))


def test_the_options_are_those_of_the_registry():
    combining = {"name", "weights", "ld_alpha"}
    of_losses = {option for name in losses.LOSSES for option in losses.make_loss(name).options[0]}
    assert {field.name for field in fields(LossOptions)} == combining | of_losses
