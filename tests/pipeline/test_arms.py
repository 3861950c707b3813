"""Arms of an ablation, and what is measured on the way, on a tabular pipeline where everything is known."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qstar_jax.errors import InputError
from qstar_jax.evaluation.blame import measure_blame, reward_at_kl
from qstar_jax.pipeline import Meter, Point, PreferenceBatch, Stage, make_arms, pipeline_loss_fn, train_arm
from qstar_jax.training.source import Source

OUTLINES, TEXTS = 3, 4
REF = {"outline": jnp.zeros(OUTLINES), "text": jnp.zeros((OUTLINES, TEXTS))}
BETAS = (0.5, 0.25)


def stages_of(reference):
    """An outline z, then a text y, without a prompt's influence; the reference is given."""

    def outline_ratio(logits, x, before, z):
        return (jax.nn.log_softmax(logits) - jax.nn.log_softmax(reference["outline"]))[z]

    def text_ratio(logits, x, before, y):
        return (jax.nn.log_softmax(logits) - jax.nn.log_softmax(reference["text"]))[before[0], y]

    return (
        Stage("outline", outline_ratio, lambda p, key, x, _: jax.random.categorical(key, p, shape=x.shape), BETAS[0]),
        Stage("text", text_ratio, lambda p, key, x, z: jax.random.categorical(key, p[z[0]]), BETAS[1]),
    )


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    runs = [(rng.integers(0, OUTLINES, 6), rng.integers(0, TEXTS, 6)) for _ in range(2)]
    chosen, rejected = (tuple(map(jnp.asarray, run)) for run in runs)
    return PreferenceBatch(jnp.zeros(6), chosen, rejected, jnp.array([1.0, 1, 1, 1, 1, 0]))


@pytest.fixture
def params():
    return {name: jnp.sin(1.0 + jnp.arange(table.size)).reshape(table.shape) for name, table in REF.items()}


def by_hand(params, batch):
    """Rewards [B, 2, stages] in numpy."""
    tables = {
        name: np.asarray(jax.nn.log_softmax(table) - jax.nn.log_softmax(REF[name])) for name, table in params.items()
    }
    return np.stack(
        [
            np.stack([BETAS[0] * tables["outline"][z], BETAS[1] * tables["text"][z, y]], -1)
            for z, y in (batch.chosen, batch.rejected)
        ],
        1,
    )


def test_losses_of_all_arms_by_hand(batch, params):
    rewards, arms = by_hand(params, batch), make_arms(("outline", "text"))
    margins = rewards[:, 0] - rewards[:, 1]

    def logistic(margin):
        return np.log1p(np.exp(-margin))

    expected = {
        "joint": logistic(margins.sum(-1)),
        "only outline": logistic(margins[:, 0]),
        "only text": logistic(margins[:, 1]),
        "separate": logistic(margins).sum(-1),
        "winners": -(rewards[:, 0] / BETAS).sum(-1),
    }
    assert arms.keys() == expected.keys()
    for name, (compare, trained) in arms.items():
        own = {stage: params[stage] for stage in trained}
        loss, metrics = pipeline_loss_fn(stages_of, compare)(own, REF, batch)
        # The last pair only fills up the batch.
        np.testing.assert_allclose(loss, expected[name][:5].mean(), rtol=1e-5)
        assert {name.partition("/")[0] for name in metrics} == {"loss", "rewards", *trained}


def test_metrics_of_each_stage(batch, params):
    chosen = batch.chosen[0]
    rejected = chosen.at[2].set((chosen[2] + 1) % OUTLINES)  # the only pair with two outlines
    batch = replace(batch, rejected=(rejected, batch.rejected[1]))
    _, metrics = pipeline_loss_fn(stages_of)(params, REF, batch)
    margins = (lambda rewards: rewards[:5, 0] - rewards[:5, 1])(by_hand(params, batch))
    means = {name: float(total / count) for name, (total, count) in metrics.items()}
    np.testing.assert_allclose(means["text/rewards/margins"], margins[:, 1].mean(), rtol=1e-4)
    np.testing.assert_allclose(means["rewards/margins"], margins.sum(-1).mean(), rtol=1e-4)
    # Pairs with the same outline say nothing about its accuracy.
    assert means["outline/rewards/accuracies"] == (margins[2, 0] > 0) and metrics["outline/rewards/accuracies"][1] == 1
    np.testing.assert_allclose(means["rewards/accuracies"], (margins.sum(-1) > 0).mean())


def test_unknown_stages_are_refused(batch, params):
    with pytest.raises(InputError, match="painter, which are no stages"):
        pipeline_loss_fn(stages_of)({"painter": params["text"]}, REF, batch)
    with pytest.raises(InputError, match="no stage has parameters"):
        pipeline_loss_fn(stages_of)({}, REF, batch)


class Pairs(Source):
    """Pairs of runs of the reference, the better text chosen."""

    def at_step(self, step, state):
        rng = np.random.default_rng(step)
        z, y = rng.integers(0, OUTLINES, (2, 64)), rng.integers(0, TEXTS, (2, 64))
        better = reward(None, (z[0], y[0])) > reward(None, (z[1], y[1]))
        first = np.where(better, 0, 1)
        picked = [(z[side, np.arange(64)], y[side, np.arange(64)]) for side in (first, 1 - first)]
        return PreferenceBatch(np.zeros(64), *picked, np.ones(64, np.float32))


def reward(_, outputs):
    z, y = map(np.asarray, outputs)
    return 1.0 * (z == 1) + 1.0 * (y == 2) + 0.01 * y


def test_training_an_arm_moves_its_stages_only_and_meters_reward_and_kl():
    prompts = [np.zeros(2000)] * 2
    meter = Meter(stages_of, prompts, reward, jax.random.key(0))
    options = {"optimizer": optax.adam(0.1), "steps": 25, "measure_every": 10}
    arms = make_arms(("outline", "text"))
    for name in ("joint", "only text"):
        trained = arms[name][1]
        params, curve = train_arm(meter, REF, REF, Pairs(), arms[name], **options)
        assert [point.step for point in curve] == [0, 10, 20, 25]
        assert curve[0].kl == (0.0, 0.0) and curve[-1].reward > curve[0].reward + 0.1
        for place, stage in enumerate(REF):
            assert (curve[-1].kl[place] > 0.02) == (stage in trained)
            assert np.array_equal(params[stage], REF[stage]) == (stage not in trained)
        # KL by samples, against the exact one: within five standard errors.
        own = {stage: np.asarray(jax.nn.log_softmax(table)) for stage, table in params.items()}
        first = np.exp(own["outline"])
        exact = (
            (first * (own["outline"] + np.log(OUTLINES))).sum(),
            (first[:, None] * np.exp(own["text"]) * (own["text"] + np.log(TEXTS))).sum(),
        )
        np.testing.assert_allclose(curve[-1].kl, exact, atol=5 * 1.5 / np.sqrt(4000))


def test_reward_at_a_kl_is_read_off_the_curve():
    curve = [Point(0, 1.0, (0.0, 0.0)), Point(1, 2.0, (0.5, 0.5)), Point(2, 2.5, (1.5, 0.5)), Point(3, 2.0, (0.1, 0.1))]
    assert reward_at_kl(curve, 0.25) == pytest.approx(1.25)
    assert reward_at_kl(curve, 1.5) == pytest.approx(2.25)
    assert np.isnan(reward_at_kl(curve, 2.1))


def test_blame_by_hand():
    scores = np.array([[-3.0, 0.0], [-1.0, -0.5], [0.0, -2.0], [0.0, 0.0], [-0.6, -0.5]])
    faults = np.array([[1, 0], [1, 0], [0, 1], [0, 0], [0, 1]], bool)
    found = measure_blame(("first", "second"), scores, faults)
    assert (found.runs, found.single, found.faulty) == (5, 4, {"first": 2, "second": 2})
    assert found.finds["first"].mean == 1.0
    assert found.tells["first"].mean == found.tells["second"].mean == 1.0
    # 2.0 and 0.5 among the guilty, 0.5, 0 and 0 among the others: one tie.
    assert found.finds["second"].mean == pytest.approx(5.5 / 6)
    assert measure_blame(("a", "b"), scores, faults & [True, False]).finds["b"] is None
    with pytest.raises(InputError, match="at least two stages"):
        measure_blame(("a",), scores[:, :1], faults[:, :1])
