"""The sums and means that losses compare, and the metrics that they return."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax.errors import InputError
from qstar_jax.losses.responses import pair, record, response_means, response_sums, smoothed_log_loss


def test_sums_and_means_by_hand():
    values = jnp.array([[1.0, 2.0, 4.0], [jnp.nan, 3.0, jnp.inf], [5.0, 6.0, 7.0]])
    mask = jnp.array([[True, False, True], [False, True, False], [False, False, False]])
    np.testing.assert_array_equal(response_sums(values, mask), [5, 3, 0])
    np.testing.assert_array_equal(response_means(values, mask), [2.5, 3, 0])
    for function, weights in ((response_sums, [1, 1]), (response_means, [0.5, 1])):
        grad = jax.grad(lambda x, f=function: f(x, mask).sum())(values)
        np.testing.assert_array_equal(grad, np.array([[weights[0]], [weights[1]], [0]]) * np.asarray(mask))
        with pytest.raises((InputError, TypeError)):
            function(values[:1], mask)
        with pytest.raises((InputError, TypeError)):
            inspect.unwrap(function)(values[:1], mask)


def test_a_tie_is_no_win():
    metrics = record(jnp.array([[1.0, 0.5], [0.5, 0.5], [-2.0, 1.0]]))
    np.testing.assert_array_equal(metrics.margins, [0.5, 0, -3])
    np.testing.assert_array_equal(metrics.accuracies, [1, 0, 0])
    assert [part.tolist() for part in pair(metrics.rewards)] == [[1, 0.5, -2], [0.5, 0.5, 1]]


def test_smoothed_log_loss():
    margins = np.array([-1e4, -3.0, 0.0, 3.0, 1e4])
    for eps in (0.0, 0.3):
        found = smoothed_log_loss(jnp.asarray(margins), eps)
        np.testing.assert_allclose(
            found, (1 - eps) * np.logaddexp(0, -margins) + eps * np.logaddexp(0, margins), rtol=1e-6
        )
        # Labels flipped with eps, on average.
        flipped = (1 - eps) * smoothed_log_loss(jnp.asarray(margins), 0.0)
        flipped += eps * smoothed_log_loss(jnp.asarray(-margins), 0.0)
        np.testing.assert_allclose(found, flipped, rtol=1e-6)


LOG_RATIOS, MASK = jnp.zeros((4, 6)), jnp.ones((4, 6), bool)


def test_arrays_of_other_shapes_are_named():
    sums, split = inspect.unwrap(response_sums), inspect.unwrap(pair)  # without the checks of tests
    with pytest.raises(InputError, match=r"\[4, T\]: expected \[..., 2, T\], chosen first, then rejected"):
        split(sums(LOG_RATIOS, MASK))
    with pytest.raises(InputError, match=r"values \[4, 6\], mask \[1, 6\]: expected arrays of one shape"):
        sums(LOG_RATIOS, MASK[:1])
    with pytest.raises(InputError, match=r"values \[4, 6\], mask None"):
        sums(LOG_RATIOS, None)
