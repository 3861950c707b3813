"""Losses that pull the log-ratio of each response up or down independently.

Losses of pairs take log-ratios and masks [..., 2, T], the chosen response first; c and r are the sums over the chosen
and the rejected response. Losses of single responses take [..., T], and for each a label (`kto`, `implicit_prm`) or a
reward beside those of the reference's responses (`a_star`, `qrpo`). sigma is the logistic function.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, ScalarLike

from qstar_jax.losses.responses import LossMetrics, pair, record, response_sums
from qstar_jax.shapes import check_same_shape, check_shape


def nca_pair(
    log_ratios: Float[Array, "*B 2 T"], mask: Bool[Array, "*B 2 T"], *, beta: ScalarLike = 0.1
) -> tuple[Float[Array, "*B"], LossMetrics]:
    """Noise contrastive alignment on pairs: -log sigma(beta c) - 1/2 log sigma(-beta c) - 1/2 log sigma(-beta r).

    Args:
        log_ratios: Token log-ratios, in nats. Shape [..., 2, T].
        mask: True at actions. Shape [..., 2, T].
        beta: Temperature: reward per nat.

    Returns:
        Loss of each pair, in nats, shape [...], and its metrics.

    References:
        Chen et al., "Noise contrastive alignment of language models with explicit rewards", arXiv 2402.05369.
    """
    rewards = beta * response_sums(log_ratios, mask)
    chosen, rejected = pair(rewards)
    pushed_down = jax.nn.log_sigmoid(-chosen) + jax.nn.log_sigmoid(-rejected)
    return -jax.nn.log_sigmoid(chosen) - 0.5 * pushed_down, record(rewards)


def bco_pair(
    log_ratios: Float[Array, "*B 2 T"], mask: Bool[Array, "*B 2 T"], *, beta: ScalarLike = 0.1
) -> tuple[Float[Array, "*B"], LossMetrics]:
    """Binary classifier optimization on pairs: -log sigma(beta c) - log sigma(-beta r).

    Elsewhere: the paper subtracts a running mean of the rewards from both; this form, TRL's `bco_pair`, does not.

    Args:
        log_ratios: Token log-ratios, in nats. Shape [..., 2, T].
        mask: True at actions. Shape [..., 2, T].
        beta: Temperature: reward per nat.

    Returns:
        Loss of each pair, in nats, shape [...], and its metrics.

    References:
        Jung et al., "Binary classifier optimization for large language model alignment", arXiv 2404.04656.
    """
    rewards = beta * response_sums(log_ratios, mask)
    chosen, rejected = pair(rewards)
    return -jax.nn.log_sigmoid(chosen) - jax.nn.log_sigmoid(-rejected), record(rewards)


def sppo_hard(
    log_ratios: Float[Array, "*B 2 T"], mask: Bool[Array, "*B 2 T"], *, beta: ScalarLike = 0.1
) -> tuple[Float[Array, "*B"], LossMetrics]:
    """Self-play preference optimization with hard labels: (c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2.

    Elsewhere: the paper's probabilities come from a preference model; here, as in TRL, the winner's is 1.

    Args:
        log_ratios: Token log-ratios, in nats. Shape [..., 2, T].
        mask: True at actions. Shape [..., 2, T].
        beta: Inverse of the step size: reward per nat.

    Returns:
        Loss of each pair, in nats^2, shape [...], and its metrics.

    References:
        Wu et al., "Self-play preference optimization for language model alignment", arXiv 2405.00675, Eq. 4.7.
    """
    sums = response_sums(log_ratios, mask)
    chosen, rejected = pair(sums)
    return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2, record(beta * sums)


def apo_zero(
    log_ratios: Float[Array, "*B 2 T"], mask: Bool[Array, "*B 2 T"], *, beta: ScalarLike = 0.1
) -> tuple[Float[Array, "*B"], LossMetrics]:
    """Anchored preference optimization, zero: (1 - sigma(beta c)) + sigma(beta r): chosen up, rejected down.

    For chosen responses better than the model's own.

    Args:
        log_ratios: Token log-ratios, in nats. Shape [..., 2, T].
        mask: True at actions. Shape [..., 2, T].
        beta: Temperature: reward per nat.

    Returns:
        Loss of each pair, in [0, 2], shape [...], and its metrics.

    References:
        D'Oosterlinck et al., "Anchored preference optimization", arXiv 2408.06266, Eq. 7.
    """
    rewards = beta * response_sums(log_ratios, mask)
    chosen, rejected = pair(rewards)
    return jax.nn.sigmoid(-chosen) + jax.nn.sigmoid(rejected), record(rewards)


def apo_down(
    log_ratios: Float[Array, "*B 2 T"], mask: Bool[Array, "*B 2 T"], *, beta: ScalarLike = 0.1
) -> tuple[Float[Array, "*B"], LossMetrics]:
    """Anchored preference optimization, down: sigma(beta c) + (1 - sigma(beta (c - r))): both down, rejected more.

    For chosen responses worse than the model's own.

    Args:
        log_ratios: Token log-ratios, in nats. Shape [..., 2, T].
        mask: True at actions. Shape [..., 2, T].
        beta: Temperature: reward per nat.

    Returns:
        Loss of each pair, in [0, 2], shape [...], and its metrics.

    References:
        D'Oosterlinck et al., "Anchored preference optimization", arXiv 2408.06266, Eq. 8.
    """
    rewards = beta * response_sums(log_ratios, mask)
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
    """Kahneman-Tversky optimization of single responses: w (1 - sigma(+-beta (x - z0))), + for desirable responses.

    x is the response's summed log-ratio. Elsewhere: TRL's `kto` and HALOs estimate z0 as `kto_baseline` does.

    Args:
        log_ratios: Token log-ratios, in nats. Shape [..., T].
        mask: True at actions. Shape [..., T].
        labels: True for desirable responses. Shape [...].
        baseline: z0, an estimate of KL(pi || pi_ref) in nats, a scalar; no gradient flows through it.
        beta: Temperature: reward per nat.
        desirable_weight: w of desirable responses.
        undesirable_weight: w of the others; the paper balances the two by their counts.

    Returns:
        Loss of each response, shape [...], and its metrics.

    References:
        Ethayarajh et al., "KTO: model alignment as prospect theoretic optimization", arXiv 2402.01306, Eq. 7 and 8.
    """
    sums = response_sums(log_ratios, mask)
    check_same_shape(responses=sums, labels=labels)
    check_shape((), baseline=baseline)
    advantage = beta * (sums - jax.lax.stop_gradient(baseline))
    loss = jnp.where(
        labels, desirable_weight * jax.nn.sigmoid(-advantage), undesirable_weight * jax.nn.sigmoid(advantage)
    )
    return loss, record(beta * sums)


def kto_baseline(log_ratios: Float[Array, "*B T"], mask: Bool[Array, "*B T"]) -> Float[Array, ""]:
    """KTO's reference point z0: the mean log-ratio of mismatched responses, at least 0; empty ones do not count.

    Args:
        log_ratios: Token log-ratios of responses after the prompts of others (KTO shifts a batch by one), in nats.
            Shape [..., T].
        mask: True at actions. Shape [..., T].

    Returns:
        A scalar in nats, with the gradient stopped.

    References:
        Ethayarajh et al., arXiv 2402.01306, Sec. 4.1.
    """
    responses = jnp.maximum(mask.any(-1).sum(), 1)
    return jax.lax.stop_gradient(jax.nn.relu(response_sums(log_ratios, mask).sum() / responses))


def implicit_prm(
    log_ratios: Float[Array, "*B T"],
    mask: Bool[Array, "*B T"],
    labels: Bool[Array, "*B"],
    *,
    beta: ScalarLike = 0.05,
) -> tuple[Float[Array, "*B"], LossMetrics]:
    """Cross-entropy of outcome labels under the implicit reward: a process reward model without step labels.

    -log sigma(x) for a correct response, -log sigma(-x) for an incorrect one, x = beta sum_t log-ratio_t.
    `mdp.step_rewards` of the trained model are its process rewards.

    Args:
        log_ratios: Token log-ratios, in nats. Shape [..., T].
        mask: True at actions. Shape [..., T].
        labels: True for correct responses. Shape [...].
        beta: Temperature: reward per nat; PRIME's 0.05.

    Returns:
        Loss of each response, in nats, shape [...], and its metrics.

    References:
        Yuan et al., "Free process rewards without process labels", arXiv 2412.01981, Eq. 5.
    """
    rewards = beta * response_sums(log_ratios, mask)
    check_same_shape(responses=rewards, labels=labels)
    return -jax.nn.log_sigmoid(jnp.where(labels, rewards, -rewards)), record(rewards)


def a_star(
    log_ratios: Float[Array, "*B T"],
    mask: Bool[Array, "*B T"],
    rewards: Float[Array, "*B"],
    reference_rewards: Float[Array, "*B N"],
    *,
    beta: ScalarLike = 1e-3,
    value_beta: ScalarLike = 0.5,
) -> tuple[Float[Array, "*B"], LossMetrics]:
    """A*-PO: squared error of the implicit reward against the optimal advantage, (beta x - (R - V*))^2.

    x is the response's summed log-ratio, R its reward, and V* = value_beta log mean_i exp(R_i / value_beta) the soft
    value of its prompt, estimated from the rewards R_i of the reference's responses; a single one is V* itself.

    Args:
        log_ratios: Token log-ratios, in nats. Shape [..., T].
        mask: True at actions. Shape [..., T].
        rewards: R; no gradient flows through it. Shape [...].
        reference_rewards: R_i, NaN where there are fewer than N; no gradient flows through them. Shape [..., N].
        beta: The paper's beta_2: reward per nat.
        value_beta: The paper's beta_1, the temperature of the value; the two differ on purpose.

    Returns:
        Loss of each response, in reward^2, shape [...], and its metrics.

    References:
        Brantley et al., "Accelerating RL for LLM reasoning with optimal advantage regression", arXiv 2505.20686.
    """
    implicit = beta * response_sums(log_ratios, mask)
    rewards, others, present = _stopped(rewards, reference_rewards)
    check_same_shape(responses=implicit, rewards=rewards)
    scaled = jnp.where(present, others / value_beta, -jnp.inf)
    value = value_beta * (jax.nn.logsumexp(scaled, axis=-1) - jnp.log(present.sum(-1)))
    return (implicit - (rewards - value)) ** 2, record(implicit)


def qrpo(
    log_ratios: Float[Array, "*B T"],
    mask: Bool[Array, "*B T"],
    rewards: Float[Array, "*B"],
    reference_rewards: Float[Array, "*B N"],
    *,
    beta: ScalarLike = 0.1,
) -> tuple[Float[Array, "*B"], LossMetrics]:
    """QRPO: regresses the implicit reward on the response's quantile, (q - beta log Z - beta x)^2.

    x is the response's summed log-ratio and q the share of the reference's responses whose rewards R_i are at most its
    own R. Quantiles of the reference are uniform, so Z = beta (exp(1 / beta) - 1) is known.

    Args:
        log_ratios: Token log-ratios, in nats. Shape [..., T].
        mask: True at actions. Shape [..., T].
        rewards: R. Shape [...].
        reference_rewards: R_i, NaN where there are fewer than N. Shape [..., N].
        beta: Temperature: reward (a quantile) per nat.

    Returns:
        Loss of each response, shape [...], and its metrics.

    References:
        Matrenok et al., "Quantile reward policy optimization: alignment with pointwise regression and exact partition
        functions", arXiv 2507.08068.
    """
    implicit = beta * response_sums(log_ratios, mask)
    rewards, others, present = _stopped(rewards, reference_rewards)
    check_same_shape(responses=implicit, rewards=rewards)
    quantile = (present & (others <= rewards[..., None])).sum(-1) / present.sum(-1)
    # log(exp(1 / beta) - 1) without overflow.
    log_z = jnp.log(beta) + 1 / beta + jnp.log1p(-jnp.exp(-1 / jnp.asarray(beta)))
    return (quantile - beta * log_z - implicit) ** 2, record(implicit)


def _stopped(
    rewards: Float[Array, "*B"], reference_rewards: Float[Array, "*B N"]
) -> tuple[Float[Array, "*B"], Float[Array, "*B N"], Bool[Array, "*B N"]]:
    """Rewards, those of the reference (0 where there are none), and where there are some, with the gradient stopped."""
    rewards, others = jax.lax.stop_gradient((rewards, reference_rewards))
    check_shape((*rewards.shape, *others.shape[-1:]), reference_rewards=others)
    present = ~jnp.isnan(others)
    return rewards, jnp.where(present, others, 0.0), present
