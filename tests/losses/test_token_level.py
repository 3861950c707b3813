import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax import losses, mdp
from qstar_jax.errors import InputError

KEYS = jax.random.split(jax.random.key(0), 4)
LOG_RATIOS = jax.random.normal(KEYS[0], (3, 2, 4)) * 2
KL = jax.random.exponential(KEYS[1], (3, 2, 4))
GUIDE = jax.random.normal(KEYS[2], (3, 2, 4))
MASK = jax.random.bernoulli(KEYS[3], 0.7, (3, 2, 4)).at[..., 1].set(True)


def sigmoid(log_ratios=LOG_RATIOS, mask=MASK):
    return losses.sigmoid(log_ratios, mask, beta=0.4)[0]


def test_dmpo_by_hand():
    # The chosen dialogue has three turns, and the environment speaks after the first; the rejected one has two.
    log_ratios = jnp.array([[[1.0, 9.0, 2.0, 3.0], [4.0, 5.0, 6.0, 9.0]]])
    turns = jnp.array([[[0, -1, 1, 2], [0, 0, 1, -1]]])
    mask = turns >= 0
    # gamma = 1/2: of 1 + 1/2 + 1/4, the turns from j on have 1, 3/7, 1/7; of 1 + 1/2 they have 1, 1/3.
    margin = 0.5 * (1 + 2 * 3 / 7 + 3 / 7 - (4 + 5 + 6 / 3))
    found, metrics = losses.dmpo(log_ratios, mask, turns, beta=0.5, discount=0.5)
    np.testing.assert_allclose(found, [np.log1p(np.exp(-margin))], rtol=1e-6)
    np.testing.assert_allclose(metrics.rewards, [[0.5 * 6, 0.5 * 15]])
    # gamma = 1: the share of the turns that are still to come.
    margin = 0.5 * (1 + 2 * 2 / 3 + 3 / 3 - (4 + 5 + 6 / 2))
    found = losses.dmpo(log_ratios, mask, turns, beta=0.5, discount=1.0)[0]
    np.testing.assert_allclose(found, [np.log1p(np.exp(-margin))], rtol=1e-6)


def test_dmpo_is_continuous_in_its_discount():
    turns = jnp.broadcast_to(jnp.array([0, 0, 1, 2]), MASK.shape)
    at, near, below = (losses.dmpo(LOG_RATIOS, MASK, turns, discount=d)[0] for d in (1.0, 1 - 1e-6, 0.9))
    np.testing.assert_allclose(near, at, rtol=1e-5)
    assert np.abs(below - at).max() > 1e-4
    first = losses.sigmoid(LOG_RATIOS, MASK & (turns == 0))[0]
    np.testing.assert_allclose(losses.dmpo(LOG_RATIOS, MASK, turns, discount=1e-6)[0], first, rtol=1e-4)


@pytest.mark.parametrize("discount", [0.3, 0.7, 1.0])
def test_dmpo_of_single_turns_is_dpo_to_the_last_bit(discount):
    found = losses.dmpo(LOG_RATIOS, MASK, jnp.zeros(MASK.shape, int), beta=0.4, discount=discount)
    np.testing.assert_array_equal(found[0], sigmoid())


def test_tdpo_by_hand():
    log_ratios = jnp.array([[[1.0, 2.0], [0.5, 9.0]]])
    kl = jnp.array([[[0.25, 0.5], [2.0, 9.0]]])
    mask = jnp.array([[[True, True], [True, False]]])
    # 0.5 * (3 - 0.5 - (2 - 0.75)) = 0.625 and, with alpha = 0.2, 0.5 * (2.5 - 0.25) = 1.125
    np.testing.assert_allclose(losses.tdpo1(log_ratios, mask, kl, beta=0.5)[0], [np.log1p(np.exp(-0.625))], rtol=1e-6)
    found = losses.tdpo2(log_ratios, mask, kl, beta=0.5, alpha=0.2)[0]
    np.testing.assert_allclose(found, [np.log1p(np.exp(-1.125))], rtol=1e-6)


def test_tgdpo_by_hand():
    log_ratios, mask = jnp.array([[[2.0], [3.0]]]), jnp.ones((1, 2, 1), bool)
    # A token that the guide likes counts more in the chosen response and less in the rejected one.
    for guide, margin in (([1.0, 0.0], 2 * 1.5 - 3), ([0.0, 1.0], 2 - 3 * 0.5), ([-1.0, -1.0], 2 * 0.5 - 3 * 1.5)):
        found, metrics = losses.tgdpo(log_ratios, mask, jnp.array(guide)[None, :, None], beta=1.0, alpha=0.5)
        np.testing.assert_allclose(found, [np.log1p(np.exp(-margin))], rtol=1e-6)
        np.testing.assert_array_equal(metrics.rewards, [[2, 3]])


def test_without_divergence_or_guide_they_are_sigmoid():
    for found in (
        losses.tdpo1(LOG_RATIOS, MASK, KL * 0, beta=0.4),
        losses.tdpo2(LOG_RATIOS, MASK, KL * 0, beta=0.4),
        losses.tdpo2(LOG_RATIOS, MASK, KL, beta=0.4, alpha=0.0),
        losses.tgdpo(LOG_RATIOS, MASK, GUIDE, beta=0.4, alpha=0.0),
        losses.tgdpo(LOG_RATIOS, MASK, GUIDE * 0, beta=0.4),
    ):
        np.testing.assert_allclose(found[0], sigmoid(), rtol=1e-6)


def test_tdpo_forms_agree_in_value_for_alpha_1():
    one, two = losses.tdpo1(LOG_RATIOS, MASK, KL), losses.tdpo2(LOG_RATIOS, MASK, KL, alpha=1.0)
    np.testing.assert_allclose(one[0], two[0], rtol=1e-6)


def test_the_chosen_divergence_has_a_gradient_in_the_first_form_only():
    def grad(loss, **options):
        return jax.grad(lambda kl: loss(LOG_RATIOS, MASK, kl, beta=0.4, **options)[0].sum())(KL)

    one, two = grad(losses.tdpo1), grad(losses.tdpo2, alpha=1.0)
    assert (one[:, 0][MASK[:, 0]] < 0).all() and (one[:, 1][MASK[:, 1]] > 0).all()
    np.testing.assert_array_equal(two[:, 0], 0)
    np.testing.assert_allclose(two[:, 1], one[:, 1], rtol=1e-6)


def test_tdpo_goes_down_from_the_reference_along_its_gradient():
    logits = jax.random.normal(KEYS[0], (1, 2, 3, 5))
    tokens, mask = jnp.array([[[0, 1, 2], [3, 4, 0]]]), jnp.ones((1, 2, 3), bool)

    @jax.jit  # the pieces of a softmax's gradient take longer to compile one by one
    def loss(policy):
        ratios = mdp.TokenScores.from_logits(policy, logits, tokens, mask).log_ratios()
        return losses.tdpo2(ratios, mask, mdp.kl_divergence(logits, policy, mask))[0].sum()

    value, grad = jax.jit(jax.value_and_grad(loss))(logits)
    np.testing.assert_allclose(value, np.log(2), rtol=1e-6)
    assert loss(logits - grad) < value


@pytest.mark.parametrize("loss", [losses.tdpo1, losses.tdpo2, losses.tgdpo])
def test_a_guide_of_another_shape_is_refused(loss):
    for more in (KL[:1], KL[0], KL[..., :1]):
        with pytest.raises((InputError, TypeError)):
            loss(LOG_RATIOS, MASK, more)
