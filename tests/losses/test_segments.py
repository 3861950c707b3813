import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax import losses

# Chosen segments have 3, 2 and 0 steps, rejected ones 1, 2 and 2.
LOGP = jnp.array([[[-1, -2, -0.5], [-4, 9, 9]], [[-3, -0.25, 9], [-1, -1, 9]], [[9, 9, 9], [-2, -1, 9]]], float)
MASK = jnp.array([[[1, 1, 1], [1, 0, 0]], [[1, 1, 0], [1, 1, 0]], [[0, 0, 0], [1, 1, 0]]], bool)


def test_cpl_of_log_ratios_is_dpo():
    log_ratios = LOGP + 1.5
    found, metrics = losses.cpl(log_ratios, MASK, bias=1.0, beta=0.3)
    expected, expected_metrics = losses.sigmoid(log_ratios, MASK, beta=0.3)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(metrics.rewards, expected_metrics.rewards, rtol=1e-6)


def test_cpl_discounts_its_own_tokens():
    logp = jnp.array([[[9.0, -1.0, 9.0, -2.0, -4.0], [-3.0, -5.0, 9.0, 9.0, 9.0]]])
    mask = jnp.array([[[0, 1, 0, 1, 1], [1, 1, 0, 0, 0]]], bool)
    # -1 - 2 / 2 - 4 / 4 = -3 and -3 - 5 / 2 = -5.5
    found, metrics = losses.cpl(logp, mask, beta=1.0, bias=0.5, discount=0.5)
    np.testing.assert_allclose(metrics.rewards, [[-3, -5.5]])
    np.testing.assert_allclose(found, [np.log1p(np.exp(0.25))], rtol=1e-6)


def test_cpl_clones_behaviour_by_hand():
    plain = losses.cpl(LOGP, MASK)[0]
    everything = losses.cpl(LOGP, MASK, bc_weight=2.0)[0] - plain
    np.testing.assert_allclose(everything, 2 * np.array([7.5 / 4, 5.25 / 4, 3 / 2]), rtol=1e-5)
    chosen = losses.cpl(LOGP, MASK, bc_weight=2.0, bc_data="chosen")[0] - plain
    np.testing.assert_allclose(chosen, 2 * np.array([3.5 / 3, 3.25 / 2, 0]), rtol=1e-5, atol=1e-6)


def by_loops(logp, mask, scores, beta, bias, discount):
    """Loss and advantages of each pair, the better segment first; pairs as a set, as their order says nothing."""
    advantages = [
        sum(beta * discount**time * value for time, value in enumerate(row[steps]))
        for row, steps in zip(logp, mask, strict=True)
    ]

    def one(chosen, rejected):
        return np.log1p(np.exp(bias * advantages[rejected] - advantages[chosen]))

    pairs = []
    for i, j in itertools.combinations(range(len(scores)), 2):
        if scores[i] == scores[j]:
            pairs.append(((one(i, j) + one(j, i)) / 2, *sorted((advantages[i], advantages[j]))))
        else:
            better, worse = (i, j) if scores[i] > scores[j] else (j, i)
            pairs.append((one(better, worse), advantages[better], advantages[worse]))
    return sorted(pairs)


@pytest.mark.parametrize("tied", [False, True])
def test_all_pairs_are_those_of_two_loops(tied):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        logp, mask = rng.normal(-3, 2, (7, 5)), np.arange(5) < rng.integers(1, 6, 7)[:, None]
        scores = rng.integers(0, 3, 7).astype(float) if tied else rng.normal(size=7)
        options = {"beta": 0.7, "bias": 0.4, "discount": 0.9}
        loss, metrics = losses.cpl_all_pairs(jnp.array(logp), jnp.array(mask), jnp.array(scores), **options)
        assert loss.shape == (21,)
        expected = by_loops(logp, mask, scores, **options)
        np.testing.assert_allclose(np.sort(loss), [pair[0] for pair in expected], rtol=1e-12)
        rewards = np.asarray(metrics.rewards)
        if not tied:
            found = sorted(zip(loss.tolist(), *rewards.T.tolist(), strict=True))
            np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_two_segments_are_a_pair():
    logp, mask = LOGP[:, ::-1], MASK[:, ::-1]  # the chosen segment second
    scores = jnp.tile(jnp.array([-1.0, 2.0]), (3, 1))
    loss, metrics = losses.cpl_all_pairs(logp, mask, scores, beta=0.3, bias=0.8, discount=0.9)
    expected, expected_metrics = losses.cpl(LOGP, MASK, beta=0.3, bias=0.8, discount=0.9)
    np.testing.assert_allclose(loss[:, 0], expected, rtol=1e-6)
    np.testing.assert_allclose(metrics.rewards[:, 0], expected_metrics.rewards, rtol=1e-6)


def test_the_mean_is_over_all_pairs_those_of_loss_0_too():
    logp, mask = jnp.array([[2000.0], [1000.0], [0.0]]), jnp.ones((3, 1), bool)
    loss, _ = losses.cpl_all_pairs(logp, mask, jnp.array([2.0, 1.0, 1.0]), beta=1.0, bias=1.0)
    np.testing.assert_allclose(jnp.sort(loss), [0, 0, 500])  # a tie of advantages 1000 and 0 costs 500
    np.testing.assert_allclose(loss.mean(), 500 / 3, rtol=1e-6)


def test_ties_draw_advantages_together():
    def loss(logp):
        return losses.cpl_all_pairs(logp, jnp.ones((2, 1), bool), jnp.zeros(2), beta=1.0, bias=1.0)[0].sum()

    np.testing.assert_allclose(jax.grad(loss)(jnp.array([[1.0], [1.0]])), 0, atol=1e-7)
    assert jax.grad(loss)(jnp.array([[2.0], [1.0]]))[0, 0] > 0
