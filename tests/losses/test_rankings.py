from itertools import permutations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax import losses
from qstar_jax.errors import InputError

LOG_RATIOS = jax.random.normal(jax.random.key(0), (3, 4, 3)) * 3
MASK = jnp.array([[1, 1, 0], [0, 1, 1], [1, 1, 1], [1, 0, 0]], bool) & jnp.ones((3, 1, 1), bool)
plackett_luce = jax.jit(losses.plackett_luce, static_argnames="beta")  # or each step of its scan is compiled
PRESENT = jnp.array([[True, True, False, True], [False, False, True, True], [True, False, False, False]])


def test_three_responses_by_hand():
    # Rewards 0.5 * (2, 0, -2) = (1, 0, -1): log(1 + e^-1 + e^-2) for the first place, log(1 + e^-1) for the second.
    log_ratios = jnp.array([[[2.0], [0.0], [-2.0]]])
    loss, metrics = losses.plackett_luce(log_ratios, jnp.ones((1, 3, 1), bool), beta=0.5)
    expected = np.log(1 + np.exp(-1) + np.exp(-2)) + np.log(1 + np.exp(-1))
    np.testing.assert_allclose(loss, [expected], rtol=1e-6)
    np.testing.assert_array_equal(metrics.rewards, [[1, 0, -1]])


def test_of_two_is_sigmoid():
    expected = losses.sigmoid(LOG_RATIOS[:, :2], MASK[:, :2], beta=0.3)[0]
    found = plackett_luce(LOG_RATIOS[:, :2], MASK[:, :2], beta=0.3)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_probabilities_of_all_rankings_sum_to_1():
    orders = jnp.array(list(permutations(range(4))))
    probabilities = jnp.exp(-plackett_luce(LOG_RATIOS[0, orders], MASK[0, orders], beta=0.5)[0])
    assert probabilities.shape == (24,)
    np.testing.assert_allclose(probabilities.sum(), 1, rtol=1e-5)
    assert probabilities.max() > 5 * probabilities.min()


def test_is_ln_of_all_orders_where_the_policy_is_its_reference():
    np.testing.assert_allclose(plackett_luce(LOG_RATIOS * 0, MASK)[0], np.log(24), rtol=1e-6)


def test_empty_places_do_not_count():
    found, metrics = plackett_luce(LOG_RATIOS, MASK, PRESENT, beta=0.5)
    for row in range(3):
        kept = np.flatnonzero(PRESENT[row])
        expected, shorter = losses.plackett_luce(LOG_RATIOS[row, kept], MASK[row, kept], beta=0.5)
        np.testing.assert_allclose(found[row], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(metrics.rewards[row, kept], shorter.rewards, rtol=1e-6)
    assert found[2] == 0  # there is nothing to rank


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e30])
def test_values_in_empty_places_change_nothing(garbage):
    def total(x, mask):
        loss, _ = plackett_luce(x, mask, PRESENT)
        return loss.sum()

    for mask in (MASK, MASK & PRESENT[..., None]):
        value, grad = jax.value_and_grad(total)(LOG_RATIOS, mask)
        dirty = jnp.where(PRESENT[..., None], LOG_RATIOS, garbage)
        dirty_value, dirty_grad = jax.value_and_grad(total)(dirty, mask)
        assert np.isfinite(value) and np.isfinite(grad).all()
        np.testing.assert_array_equal(dirty_value, value)
        np.testing.assert_array_equal(dirty_grad, grad)
        np.testing.assert_array_equal(grad[~PRESENT], 0)


def test_nothing_present_is_0():
    value, grad = jax.value_and_grad(lambda x: plackett_luce(x, MASK, PRESENT & False)[0].sum())(LOG_RATIOS)
    np.testing.assert_array_equal(value, 0)
    np.testing.assert_array_equal(grad, 0)


def test_huge_rewards_with_empty_places():
    loss, grad = jax.value_and_grad(lambda x: plackett_luce(x, MASK, PRESENT)[0].sum())(LOG_RATIOS * 1e4)
    assert np.isfinite(loss) and np.isfinite(grad).all()


def test_present_must_have_the_shape_of_the_rankings():
    with pytest.raises((InputError, TypeError)):
        plackett_luce(LOG_RATIOS, MASK, PRESENT[0])
