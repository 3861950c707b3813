from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax import losses

X = np.array([-3.0, -0.5, 0.0, 0.25, 2.0])
# The generators f(u) of the paper (Table 1, alpha's scaled as Amari's), and what their derivatives are short of ours.
GENERATORS = {
    "reverse_kl": (lambda u: u * jnp.log(u), -1.0),
    "forward_kl": (lambda u: -jnp.log(u), 1.0),
    "js_divergence": (lambda u: u * jnp.log(u) - (u + 1) * jnp.log((u + 1) / 2), 0.0),
    "alpha_divergence": (lambda u: (u**0.5 - 0.5 * u - 0.5) / (0.5 * -0.5), 0.0),
}


def test_divergences_by_hand():
    # Of pi / pi_ref = 2, that is x = log 2: log u, 1 - 1 / u, log(2 u / (1 + u)), (u^-0.5 - 1) / -0.5.
    x = jnp.log(2.0)
    np.testing.assert_allclose(losses.reverse_kl(x), np.log(2), rtol=1e-6)
    np.testing.assert_allclose(losses.forward_kl(x), 0.5, rtol=1e-6)
    np.testing.assert_allclose(losses.js_divergence(x), np.log(4 / 3), rtol=1e-6)
    np.testing.assert_allclose(losses.alpha_divergence(x), 2 - 2**0.5, rtol=1e-6)


def test_names():
    assert set(losses.DIVERGENCES) == set(GENERATORS)
    assert all(function.__name__ == name for name, function in losses.DIVERGENCES.items())


@pytest.mark.parametrize("name", GENERATORS)
def test_are_derivatives_of_their_generators(name):
    generator, constant = GENERATORS[name]
    with jax.enable_x64(True):
        expected = jax.vmap(jax.grad(generator))(jnp.exp(X)) + constant
        found = losses.DIVERGENCES[name](jnp.asarray(X))
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.5, 2.0, 3.0])
def test_alpha_divergence_of_any_order(alpha):
    u = np.exp(X)
    with jax.enable_x64(True):
        found = losses.alpha_divergence(jnp.asarray(X), alpha)
    np.testing.assert_allclose(found, (u ** (alpha - 1) - 1) / (alpha - 1), rtol=1e-10, atol=1e-14)
    if alpha == 0:
        np.testing.assert_allclose(found, losses.forward_kl(jnp.asarray(X)), rtol=1e-6, atol=1e-7)


def test_alpha_divergence_goes_to_the_reverse_kl():
    np.testing.assert_array_equal(losses.alpha_divergence(jnp.asarray(X), 1.0), losses.reverse_kl(jnp.asarray(X)))
    for alpha in (1 - 1e-5, 1 + 1e-5, 1 + 2e-6, 1 + 1e-7):
        found = losses.alpha_divergence(jnp.asarray(X, jnp.float32), alpha)
        np.testing.assert_allclose(found, X, rtol=3e-5, atol=1e-7)


@pytest.mark.parametrize(
    "divergence", [*losses.DIVERGENCES.values(), *(partial(losses.alpha_divergence, alpha=a) for a in (0.0, 1.0, 2.0))]
)
def test_grow_with_the_ratio_and_stay_finite_in_float32(divergence):
    x = jnp.array([-1e4, -200, -79, -10, -1, 0, 1, 10, 79, 200, 1e4], jnp.float32)
    found, slopes = jax.vmap(jax.value_and_grad(divergence))(x)
    assert np.isfinite(found).all() and np.isfinite(slopes).all()
    assert (np.diff(found) >= 0).all() and (slopes >= 0).all()
    assert found[5] == 0
