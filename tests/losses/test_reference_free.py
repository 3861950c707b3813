import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax import losses

# Chosen responses have 3, 2 and 0 tokens, rejected ones 1, 2 and 2.
LOGP = jnp.array([[[-1, -2, -0.5], [-4, 9, 9]], [[-3, -0.25, 9], [-1, -1, 9]], [[9, 9, 9], [-2, -1, 9]]], float)
MASK = jnp.array([[[1, 1, 1], [1, 0, 0]], [[1, 1, 0], [1, 1, 0]], [[0, 0, 0], [1, 1, 0]]], bool)
CHOSEN, CHOSEN_MASK = LOGP[:, 0], MASK[:, 0]


def test_negative_log_likelihood_by_hand():
    expected = {"none": [3.5, 3.25, 0], "answer_tokens": [3.5 / 3, 1.625, 0], "batch_tokens": [1.4, 1.3, 0]}
    for normalize, values in expected.items():
        found = losses.negative_log_likelihood(CHOSEN, CHOSEN_MASK, normalize=normalize)
        np.testing.assert_allclose(found, values, rtol=1e-6)
        np.testing.assert_allclose(losses.sft(LOGP, MASK, normalize=normalize)[0], values, rtol=1e-6)


def test_batch_tokens_is_the_usual_cross_entropy():
    found = losses.negative_log_likelihood(CHOSEN, CHOSEN_MASK, normalize="batch_tokens")
    np.testing.assert_allclose(found.sum() / 2, 6.75 / 5, rtol=1e-6)  # two responses with tokens, five tokens


@pytest.mark.parametrize("normalize", ["none", "answer_tokens", "batch_tokens"])
def test_a_batch_of_padding_is_0(normalize):
    def total(x):
        return losses.negative_log_likelihood(x, CHOSEN_MASK & False, normalize=normalize).sum()

    value, grad = jax.value_and_grad(total)(CHOSEN * jnp.nan)
    np.testing.assert_array_equal(value, 0)
    np.testing.assert_array_equal(grad, 0)


@pytest.mark.parametrize("garbage", [jnp.nan, -jnp.inf, 1e30])
def test_garbage_under_the_mask_of_the_likelihood(garbage):
    value, grad = jax.value_and_grad(lambda x: losses.negative_log_likelihood(x, CHOSEN_MASK).sum())(
        jnp.where(CHOSEN_MASK, CHOSEN, garbage)
    )
    assert value == 6.75
    np.testing.assert_array_equal(grad, -CHOSEN_MASK.astype(float))


def test_unknown_words_are_refused():
    # The types of the signatures refuse them in tests, the functions themselves elsewhere.
    unchecked = losses.negative_log_likelihood.__wrapped__
    for call in (
        lambda: losses.cpl.__wrapped__(LOGP, MASK, bc_data="both"),
        lambda: unchecked(CHOSEN, CHOSEN_MASK, normalize="tokens"),
    ):
        with pytest.raises(ValueError, match=r"is unknown; choose"):
            call()


def test_sft_leaves_the_rejected_response_alone():
    grad = jax.grad(lambda x: losses.sft(x, MASK)[0].sum())(LOGP)
    np.testing.assert_array_equal(grad[:, 1], 0)
    np.testing.assert_allclose(losses.sft(LOGP, MASK)[1].rewards, [[-3.5, -4], [-3.25, -2], [0, -3]])


def test_simpo_by_hand():
    found, metrics = losses.simpo(LOGP, MASK, beta=2.0, gamma=0.5)
    np.testing.assert_allclose(metrics.rewards, [[-7 / 3, -8], [-3.25, -2], [0, -3]], rtol=1e-6)
    margins = np.array([8 - 7 / 3, -1.25, 3.0]) - 0.5
    np.testing.assert_allclose(found, np.log1p(np.exp(-margins)), rtol=1e-6)


def test_cpo_is_sigmoid_of_likelihoods_and_sft():
    found, metrics = losses.cpo(LOGP, MASK, beta=0.3, label_smoothing=0.1, nll_weight=0.7)
    expected, expected_metrics = losses.sigmoid(LOGP, MASK, beta=0.3, label_smoothing=0.1)
    np.testing.assert_allclose(found, expected + 0.7 * losses.sft(LOGP, MASK)[0], rtol=1e-6)
    np.testing.assert_allclose(metrics.rewards, expected_metrics.rewards, rtol=1e-6)


def test_orpo_by_hand():
    logp = jnp.log(jnp.array([[[0.5, 0.125], [0.2, 9.0]]]))
    mask = jnp.array([[[True, True], [True, False]]])
    # p = sqrt(0.5 * 0.125) = 0.25 and 0.2, odds 1/3 and 1/4; sigma(log x) = x / (1 + x)
    ratio = (1 / 3) / (1 / 4)
    expected = -np.log(0.5 * 0.125) - 0.4 * np.log(ratio / (1 + ratio))
    found, metrics = losses.orpo(logp, mask, odds_weight=0.4, normalize="none")
    np.testing.assert_allclose(found, [expected], rtol=1e-6)
    np.testing.assert_allclose(metrics.rewards, 0.4 * np.log([[0.25, 0.2]]), rtol=1e-6)


def test_orpo_is_finite_where_the_model_is_certain():
    for chosen in (0.0, -1e-9, -1e-7):
        logp = jnp.array([[[chosen, chosen], [-1.0, -2.0]]])
        mask = jnp.ones(logp.shape, bool)
        value, grad = jax.value_and_grad(lambda x, m=mask: losses.orpo(x, m)[0].sum())(logp)
        assert np.isfinite(value) and np.isfinite(grad).all()
