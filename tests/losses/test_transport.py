import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax import losses

NAMES = ["aot", "aot_unpaired"]


def make(seed=0, rows=4):
    keys = jax.random.split(jax.random.key(seed), 3)
    logp, ref = (-jax.random.exponential(key, (rows, 2, 3)) for key in keys[:2])
    return logp, ref, jax.random.bernoulli(keys[2], 0.6, logp.shape).at[..., 0].set(True)


def loss(name, logp, ref, mask, **options):
    arrays = (logp, ref) if name == "aot" else (logp - ref,)
    return losses.LOSSES[name](*arrays, mask, **options)[0]


def one_token(values):
    return jnp.asarray(values, float)[..., None], jnp.ones((len(values), 2, 1), bool)


def test_paired_by_hand():
    # Margins 3, -4, -2 (ranks 2, 0, 1) against the reference's -1, 1, 0 sorted: -1, 0, 1.
    logp, mask = one_token([[3, 0], [1, 5], [2, 4]])
    ref, _ = one_token([[0, 1], [1, 0], [2, 2]])
    found, metrics = losses.aot(logp, ref, mask, beta=1.0)
    np.testing.assert_allclose(found, np.log1p(np.exp([-2.0, 3.0, 2.0])), rtol=1e-6)
    np.testing.assert_array_equal(metrics.rewards, [[3, -1], [0, 5], [0, 2]])


def test_unpaired_by_hand():
    # Chosen 3, 1, 2 (ranks 2, 0, 1) against rejected 0, 5, 4 sorted: 0, 4, 5.
    log_ratios, mask = one_token([[3, 0], [1, 5], [2, 4]])
    found, metrics = losses.aot_unpaired(log_ratios, mask, beta=1.0)
    np.testing.assert_allclose(found, np.log1p(np.exp([2.0, -1.0, 2.0])), rtol=1e-6)
    np.testing.assert_array_equal(metrics.rewards, [[3, 0], [1, 5], [2, 4]])


@pytest.mark.parametrize("name", NAMES)
def test_one_row_is_sigmoid(name):
    logp, ref, mask = make(rows=1)
    for options in ({}, {"beta": 0.5, "label_smoothing": 0.2}):
        expected = losses.sigmoid(logp - ref, mask, **options)[0]
        np.testing.assert_allclose(loss(name, logp, ref, mask, **options), expected, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_permuted_rows_permute_the_loss(name):
    logp, ref, mask = make()
    for order in ([3, 1, 0, 2], [1, 2, 3, 0]):
        order = jnp.array(order)
        found = loss(name, logp[order], ref[order], mask[order])
        np.testing.assert_allclose(found, loss(name, logp, ref, mask)[order], rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("garbage", [0.0, np.nan, -np.inf])
def test_padding_rows_take_no_part(name, garbage):
    logp, ref, mask = make(rows=6)
    own = jnp.array([0, 2, 3, 5])
    mask = mask.at[jnp.array([1, 4])].set(False)
    logp = jnp.where(mask.any((1, 2), keepdims=True), logp, garbage)

    def total(x, ref, mask):
        found = loss(name, x, ref, mask, beta=0.5)
        return found.sum(), found

    values = jax.jit(jax.value_and_grad(total, has_aux=True))
    (_, found), grad = values(logp, ref, mask)
    (_, expected), expected_grad = values(logp[own], ref[own], mask[own])
    np.testing.assert_allclose(found[own], expected, rtol=1e-6)
    np.testing.assert_allclose(grad[own], expected_grad, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(grad[jnp.array([1, 4])], 0)
    np.testing.assert_allclose(found[jnp.array([1, 4])], np.log(2), rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_padding_is_finite(name):
    logp, ref, mask = make()
    grad = jax.grad(lambda x: loss(name, x, ref, mask & False).sum())(logp * np.nan)
    np.testing.assert_array_equal(grad, 0)


def test_ties_are_matched_one_to_one():
    log_ratios, mask = one_token([[1, 0], [1, 2], [1, 2]])
    found, _ = losses.aot_unpaired(log_ratios, mask, beta=1.0)
    np.testing.assert_allclose(sorted(found), np.log1p(np.exp([-1.0, 1.0, 1.0])), rtol=1e-6)


def test_the_gradient_goes_to_the_matched_response():
    log_ratios, mask = one_token([[3, 0], [1, 5], [2, 4]])
    grad = jax.grad(lambda x: losses.aot_unpaired(x, mask, beta=1.0)[0][0])(log_ratios)
    pull = 1 / (1 + np.exp(-2.0))  # chosen 3 of row 0 against rejected 5 of row 1
    np.testing.assert_allclose(grad[..., 0], [[-pull, 0], [0, pull], [0, 0]], rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_groups_do_not_mix(name):
    logp, ref, mask = (jnp.stack(x) for x in zip(make(0), make(1), strict=True))
    found = loss(name, logp, ref, mask)
    for group in range(2):
        np.testing.assert_allclose(found[group], loss(name, logp[group], ref[group], mask[group]), rtol=1e-6)
