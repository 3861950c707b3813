"""Losses that read more than the log-ratio of each token: its turn, a weight, a divergence, another model's reward.

Shapes: [..., 2, T] throughout, the chosen response first; c and r are sums of log-ratios over the chosen and the
rejected response, sigma is the logistic function.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, ScalarLike

from qstar_jax.losses.responses import LossMetrics, pair, record, response_sums
from qstar_jax.shapes import check_same_shape


def dmpo(
    log_ratios: Float[Array, "*B 2 T"],
    mask: Bool[Array, "*B 2 T"],
    turns: Int[Array, "*B 2 T"],
    *,
    beta: ScalarLike = 0.1,
    discount: ScalarLike = 0.7,
) -> tuple[Float[Array, "*B"], LossMetrics]:
    """Direct multi-turn preference optimization: DPO in which later turns of a dialogue count less.

    -log sigma(beta (sum_t phi(j_t, J_w) rho_t^w - sum_t phi(j_t, J_l) rho_t^l)), with rho the log-ratios of actions,
    j_t the turn of action t from 0, J the number of turns, and phi(j, J) = gamma^j (1 - gamma^(J - j)) / (1 - gamma^J):
    the share of the turns from j on in sum_j gamma^j. gamma is `discount`; where it is 1, phi = (J - j) / J. Responses
    of a single turn have DPO's loss (`sigmoid`).

    Turns are counted from where the responses part: those before are the prompt's. Elsewhere: the authors' trainer
    does so too, has gamma = 0.7 by default as here, and logs discounted rewards.

    Args:
        log_ratios: Token log-ratios, in nats. Shape [..., 2, T].
        mask: True at actions. Shape [..., 2, T].
        turns: Turn of each token, from 0; not read where `mask` is False. Shape [..., 2, T].
        beta: Temperature: reward per nat.
        discount: gamma in (0, 1], per turn.

    Returns:
        Loss of each pair, in nats, shape [...], and its metrics, whose rewards are not discounted.

    References:
        Shi et al., "Direct multi-turn preference optimization for language agents", arXiv 2406.14868.
    """
    check_same_shape(log_ratios=log_ratios, mask=mask, turns=turns)
    turns = jnp.where(mask, turns, 0)
    num_turns = jnp.max(turns, axis=-1, keepdims=True) + 1
    # Powers of gamma minus 1 as they are, lest digits are lost where gamma is near 1.
    log_gamma = jnp.where(discount == 1, -1.0, jnp.log(discount))
    discounted = discount**turns * jnp.expm1((num_turns - turns) * log_gamma) / jnp.expm1(num_turns * log_gamma)
    weights = jnp.where(discount == 1, (num_turns - turns) / num_turns, discounted)
    chosen, rejected = pair(response_sums(weights * jnp.where(mask, log_ratios, 0.0), mask))
    return -jax.nn.log_sigmoid(beta * (chosen - rejected)), record(beta * response_sums(log_ratios, mask))


def tdpo1(
    log_ratios: Float[Array, "*B 2 T"],
    mask: Bool[Array, "*B 2 T"],
    kl: Float[Array, "*B 2 T"],
    *,
    beta: ScalarLike = 0.1,
) -> tuple[Float[Array, "*B"], LossMetrics]:
    """Token-level DPO, first form: -log sigma(beta [(c - r) - (K_l - K_w)]), K the summed KL(pi_ref || pi).

    Args:
        log_ratios: Token log-ratios, in nats. Shape [..., 2, T].
        mask: True at actions. Shape [..., 2, T].
        kl: KL(pi_ref(. | s_t) || pi(. | s_t)) at each token, in nats (`mdp.kl_divergence`). Shape [..., 2, T].
        beta: Temperature: reward per nat.

    Returns:
        Loss of each pair, in nats, shape [...], and its metrics.

    References:
        Zeng et al., "Token-level direct preference optimization", arXiv 2404.11999, Eq. 15.
    """
    sums = response_sums(log_ratios, mask)
    chosen, rejected = pair(sums)
    chosen_kl, rejected_kl = pair(response_sums(kl, mask))
    return -jax.nn.log_sigmoid(beta * (chosen - rejected - (rejected_kl - chosen_kl))), record(beta * sums)


def tdpo2(
    log_ratios: Float[Array, "*B 2 T"],
    mask: Bool[Array, "*B 2 T"],
    kl: Float[Array, "*B 2 T"],
    *,
    beta: ScalarLike = 0.1,
    alpha: ScalarLike = 0.5,
) -> tuple[Float[Array, "*B"], LossMetrics]:
    """Token-level DPO, second form: -log sigma(beta [(c - r) - alpha (K_l - stop_gradient(K_w))]).

    Args:
        log_ratios: Token log-ratios, in nats. Shape [..., 2, T].
        mask: True at actions. Shape [..., 2, T].
        kl: KL(pi_ref(. | s_t) || pi(. | s_t)) at each token, in nats (`mdp.kl_divergence`). Shape [..., 2, T].
        beta: Temperature: reward per nat.
        alpha: Weight of the divergences.

    Returns:
        Loss of each pair, in nats, shape [...], and its metrics.

    References:
        Zeng et al., arXiv 2404.11999, Eq. 17.
    """
    sums = response_sums(log_ratios, mask)
    chosen, rejected = pair(sums)
    chosen_kl, rejected_kl = pair(response_sums(kl, mask))
    divergence = rejected_kl - jax.lax.stop_gradient(chosen_kl)
    return -jax.nn.log_sigmoid(beta * (chosen - rejected - alpha * divergence)), record(beta * sums)


def tgdpo(
    log_ratios: Float[Array, "*B 2 T"],
    mask: Bool[Array, "*B 2 T"],
    guide_rewards: Float[Array, "*B 2 T"],
    *,
    beta: ScalarLike = 0.1,
    alpha: ScalarLike = 0.5,
) -> tuple[Float[Array, "*B"], LossMetrics]:
    """DPO guided by token rewards: the weight of each token grows with the reward that another model gives it.

    -log sigma(sum_t beta (1 + alpha g_t) rho_t^w - sum_t beta (1 - alpha g_t) rho_t^l), with rho the log-ratios and g
    the guide's token rewards.

    Args:
        log_ratios: Token log-ratios, in nats. Shape [..., 2, T].
        mask: True at actions. Shape [..., 2, T].
        guide_rewards: Token rewards, for instance `TokenScores.rewards` of a DPO model; no gradient flows through
            them. Shape [..., 2, T].
        beta: Temperature: reward per nat.
        alpha: Strength of the guidance, per unit of reward.

    Returns:
        Loss of each pair, in nats, shape [...], and its metrics.

    References:
        Zhu et al., "TGDPO: harnessing token-level reward guidance for enhancing direct preference optimization",
        arXiv 2506.14574.
    """
    sums = response_sums(log_ratios, mask)
    check_same_shape(guide_rewards=guide_rewards, mask=mask)
    # Masked before the product: 0 * NaN under the mask would reach the gradient.
    guide = jnp.where(mask, jax.lax.stop_gradient(guide_rewards), 0.0)
    guided = response_sums(guide * jnp.where(mask, log_ratios, 0.0), mask)
    chosen, rejected = pair(sums)
    guided_chosen, guided_rejected = pair(guided)
    margin = beta * (chosen + alpha * guided_chosen - rejected + alpha * guided_rejected)
    return -jax.nn.log_sigmoid(margin), record(beta * sums)


def weighted_sigmoid(
    log_ratios: Float[Array, "*B 2 T"],
    mask: Bool[Array, "*B 2 T"],
    weights: Float[Array, "*B 2 T"],
    *,
    beta: ScalarLike = 0.1,
) -> tuple[Float[Array, "*B"], LossMetrics]:
    """DPO in which every token has a weight: -log sigma(beta (sum_t w_t rho_t^w - sum_t w_t rho_t^l)).

    With weights of 1 it is `sigmoid`; `token_weights` has those of TIS-DPO and SePO. Elsewhere: TIS-DPO also subtracts
    a weighted divergence of the whole distributions, as its code does by default.

    Args:
        log_ratios: Token log-ratios rho, in nats. Shape [..., 2, T].
        mask: True at actions. Shape [..., 2, T].
        weights: Weight of each token; no gradient flows through them. Shape [..., 2, T].
        beta: Temperature: reward per nat.

    Returns:
        Loss of each pair, in nats, shape [...], and its metrics, whose rewards are not weighted.

    References:
        Liu et al., "TIS-DPO: token-level importance sampling for direct preference optimization with estimated
        weights", arXiv 2410.04350.
    """
    check_same_shape(weights=weights, mask=mask)
    # Masked before the product: 0 * NaN under the mask would reach the gradient.
    weights = jnp.where(mask, jax.lax.stop_gradient(weights), 0.0)
    chosen, rejected = pair(response_sums(weights * jnp.where(mask, log_ratios, 0.0), mask))
    return -jax.nn.log_sigmoid(beta * (chosen - rejected)), record(beta * response_sums(log_ratios, mask))
