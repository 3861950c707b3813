import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax import losses
from qstar_jax.errors import InputError

VALUES = jnp.array([[[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]])
MASK = jnp.array([[[True, True, False, True], [False, True, False, False]]])


def test_desensitize_length_by_hand():
    # The shorter response has one token: of the longer one the first counts whole.
    found = losses.desensitize_length(VALUES, MASK, ld_alpha=0.25)
    np.testing.assert_array_equal(found, [[[1, 0.5, 0, 1], [0, 6, 0, 0]]])
    swapped = losses.desensitize_length(VALUES[:, ::-1], MASK[:, ::-1], ld_alpha=0.25)
    np.testing.assert_array_equal(swapped, found[:, ::-1])


def test_ld_alpha_of_nothing_leaves_the_shared_length_only():
    np.testing.assert_array_equal(losses.desensitize_length(VALUES, MASK, ld_alpha=0.0), [[[1, 0, 0, 0], [0, 6, 0, 0]]])


def test_desensitize_length_changes_nothing_with_alpha_1_or_equal_lengths():
    np.testing.assert_array_equal(losses.desensitize_length(VALUES, MASK, ld_alpha=1.0), jnp.where(MASK, VALUES, 0))
    equal = jnp.array([[[True, True, False, False], [False, True, False, True]]])
    np.testing.assert_array_equal(losses.desensitize_length(VALUES, equal, ld_alpha=0.3), jnp.where(equal, VALUES, 0))


def test_beside_an_empty_response_every_token_is_beyond_its_length():
    mask = MASK.at[0, 1].set(False)
    found = losses.desensitize_length(VALUES, mask, ld_alpha=0.5)
    np.testing.assert_array_equal(found, [[[0.5, 1, 0, 2], [0, 0, 0, 0]]])


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e30])
def test_garbage_under_the_mask(garbage):
    dirty = jnp.where(MASK, VALUES, garbage)

    def weighted(x):
        return losses.desensitize_length(x, MASK, ld_alpha=0.25)

    np.testing.assert_array_equal(weighted(dirty), weighted(VALUES))
    grad = jax.grad(lambda x: weighted(x).sum())(dirty)
    np.testing.assert_array_equal(grad, [[[1, 0.25, 0, 0.25], [0, 1, 0, 0]]])
    np.testing.assert_array_equal(losses.wpo_weights(-dirty, MASK), losses.wpo_weights(-VALUES, MASK))
    aligned = losses.wpo_weights(-dirty, MASK, jnp.where(MASK, -1.0, garbage))
    np.testing.assert_array_equal(aligned, losses.wpo_weights(-VALUES, MASK, -jnp.ones_like(VALUES)))
    with jax.disable_jit():
        assert np.isfinite(weighted(dirty)).all() and np.isfinite(losses.wpo_weights(dirty, MASK, dirty)).all()


def test_wpo_weights_by_hand():
    logp = jnp.log(jnp.array([[[0.5, 0.25, 9.0, 0.5], [9.0, 0.3, 9.0, 9.0]]]))
    # Geometric means of the responses' probabilities: (0.5 * 0.25 * 0.5)^(1/3) and 0.3.
    plain = 0.0625 ** (1 / 3) * 0.3
    np.testing.assert_allclose(losses.wpo_weights(logp, MASK), [plain], rtol=1e-6)
    log_sum_sq = jnp.log(jnp.array([[[0.5, 0.5, 0.1, 0.25], [0.1, 0.6, 0.1, 0.1]]]))
    np.testing.assert_allclose(losses.wpo_weights(logp, MASK, log_sum_sq), [1.0 * 0.5], rtol=1e-6)


def test_what_the_policy_samples_itself_weighs_1_on_average():
    pi = np.array([0.5, 0.3, 0.2])
    mask = jnp.ones((3, 2, 1), bool)  # one token per response, the same one in both
    logp = jnp.broadcast_to(jnp.log(pi)[:, None, None], mask.shape)
    weights = losses.wpo_weights(logp, mask, jnp.full(mask.shape, np.log((pi**2).sum())))
    np.testing.assert_allclose(pi @ np.sqrt(weights), 1.0, rtol=1e-6)


def test_wpo_weights_of_empty_responses_are_1():
    np.testing.assert_array_equal(losses.wpo_weights(-VALUES, MASK & False), [1.0])
    np.testing.assert_allclose(losses.wpo_weights(-VALUES, MASK.at[0, 0].set(False)), [np.exp(-6.0)], rtol=1e-6)


def test_no_gradient_flows_through_wpo_weights():
    grads = jax.grad(lambda a, b: losses.wpo_weights(a, MASK, b).sum(), argnums=(0, 1))(-VALUES, -VALUES)
    np.testing.assert_array_equal(jnp.stack(grads), 0)


def test_shapes_that_would_be_broadcast_are_refused():
    mask = jnp.concatenate([MASK, MASK])
    for call in (
        lambda: losses.desensitize_length(VALUES, mask, ld_alpha=0.5),
        lambda: losses.wpo_weights(VALUES, mask),
        lambda: losses.wpo_weights(jnp.concatenate([VALUES, VALUES]), mask, VALUES),
    ):
        with pytest.raises((InputError, TypeError)):
            call()
