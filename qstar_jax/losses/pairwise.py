"""Losses on the margin between the log-ratios of two responses: DPO and its successors.

Shapes: log-ratios log pi - log pi_ref and masks are [..., 2, T], the chosen response first. c and r are the sums over
the actions of the chosen and the rejected response, |y| their numbers, sigma the logistic function. `divergence`
replaces c and r by f'(pi / pi_ref); see `divergences`. An empty response counts as c = 0.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, ScalarLike

from qstar_jax.losses.divergences import Divergence, reverse_kl
from qstar_jax.losses.responses import LossMetrics, pair, record, response_sums, smoothed_log_loss


def sigmoid(
    log_ratios: Float[Array, "*B 2 T"],
    mask: Bool[Array, "*B 2 T"],
    *,
    beta: ScalarLike = 0.1,
    label_smoothing: ScalarLike = 0.0,
    divergence: Divergence = reverse_kl,
) -> tuple[Float[Array, "*B"], LossMetrics]:
    """Direct preference optimization (DPO), and conservative DPO where labels are smoothed.

    -(1 - eps) log sigma(beta (c - r)) - eps log sigma(-beta (c - r)); with eps = 0 the token-level loss of the paper.

    Elsewhere: TRL's `sigmoid` ignores `label_smoothing`; its reference code, OpenRLHF and HALOs smooth as here.
    open-instruct's `dpo_norm` is `sigmoid_norm`.

    Args:
        log_ratios: Token log-ratios, in nats. Shape [..., 2, T].
        mask: True at actions. Shape [..., 2, T].
        beta: Temperature: reward per nat.
        label_smoothing: eps, the probability that a label is flipped, in [0, 0.5).
        divergence: What keeps the policy near its reference.

    Returns:
        Loss of each pair, in nats, shape [...], and its metrics.

    References:
        arXiv 2404.12358, Eq. 9; arXiv 2305.18290, Eq. 7; E. Mitchell, "A note on DPO with noisy preferences", 2023.
    """
    sums = response_sums(log_ratios, mask)
    chosen, rejected = pair(divergence(sums))
    return smoothed_log_loss(beta * (chosen - rejected), label_smoothing), record(beta * sums)


def sigmoid_norm(
    log_ratios: Float[Array, "*B 2 T"],
    mask: Bool[Array, "*B 2 T"],
    *,
    beta: ScalarLike = 0.1,
    divergence: Divergence = reverse_kl,
) -> tuple[Float[Array, "*B"], LossMetrics]:
    """Length-normalized DPO: -log sigma(beta (c / |y_w| - r / |y_l|)).

    Elsewhere: TRL's `sigmoid_norm`; open-instruct's `dpo_norm`, whose beta is 5, as a mean over tokens is about
    fifty times smaller than a sum.

    Args:
        log_ratios: Token log-ratios, in nats. Shape [..., 2, T].
        mask: True at actions. Shape [..., 2, T].
        beta: Temperature: reward per nat per token.
        divergence: What keeps the policy near its reference; applied before the division, as in TRL.

    Returns:
        Loss of each pair, in nats, shape [...], and its metrics (of sums, as TRL's logs).

    References:
        Lambert et al., "Tulu 3", arXiv 2411.15124, Eq. 6.
    """
    sums = response_sums(log_ratios, mask)
    return smoothed_log_loss(beta * _normalized_margin(sums, mask, divergence), 0.0), record(beta * sums)


def robust(
    log_ratios: Float[Array, "*B 2 T"],
    mask: Bool[Array, "*B 2 T"],
    *,
    beta: ScalarLike = 0.1,
    label_smoothing: ScalarLike = 0.1,
    divergence: Divergence = reverse_kl,
) -> tuple[Float[Array, "*B"], LossMetrics]:
    """Robust DPO: an unbiased estimate of the DPO loss under clean labels, from labels flipped with probability eps.

    [-(1 - eps) log sigma(m) + eps log sigma(-m)] / (1 - 2 eps), with m = beta (c - r).

    Elsewhere: TRL's default is eps = 0, which is `sigmoid`.

    Args:
        log_ratios: Token log-ratios, in nats. Shape [..., 2, T].
        mask: True at actions. Shape [..., 2, T].
        beta: Temperature: reward per nat.
        label_smoothing: eps, the probability that a label is flipped, in [0, 0.5).
        divergence: What keeps the policy near its reference.

    Returns:
        Loss of each pair, in nats, shape [...], and its metrics.

    References:
        Chowdhury et al., "Provably robust DPO", arXiv 2403.00409, Eq. 12.
    """
    sums = response_sums(log_ratios, mask)
    chosen, rejected = pair(divergence(sums))
    margin = beta * (chosen - rejected)
    clean, flipped = -jax.nn.log_sigmoid(margin), -jax.nn.log_sigmoid(-margin)
    loss = ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)
    return loss, record(beta * sums)


def hinge(
    log_ratios: Float[Array, "*B 2 T"],
    mask: Bool[Array, "*B 2 T"],
    *,
    beta: ScalarLike = 0.1,
    divergence: Divergence = reverse_kl,
) -> tuple[Float[Array, "*B"], LossMetrics]:
    """Hinge loss max(0, 1 - beta (c - r)): RSO's form of SLiC, whose gradient stops at margin 1.

    Elsewhere: TRL's `hinge`; the original SLiC has no reference and a free margin (HALOs' `slic`).

    Args:
        log_ratios: Token log-ratios, in nats. Shape [..., 2, T].
        mask: True at actions. Shape [..., 2, T].
        beta: Inverse of the margin: reward per nat.
        divergence: What keeps the policy near its reference.

    Returns:
        Loss of each pair, shape [...], and its metrics.

    References:
        Liu et al., "Statistical rejection sampling improves preference optimization", arXiv 2309.06657; Zhao et al.,
        "SLiC-HF", arXiv 2305.10425.
    """
    sums = response_sums(log_ratios, mask)
    chosen, rejected = pair(divergence(sums))
    return jax.nn.relu(1 - beta * (chosen - rejected)), record(beta * sums)


def ipo(
    log_ratios: Float[Array, "*B 2 T"],
    mask: Bool[Array, "*B 2 T"],
    *,
    beta: ScalarLike = 0.1,
    divergence: Divergence = reverse_kl,
) -> tuple[Float[Array, "*B"], LossMetrics]:
    """Identity preference optimization on means over tokens: (c / |y_w| - r / |y_l| - 1 / (2 beta))^2.

    Elsewhere: TRL, HALOs and LLaMA-Factory average as here; DPO's reference code and OpenRLHF sum: `ipo_sum`. The same
    beta then means another objective.

    Args:
        log_ratios: Token log-ratios, in nats. Shape [..., 2, T].
        mask: True at actions. Shape [..., 2, T].
        beta: The paper's regularization tau; the margin is drawn to 1 / (2 beta) nats per token.
        divergence: What keeps the policy near its reference; applied before the division, as in TRL.

    Returns:
        Loss of each pair, in nats^2, shape [...], and its metrics (of sums, as TRL's logs).

    References:
        Azar et al., "A general theoretical paradigm to understand learning from human preferences", arXiv 2310.12036,
        Eq. 17.
    """
    sums = response_sums(log_ratios, mask)
    return (_normalized_margin(sums, mask, divergence) - 1 / (2 * beta)) ** 2, record(beta * sums)


def ipo_sum(
    log_ratios: Float[Array, "*B 2 T"],
    mask: Bool[Array, "*B 2 T"],
    *,
    beta: ScalarLike = 0.1,
    divergence: Divergence = reverse_kl,
) -> tuple[Float[Array, "*B"], LossMetrics]:
    """Identity preference optimization on sums over tokens: (c - r - 1 / (2 beta))^2.

    Elsewhere: this is the IPO of DPO's reference code (eric-mitchell/direct-preference-optimization) and of OpenRLHF;
    TRL, HALOs and LLaMA-Factory average over tokens: `ipo`.

    Args:
        log_ratios: Token log-ratios, in nats. Shape [..., 2, T].
        mask: True at actions. Shape [..., 2, T].
        beta: The paper's regularization tau; the margin is drawn to 1 / (2 beta) nats.
        divergence: What keeps the policy near its reference.

    Returns:
        Loss of each pair, in nats^2, shape [...], and its metrics.

    References:
        Azar et al., arXiv 2310.12036, Eq. 17.
    """
    sums = response_sums(log_ratios, mask)
    chosen, rejected = pair(divergence(sums))
    return (chosen - rejected - 1 / (2 * beta)) ** 2, record(beta * sums)


def exo_pair(
    log_ratios: Float[Array, "*B 2 T"],
    mask: Bool[Array, "*B 2 T"],
    *,
    beta: ScalarLike = 0.1,
    label_smoothing: ScalarLike = 1e-3,
    divergence: Divergence = reverse_kl,
) -> tuple[Float[Array, "*B"], LossMetrics]:
    """Exact optimization on pairs: KL(softmax(beta (c, r)) || (1 - eps, eps)), the reverse of DPO's direction.

    Elsewhere: TRL's `exo_pair`, which also refuses eps = 0, where the divergence is infinite.

    Args:
        log_ratios: Token log-ratios, in nats. Shape [..., 2, T].
        mask: True at actions. Shape [..., 2, T].
        beta: Temperature: reward per nat.
        label_smoothing: eps, in (0, 0.5).
        divergence: What keeps the policy near its reference.

    Returns:
        Loss of each pair, in nats, shape [...], and its metrics.

    References:
        Ji et al., "Towards efficient exact optimization of language model alignment", arXiv 2402.00856, Eq. 16.
    """
    sums = response_sums(log_ratios, mask)
    chosen, rejected = pair(divergence(sums))
    margin = beta * (chosen - rejected)
    win, lose = jax.nn.log_sigmoid(margin), jax.nn.log_sigmoid(-margin)
    loss = jnp.exp(win) * (win - jnp.log1p(-label_smoothing)) + jnp.exp(lose) * (lose - jnp.log(label_smoothing))
    return loss, record(beta * sums)


def discopop(
    log_ratios: Float[Array, "*B 2 T"],
    mask: Bool[Array, "*B 2 T"],
    *,
    beta: ScalarLike = 0.1,
    tau: ScalarLike = 0.05,
    divergence: Divergence = reverse_kl,
) -> tuple[Float[Array, "*B"], LossMetrics]:
    """DiscoPOP, a blend found by program search: (1 - g) (-log sigma(m)) + g exp(-m), g = sigma(m / tau).

    m = beta (c - r). Elsewhere: TRL's `discopop` (`discopop_tau`); its product overflows for m < -88 in float32.

    Args:
        log_ratios: Token log-ratios, in nats. Shape [..., 2, T].
        mask: True at actions. Shape [..., 2, T].
        beta: Temperature: reward per nat.
        tau: Width of the blend, in units of reward.
        divergence: What keeps the policy near its reference.

    Returns:
        Loss of each pair, shape [...], and its metrics.

    References:
        Lu et al., "Discovering preference optimization algorithms with and for large language models",
        arXiv 2406.08414, Eq. 5.
    """
    sums = response_sums(log_ratios, mask)
    chosen, rejected = pair(divergence(sums))
    margin = beta * (chosen - rejected)
    # One exponent instead of a product: exp(-m) alone overflows where its weight g vanishes.
    exponential = jnp.exp(jax.nn.log_sigmoid(margin / tau) - margin)
    logistic = jax.nn.sigmoid(-margin / tau) * -jax.nn.log_sigmoid(margin)
    return logistic + exponential, record(beta * sums)


def dpop(
    log_ratios: Float[Array, "*B 2 T"],
    mask: Bool[Array, "*B 2 T"],
    *,
    beta: ScalarLike = 0.3,
    penalty: ScalarLike = 50.0,
) -> tuple[Float[Array, "*B"], LossMetrics]:
    """DPO-Positive: -log sigma(beta (c - r - lambda max(0, -c))), which keeps up the likelihood of the chosen response.

    Args:
        log_ratios: Token log-ratios, in nats. Shape [..., 2, T].
        mask: True at actions. Shape [..., 2, T].
        beta: Temperature: reward per nat; the paper's 0.3.
        penalty: lambda, the price per nat below the reference; the paper's 50.

    Returns:
        Loss of each pair, in nats, shape [...], and its metrics.

    References:
        Pal et al., "Smaug: fixing failure modes of preference optimization with DPO-Positive", arXiv 2402.13228.
    """
    sums = response_sums(log_ratios, mask)
    chosen, rejected = pair(sums)
    margin = beta * (chosen - rejected - penalty * jax.nn.relu(-chosen))
    return -jax.nn.log_sigmoid(margin), record(beta * sums)


def dpo_shift(
    log_ratios: Float[Array, "*B 2 T"], mask: Bool[Array, "*B 2 T"], *, beta: ScalarLike = 0.1, shift: ScalarLike = 0.75
) -> tuple[Float[Array, "*B"], LossMetrics]:
    """DPO-Shift: -log sigma(beta (c - f r)), where the rejected response counts less, so the chosen one falls less.

    Args:
        log_ratios: Token log-ratios, in nats. Shape [..., 2, T].
        mask: True at actions. Shape [..., 2, T].
        beta: Temperature: reward per nat.
        shift: f(lambda) in (0, 1]; 1 is DPO. The paper also moves it linearly between 0.95 and 1: pass the value of
            the step.

    Returns:
        Loss of each pair, in nats, shape [...], and its metrics.

    References:
        Yang et al., "DPO-Shift: shifting the distribution of direct preference optimization", arXiv 2502.07599.
    """
    sums = response_sums(log_ratios, mask)
    chosen, rejected = pair(sums)
    return -jax.nn.log_sigmoid(beta * (chosen - shift * rejected)), record(beta * sums)


def _normalized_margin(
    sums: Float[Array, "*B 2"], mask: Bool[Array, "*B 2 T"], divergence: Divergence
) -> Float[Array, "*B"]:
    chosen, rejected = pair(divergence(sums) / jnp.maximum(mask.sum(-1), 1))
    return chosen - rejected
