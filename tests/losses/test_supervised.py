import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax import losses

LOGP = jnp.array([[-1.0, -2.0, -0.5], [-3.0, -0.25, -9.0]])
MASK = jnp.array([[True, True, True], [True, True, False]])


def test_by_hand():
    np.testing.assert_allclose(losses.negative_log_likelihood(LOGP, MASK), [3.5, 3.25])


@pytest.mark.parametrize("rubbish", [jnp.nan, -jnp.inf, 1e30])
def test_padding_changes_neither_loss_nor_gradient(rubbish):
    dirty = LOGP.at[1, 2].set(rubbish)
    np.testing.assert_array_equal(losses.negative_log_likelihood(dirty, MASK), [3.5, 3.25])
    grad = jax.grad(lambda x: losses.negative_log_likelihood(x, MASK).sum())(dirty)
    np.testing.assert_array_equal(grad, [[-1, -1, -1], [-1, -1, 0]])
