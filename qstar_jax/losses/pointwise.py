"""Losses that pull each answer's log-ratio up or down on its own account.

Of pairs: log-ratios and masks are [..., 2, T], the chosen answer first; c and r are the sums over the chosen and the
rejected answer. Of single answers (`kto`, `implicit_prm`): [..., T] and a label each. sigma is the logistic function.
"""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, ScalarLike

from qstar_jax.losses.answers import LossMetrics, answer_sums, pair, record


def nca_pair(
    log_ratios: Float[Array, "*B 2 T"], mask: Bool[Array, "*B 2 T"], *, beta: ScalarLike = 0.1
) -> tuple[Float[Array, "*B"], LossMetrics]:
    """Noise contrastive alignment on pairs: -log sigma(beta c) - 1/2 log sigma(-beta c) - 1/2 log sigma(-beta r).

    Args:
        log_ratios: Token log-ratios, in nats. Shape [..., 2, T].
        mask: True at the answers' tokens. Shape [..., 2, T].
        beta: Temperature, in reward a nat.

    Returns:
        Loss of each pair, in nats, shape [...], and its metrics.

    References:
        Chen et al., "Noise contrastive alignment of language models with explicit rewards", arXiv 2402.05369.
    """
    rewards = beta * answer_sums(log_ratios, mask)
    chosen, rejected = pair(rewards)
    pushed_down = jax.nn.log_sigmoid(-chosen) + jax.nn.log_sigmoid(-rejected)
    return -jax.nn.log_sigmoid(chosen) - 0.5 * pushed_down, record(rewards)


def bco_pair(
    log_ratios: Float[Array, "*B 2 T"], mask: Bool[Array, "*B 2 T"], *, beta: ScalarLike = 0.1
) -> tuple[Float[Array, "*B"], LossMetrics]:
    """Binary classifier optimisation on pairs: -log sigma(beta c) - log sigma(-beta r).

    Elsewhere: the paper subtracts a running mean of the rewards from both; this form, TRL's `bco_pair`, does not.

    Args:
        log_ratios: Token log-ratios, in nats. Shape [..., 2, T].
        mask: True at the answers' tokens. Shape [..., 2, T].
        beta: Temperature, in reward a nat.

    Returns:
        Loss of each pair, in nats, shape [...], and its metrics.

    References:
        Jung et al., "Binary classifier optimization for large language model alignment", arXiv 2404.04656.
    """
    rewards = beta * answer_sums(log_ratios, mask)
    chosen, rejected = pair(rewards)
    return -jax.nn.log_sigmoid(chosen) - jax.nn.log_sigmoid(-rejected), record(rewards)


def sppo_hard(
    log_ratios: Float[Array, "*B 2 T"], mask: Bool[Array, "*B 2 T"], *, beta: ScalarLike = 0.1
) -> tuple[Float[Array, "*B"], LossMetrics]:
    """Self-play preference optimisation with hard labels: (c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2.

    Elsewhere: the paper's probabilities come from a preference model; here, as in TRL, the winner's is 1.

    Args:
        log_ratios: Token log-ratios, in nats. Shape [..., 2, T].
        mask: True at the answers' tokens. Shape [..., 2, T].
        beta: Inverse of the step size, in reward a nat.

    Returns:
        Loss of each pair, in nats^2, shape [...], and its metrics.

    References:
        Wu et al., "Self-play preference optimization for language model alignment", arXiv 2405.00675, Eq. 4.7.
    """
    sums = answer_sums(log_ratios, mask)
    chosen, rejected = pair(sums)
    return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2, record(beta * sums)


def apo_zero(
    log_ratios: Float[Array, "*B 2 T"], mask: Bool[Array, "*B 2 T"], *, beta: ScalarLike = 0.1
) -> tuple[Float[Array, "*B"], LossMetrics]:
    """Anchored preference optimisation, zero: (1 - sigma(beta c)) + sigma(beta r): chosen up, rejected down.

    For chosen answers that are better than what the model would say.

    Args:
        log_ratios: Token log-ratios, in nats. Shape [..., 2, T].
        mask: True at the answers' tokens. Shape [..., 2, T].
        beta: Temperature, in reward a nat.

    Returns:
        Loss of each pair, in [0, 2], shape [...], and its metrics.

    References:
        D'Oosterlinck et al., "Anchored preference optimization", arXiv 2408.06266, Eq. 7.
    """
    rewards = beta * answer_sums(log_ratios, mask)
    chosen, rejected = pair(rewards)
    return jax.nn.sigmoid(-chosen) + jax.nn.sigmoid(rejected), record(rewards)


def apo_down(
    log_ratios: Float[Array, "*B 2 T"], mask: Bool[Array, "*B 2 T"], *, beta: ScalarLike = 0.1
) -> tuple[Float[Array, "*B"], LossMetrics]:
    """Anchored preference optimisation, down: sigma(beta c) + (1 - sigma(beta (c - r))): both down, rejected more.

    For chosen answers that are worse than what the model would say.

    Args:
        log_ratios: Token log-ratios, in nats. Shape [..., 2, T].
        mask: True at the answers' tokens. Shape [..., 2, T].
        beta: Temperature, in reward a nat.

    Returns:
        Loss of each pair, in [0, 2], shape [...], and its metrics.

    References:
        D'Oosterlinck et al., "Anchored preference optimization", arXiv 2408.06266, Eq. 8.
    """
    rewards = beta * answer_sums(log_ratios, mask)
    chosen, rejected = pair(rewards)
    return jax.nn.sigmoid(chosen) + jax.nn.sigmoid(rejected - chosen), record(rewards)


def kto(
    log_ratios: Float[Array, "*B T"],
    mask: Bool[Array, "*B T"],
    labels: Bool[Array, "*B"],
    baseline: Float[Array, ""],
    *,
    beta: ScalarLike = 0.1,
    desirable_weight: ScalarLike = 1.0,
    undesirable_weight: ScalarLike = 1.0,
) -> tuple[Float[Array, "*B"], LossMetrics]:
    """Kahneman-Tversky optimisation of single answers: w (1 - sigma(+-beta (x - z0))), + for a desirable answer.

    x is the answer's summed log-ratio. Elsewhere: TRL's `kto` and HALOs estimate z0 as `kto_baseline` does.

    Args:
        log_ratios: Token log-ratios, in nats. Shape [..., T].
        mask: True at the answers' tokens. Shape [..., T].
        labels: True for desirable answers. Shape [...].
        baseline: z0, an estimate of KL(pi || pi_ref) in nats, a scalar; no gradient flows through it.
        beta: Temperature, in reward a nat.
        desirable_weight: w of desirable answers.
        undesirable_weight: w of the others; the paper balances the two by their numbers.

    Returns:
        Loss of each answer, shape [...], and its metrics.

    References:
        Ethayarajh et al., "KTO: model alignment as prospect theoretic optimization", arXiv 2402.01306, Eq. 7 and 8.
    """
    sums = answer_sums(log_ratios, mask)
    chex.assert_equal_shape([sums, labels])
    chex.assert_rank(baseline, 0)
    advantage = beta * (sums - jax.lax.stop_gradient(baseline))
    loss = jnp.where(
        labels, desirable_weight * jax.nn.sigmoid(-advantage), undesirable_weight * jax.nn.sigmoid(advantage)
    )
    return loss, record(beta * sums)


def kto_baseline(log_ratios: Float[Array, "*B T"], mask: Bool[Array, "*B T"]) -> Float[Array, ""]:
    """KTO's reference point z0: the mean log-ratio of mismatched answers, not below 0; empty ones do not count.

    Args:
        log_ratios: Token log-ratios of answers given to other prompts than their own (KTO shifts a batch's answers by
            one row), in nats. Shape [..., T].
        mask: True at the answers' tokens. Shape [..., T].

    Returns:
        A scalar in nats, cut off from the gradient.

    References:
        Ethayarajh et al., arXiv 2402.01306, Sec. 4.1.
    """
    answers = jnp.maximum(mask.any(-1).sum(), 1)
    return jax.lax.stop_gradient(jax.nn.relu(answer_sums(log_ratios, mask).sum() / answers))


def implicit_prm(
    log_ratios: Float[Array, "*B T"],
    mask: Bool[Array, "*B T"],
    labels: Bool[Array, "*B"],
    *,
    beta: ScalarLike = 0.05,
) -> tuple[Float[Array, "*B"], LossMetrics]:
    """Cross-entropy of outcome labels under the implicit reward: a process reward model without step labels.

    -log sigma(x) for a right answer, -log sigma(-x) for a wrong one, x = beta sum_t log-ratio_t. `mdp.step_rewards` of
    the trained model are its process rewards.

    Args:
        log_ratios: Token log-ratios, in nats. Shape [..., T].
        mask: True at the answers' tokens. Shape [..., T].
        labels: True for right answers. Shape [...].
        beta: Temperature, in reward a nat; PRIME's 0.05.

    Returns:
        Loss of each answer, in nats, shape [...], and its metrics.

    References:
        Yuan et al., "Free process rewards without process labels", arXiv 2412.01981, Eq. 5.
    """
    rewards = beta * answer_sums(log_ratios, mask)
    chex.assert_equal_shape([rewards, labels])
    return -jax.nn.log_sigmoid(jnp.where(labels, rewards, -rewards)), record(rewards)
