import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax import losses
from qstar_jax.errors import InputError

# Sums under the mask: 3, -2, 0 (empty).
LOG_RATIOS = jnp.array([[1.0, 2.0, 9.0], [-2.0, 9.0, 9.0], [9.0, 9.0, 9.0]])
MASK = jnp.array([[True, True, False], [True, False, False], [False, False, False]])
LABELS = jnp.array([True, False, True])
PAIR, PAIR_MASK = LOG_RATIOS[None, :2], MASK[None, :2]  # c = 3, r = -2


def sigma(x):
    return 1 / (1 + np.exp(-np.asarray(x)))


def test_kto_by_hand():
    loss, metrics = losses.kto(
        LOG_RATIOS, MASK, LABELS, jnp.float32(1.0), beta=0.5, desirable_weight=2.0, undesirable_weight=3.0
    )
    # 2 (1 - sigma(0.5 (3 - 1))), 3 (1 - sigma(0.5 (1 + 2))), 2 (1 - sigma(0.5 (0 - 1)))
    np.testing.assert_allclose(loss, [2 * (1 - sigma(1)), 3 * (1 - sigma(1.5)), 2 * (1 - sigma(-0.5))], rtol=1e-6)
    np.testing.assert_allclose(metrics.rewards, [1.5, -1.0, 0.0])


def test_kto_is_half_at_the_baseline():
    loss, _ = losses.kto(LOG_RATIOS * 0, MASK, LABELS, jnp.float32(0.0))
    np.testing.assert_allclose(loss, 0.5)


def test_kto_baseline_is_a_mean_that_stops_at_0():
    # (3 - 2) / 2: the third response is empty, as padding rows are, and does not count.
    np.testing.assert_allclose(losses.kto_baseline(LOG_RATIOS, MASK), 1 / 2, rtol=1e-6)
    np.testing.assert_array_equal(losses.kto_baseline(-LOG_RATIOS, MASK), 0)
    np.testing.assert_allclose(losses.kto_baseline(jnp.where(MASK, LOG_RATIOS, jnp.nan), MASK), 1 / 2, rtol=1e-6)
    np.testing.assert_array_equal(jax.grad(lambda x: losses.kto_baseline(x, MASK))(LOG_RATIOS), 0)


def test_kto_takes_one_baseline():
    with pytest.raises((InputError, TypeError)):
        losses.kto(LOG_RATIOS, MASK, LABELS, jnp.zeros(3))


@pytest.mark.parametrize("name", ["kto", "implicit_prm"])
def test_labels_have_the_shape_of_the_responses(name):
    more = {"baseline": jnp.float32(0.0)} if name == "kto" else {}
    for labels in (LABELS[:1], LABELS[:, None], jnp.bool_(True)):
        with pytest.raises((InputError, TypeError)):
            losses.LOSSES[name](LOG_RATIOS, MASK, labels, **more)


def test_implicit_prm_by_hand():
    loss, metrics = losses.implicit_prm(LOG_RATIOS, MASK, LABELS, beta=0.5)
    np.testing.assert_allclose(loss, [-np.log(sigma(1.5)), -np.log(sigma(1)), math.log(2)], rtol=1e-6)
    np.testing.assert_allclose(metrics.rewards, [1.5, -1.0, 0.0])


def test_implicit_prm_is_a_probability_of_labels():
    right, wrong = (losses.implicit_prm(LOG_RATIOS, MASK, labels)[0] for labels in (LABELS | True, LABELS & False))
    np.testing.assert_allclose(jnp.exp(-right) + jnp.exp(-wrong), 1, rtol=1e-6)


def test_bco_pair_classifies_both_responses():
    loss, _ = losses.bco_pair(PAIR, PAIR_MASK, beta=0.05)
    parts, _ = losses.implicit_prm(PAIR, PAIR_MASK, LABELS[None, :2])
    np.testing.assert_allclose(loss, parts.sum(-1), rtol=1e-6)


def test_pairs_by_hand():
    expected = {
        "nca_pair": -np.log(sigma(0.3)) - 0.5 * np.log(sigma(-0.3)) - 0.5 * np.log(sigma(0.2)),
        "bco_pair": -np.log(sigma(0.3)) - np.log(sigma(0.2)),
        "sppo_hard": (3 - 5) ** 2 + (-2 + 5) ** 2,
        "apo_zero": (1 - sigma(0.3)) + sigma(-0.2),
        "apo_down": sigma(0.3) + (1 - sigma(0.5)),
    }
    for name, value in expected.items():
        loss, metrics = losses.LOSSES[name](PAIR, PAIR_MASK)
        np.testing.assert_allclose(loss, [value], rtol=1e-6)
        np.testing.assert_allclose(metrics.rewards, [[0.3, -0.2]], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "signs"),
    [("nca_pair", (-1, 1)), ("bco_pair", (-1, 1)), ("sppo_hard", (-1, 1)), ("apo_zero", (-1, 1)), ("apo_down", (1, 1))],
)
def test_directions(name, signs):
    # Far from 0, where what apo_down takes from a chosen response outweighs what the margin gives.
    responses = jnp.array([[[1.0], [-30.0]]])
    grad = jax.grad(lambda x: losses.LOSSES[name](x, jnp.ones((1, 2, 1), bool), beta=0.1)[0].sum())(responses)
    np.testing.assert_array_equal(np.sign(grad).ravel(), signs if name != "sppo_hard" else (-1, -1))
