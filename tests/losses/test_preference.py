import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from qstar_jax import losses

CHOSEN = jnp.array([[0.5, 1.0, -0.25], [2.0, -1.0, 0.0], [-3.0, 0.5, 0.5]])
REJECTED = jnp.array([[0.25, -0.5], [1.0, 1.0], [4.0, 0.0]])
CHOSEN_MASK = jnp.array([[True, True, True], [True, True, False], [True, False, False]])
REJECTED_MASK = jnp.array([[True, True], [True, False], [True, True]])
# Sums of the log-ratios under the masks: chosen 1.25, 1, -3; rejected -0.25, 1, 4.
MARGINS = np.array([1.5, 0.0, -7.0])


def dpo(chosen=CHOSEN, rejected=REJECTED, **options):
    return losses.dpo(chosen, rejected, CHOSEN_MASK, REJECTED_MASK, **options)


def test_by_hand():
    # -log sigma(0.5 * 1.5) = log(1 + exp(-0.75)) = 0.386871, log 2, log(1 + exp(3.5)) = 3.529750
    np.testing.assert_allclose(dpo(beta=0.5), [0.386871, 0.693147, 3.529750], rtol=0, atol=2e-6)


def test_is_ln_2_where_the_policy_is_its_reference():
    np.testing.assert_allclose(dpo(CHOSEN * 0, REJECTED * 0), math.log(2), rtol=0, atol=1e-7)


@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.45])
def test_equals_a_restatement_in_float64(beta, label_smoothing):
    margin = beta * MARGINS
    expected = (1 - label_smoothing) * np.log1p(np.exp(-margin)) + label_smoothing * np.log1p(np.exp(margin))
    np.testing.assert_allclose(dpo(beta=beta, label_smoothing=label_smoothing), expected, rtol=1e-6)


def test_every_option_changes_the_result():
    plain = np.asarray(dpo(beta=0.1))
    assert (np.asarray(dpo(beta=0.2))[[0, 2]] != plain[[0, 2]]).all()
    assert (np.asarray(dpo(beta=0.1, label_smoothing=0.1))[[0, 2]] != plain[[0, 2]]).all()


def test_smoothing_puts_a_floor_under_the_loss():
    # Without smoothing a huge margin costs nothing; with it the loss grows again.
    assert dpo(CHOSEN * 0 + 100, beta=1.0)[0] < 1e-6
    assert dpo(CHOSEN * 0 + 100, beta=1.0, label_smoothing=0.1)[0] > 10


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_gradients_equal_finite_differences(label_smoothing):
    def loss(chosen, rejected):  # differences are taken on numpy arrays
        return dpo(jnp.asarray(chosen), jnp.asarray(rejected), beta=0.7, label_smoothing=label_smoothing)

    with jax.enable_x64(True):
        chosen, rejected = (jnp.asarray(np.asarray(x), jnp.float64) for x in (CHOSEN, REJECTED))
        check_grads(loss, (chosen, rejected), order=2, rtol=1e-5)


def test_gradient_stays_finite_for_huge_margins():
    grad = jax.grad(lambda c: dpo(c, beta=1.0).sum())(CHOSEN * 1e4)
    assert np.isfinite(grad).all()
    np.testing.assert_allclose(grad[2, 0], -1.0)  # a lost pair pulls with full weight


def test_batched_equals_vmapped_and_takes_any_leading_axes():
    single = jax.vmap(lambda *x: losses.dpo(*x, beta=0.3))(CHOSEN, REJECTED, CHOSEN_MASK, REJECTED_MASK)
    np.testing.assert_allclose(single, dpo(beta=0.3), rtol=1e-6)
    arguments = (x[None] for x in (CHOSEN, REJECTED, CHOSEN_MASK, REJECTED_MASK))
    assert losses.dpo(*arguments).shape == (1, 3)


@pytest.mark.parametrize("rubbish", [1e30, jnp.inf, -jnp.inf, jnp.nan])
def test_padding_changes_neither_loss_nor_gradient(rubbish):
    dirty_chosen = jnp.where(CHOSEN_MASK, CHOSEN, rubbish)
    dirty_rejected = jnp.where(REJECTED_MASK, REJECTED, rubbish)
    np.testing.assert_array_equal(dpo(dirty_chosen, dirty_rejected), dpo())
    grad = jax.grad(lambda c, r: dpo(c, r).sum(), argnums=(0, 1))
    for found, expected in zip(grad(dirty_chosen, dirty_rejected), grad(CHOSEN, REJECTED), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_padding_is_masked_by_the_program_and_not_by_the_compiler():
    # NaN * False is NaN; a compiler may rewrite the product as a choice, and may as well not.
    dirty = jnp.where(CHOSEN_MASK, CHOSEN, jnp.nan)
    expected = dpo()
    with jax.disable_jit():
        np.testing.assert_allclose(dpo(dirty), expected, rtol=1e-6)


def test_more_padding_changes_nothing():
    padded = [jnp.pad(x, ((0, 0), (0, 5))) for x in (CHOSEN, REJECTED, CHOSEN_MASK, REJECTED_MASK)]
    np.testing.assert_allclose(losses.dpo(*padded), dpo(), rtol=1e-6)
