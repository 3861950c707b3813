import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax import losses

# Sums under the mask: chosen 1.25, 1, -3; rejected -0.25, 1, 4.
LOG_RATIOS = jnp.array([[[0.5, 1, -0.25], [0.25, -0.5, 9]], [[2, -1, 9], [1, 9, 9]], [[-3, 9, 9], [4, 0, 9]]], float)
MASK = jnp.array([[[1, 1, 1], [1, 1, 0]], [[1, 1, 0], [1, 0, 0]], [[1, 0, 0], [1, 1, 0]]], bool)
SWAPPED = LOG_RATIOS[:, ::-1], MASK[:, ::-1]


def loss(name, *arrays, **options):
    return losses.LOSSES[name](*(arrays or (LOG_RATIOS, MASK)), **options)[0]


def of_sums(name, chosen, rejected, **options):
    """The loss of responses of one token each."""
    responses = jnp.stack(jnp.broadcast_arrays(jnp.asarray(chosen, float), jnp.asarray(rejected, float)), -1)
    return loss(name, responses[..., None], jnp.ones((*responses.shape, 1), bool), **options)


def test_sigmoid_by_hand():
    # -log sigma(0.5 * 1.5) = log(1 + exp(-0.75)) = 0.386871, log 2, log(1 + exp(3.5)) = 3.529750
    np.testing.assert_allclose(loss("sigmoid", beta=0.5), [0.386871, 0.693147, 3.529750], rtol=0, atol=2e-6)


def test_rewards_by_hand():
    metrics = losses.sigmoid(LOG_RATIOS, MASK, beta=0.5)[1]
    np.testing.assert_allclose(metrics.rewards, [[0.625, -0.125], [0.5, 0.5], [-1.5, 2.0]])
    np.testing.assert_allclose(metrics.margins, [0.75, 0, -3.5])
    np.testing.assert_array_equal(metrics.accuracies, [1, 0, 0])


@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm", "robust", "dpop", "dpo_shift"])
def test_is_ln_2_where_the_policy_is_its_reference(name):
    np.testing.assert_allclose(loss(name, LOG_RATIOS * 0, MASK), math.log(2), rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "options"),
    [("dpo_shift", {"shift": 1.0}), ("robust", {"label_smoothing": 0.0}), ("dpop", {"penalty": 0.0})],
)
def test_is_sigmoid_in_the_limit(name, options):
    np.testing.assert_allclose(loss(name, beta=0.7, **options), loss("sigmoid", beta=0.7), rtol=1e-6)


def test_smoothing_puts_a_floor_under_the_loss():
    # Without smoothing a huge margin costs nothing; with it the loss grows again.
    assert of_sums("sigmoid", 100, 0, beta=1.0) < 1e-6
    assert of_sums("sigmoid", 100, 0, beta=1.0, label_smoothing=0.1) > 9


def test_a_lost_pair_pulls_with_full_weight():
    grad = jax.grad(lambda x: loss("sigmoid", x, MASK, beta=1.0).sum())(LOG_RATIOS * 1e4)
    np.testing.assert_allclose(grad[2], [[-1, 0, 0], [1, 1, 0]])


@pytest.mark.parametrize("eps", [0.1, 0.3, 0.45])
def test_robust_is_unbiased_under_flipped_labels(eps):
    with jax.enable_x64(True):
        kept, flipped = (
            loss("robust", jnp.asarray(x, jnp.float64), mask, beta=0.7, label_smoothing=eps)
            for x, mask in ((LOG_RATIOS, MASK), SWAPPED)
        )
        clean = loss("sigmoid", jnp.asarray(LOG_RATIOS, jnp.float64), MASK, beta=0.7)
        np.testing.assert_allclose((1 - eps) * kept + eps * flipped, clean, rtol=1e-10)


def test_normalized_losses_count_the_tokens_of_each_response():
    # Means: 1.25 / 3 + 0.125, 0.5 - 1, -3 - 2.
    margins = np.array([1.25 / 3 + 0.125, -0.5, -5.0])
    np.testing.assert_allclose(loss("sigmoid_norm", beta=2.0), np.log1p(np.exp(-2 * margins)), rtol=1e-6)
    np.testing.assert_allclose(loss("ipo", beta=2.0), (margins - 0.25) ** 2, rtol=1e-6)


def test_hinge_stops_at_margin_1():
    values, grads = jax.vmap(jax.value_and_grad(lambda c: of_sums("hinge", c, 0.0, beta=0.5)))(jnp.array([1.5, 3.0]))
    np.testing.assert_allclose(values, [0.25, 0])
    np.testing.assert_allclose(grads, [-0.5, 0])


def test_ipo_draws_the_margin_to_its_target():
    for name in ("ipo", "ipo_sum"):
        np.testing.assert_allclose(of_sums(name, 3.0, 1.0, beta=0.25), 0, atol=1e-12)
        np.testing.assert_allclose(of_sums(name, [4.0, 2.0], 1.0, beta=0.25), 1, rtol=1e-6)


@pytest.mark.parametrize("eps", [1e-3, 0.2])
def test_exo_is_0_at_its_target_and_positive_elsewhere(eps):
    target = math.log((1 - eps) / eps) / 0.1
    np.testing.assert_allclose(of_sums("exo_pair", target, 0.0, label_smoothing=eps), 0, atol=1e-6)
    assert (of_sums("exo_pair", target + jnp.array([-20.0, -5.0, 5.0, 20.0]), 0.0, label_smoothing=eps) > 1e-5).all()


def test_discopop_by_hand():
    # At margin 0 the blend is even; tau = 1 and margin 1: (1 - g) log(1 + 1/e) + g / e with g = 0.731059.
    np.testing.assert_allclose(of_sums("discopop", 0.0, 0.0), (math.log(2) + 1) / 2, rtol=1e-6)
    np.testing.assert_allclose(of_sums("discopop", 10.0, 0.0, tau=1.0), 0.353190, rtol=2e-5)


def test_dpop_charges_for_a_chosen_response_below_the_reference():
    # 0.5 * (-0.2 - 0.1 - 10 * 0.2) = -1.15; above the reference it is sigmoid.
    np.testing.assert_allclose(
        of_sums("dpop", -0.2, 0.1, beta=0.5, penalty=10.0), math.log1p(math.exp(1.15)), rtol=1e-6
    )
    np.testing.assert_allclose(of_sums("dpop", 0.2, 3.0, beta=0.5), of_sums("sigmoid", 0.2, 3.0, beta=0.5), rtol=1e-6)
