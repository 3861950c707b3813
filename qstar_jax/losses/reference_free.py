"""Losses on the policy's own log-probabilities, without a reference.

Shapes: log-probabilities and masks are [..., 2, T], the chosen response first. |y| are numbers of actions, sigma is the
logistic function.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, ScalarLike

from qstar_jax.losses.responses import LossMetrics, pair, record, response_means, response_sums, smoothed_log_loss

Normalization = Literal["batch_tokens", "answer_tokens", "none"]


def negative_log_likelihood(
    logp: Float[Array, "*B T"], mask: Bool[Array, "*B T"], *, normalize: Normalization = "none"
) -> Float[Array, "*B"]:
    """Negative log-likelihood -sum_t log pi(a_t | s_t) of each response.

    Args:
        logp: Policy log-probabilities, in nats. Shape [..., T].
        mask: True at actions. Shape [..., T].
        normalize: `none`: the sum; `answer_tokens`: the mean over the response's tokens; `batch_tokens`: scaled so that
            the mean over all responses that have tokens is the mean over all their tokens (the usual cross-entropy). A
            micro-batch, or an example under `jax.vmap`, is a batch of its own.

    Returns:
        Nats (nats per token where normalized). Shape [...]; 0 for an empty response.

    Raises:
        ValueError: If `normalize` is none of the three.
    """
    if normalize not in ("batch_tokens", "answer_tokens", "none"):
        raise ValueError(f"normalize {normalize!r} is unknown; choose batch_tokens, answer_tokens or none")
    if normalize == "answer_tokens":
        return -response_means(logp, mask)
    total = -response_sums(logp, mask)
    if normalize == "none":
        return total
    return total * mask.any(-1).sum() / jnp.maximum(mask.sum(), 1)


def sft(
    logp: Float[Array, "*B 2 T"], mask: Bool[Array, "*B 2 T"], *, normalize: Normalization = "batch_tokens"
) -> tuple[Float[Array, "*B"], LossMetrics]:
    """Cross-entropy of the chosen response: the imitation term of RPO and MPO.

    Elsewhere: TRL's `sft` (once `rpo_alpha`) averages over the tokens of the batch, like the default here, so the loss
    of a pair depends on its batch; OpenRLHF's `nll_loss_coef`, LLaMA-Factory's `pref_ftx` and RPO's paper average over
    each response (`answer_tokens`).

    Args:
        logp: Token log-probabilities of the policy, in nats. Shape [..., 2, T].
        mask: True at actions. Shape [..., 2, T].
        normalize: See `negative_log_likelihood`.

    Returns:
        Loss of each pair, shape [...], and its metrics, whose rewards are log-likelihoods of responses.

    References:
        Pang et al., "Iterative reasoning preference optimization", arXiv 2404.19733, Eq. 1.
    """
    loss = negative_log_likelihood(logp[..., 0, :], mask[..., 0, :], normalize=normalize)
    return loss, record(response_sums(logp, mask))


def simpo(
    logp: Float[Array, "*B 2 T"],
    mask: Bool[Array, "*B 2 T"],
    *,
    beta: ScalarLike = 2.0,
    gamma: ScalarLike = 0.5,
    label_smoothing: ScalarLike = 0.0,
) -> tuple[Float[Array, "*B"], LossMetrics]:
    """Simple preference optimization: -log sigma(beta (log pi_w / |y_w| - log pi_l / |y_l|) - gamma).

    Elsewhere: TRL's `simpo_gamma` is this gamma; SimPO's own code sets gamma / beta (0.25 by default). `cpo` plus this
    one is CPO-SimPO: make a mixture of `simpo` and `sft`.

    Args:
        logp: Token log-probabilities of the policy, in nats. Shape [..., 2, T].
        mask: True at actions. Shape [..., 2, T].
        beta: Scale of the rewards: reward per nat per token.
        gamma: Margin by which the chosen response should win, in units of reward.
        label_smoothing: eps, the probability that a label is flipped, in [0, 0.5).

    Returns:
        Loss of each pair, in nats, shape [...], and its metrics, whose rewards are beta * mean_t log pi.

    References:
        Meng et al., "SimPO: simple preference optimization with a reference-free reward", arXiv 2405.14734, Eq. 6.
    """
    rewards = beta * response_means(logp, mask)
    chosen, rejected = pair(rewards)
    return smoothed_log_loss(chosen - rejected - gamma, label_smoothing), record(rewards)


def cpo(
    logp: Float[Array, "*B 2 T"],
    mask: Bool[Array, "*B 2 T"],
    *,
    beta: ScalarLike = 0.1,
    label_smoothing: ScalarLike = 0.0,
    nll_weight: ScalarLike = 1.0,
    normalize: Normalization = "batch_tokens",
) -> tuple[Float[Array, "*B"], LossMetrics]:
    """Contrastive preference optimization: -log sigma(beta (log pi_w - log pi_l)) plus the chosen response's NLL.

    Elsewhere: TRL's `cpo_alpha` is `nll_weight`, and averages the NLL over the batch's tokens, like the default here.

    Args:
        logp: Token log-probabilities of the policy, in nats. Shape [..., 2, T].
        mask: True at actions. Shape [..., 2, T].
        beta: Temperature: reward per nat.
        label_smoothing: eps, the probability that a label is flipped, in [0, 0.5).
        nll_weight: Weight of the negative log-likelihood.
        normalize: How the NLL is averaged: see `negative_log_likelihood`.

    Returns:
        Loss of each pair, in nats, shape [...], and its metrics, whose rewards are beta * log pi.

    References:
        Xu et al., "Contrastive preference optimization", arXiv 2401.08417, Eq. 6.
    """
    rewards = beta * response_sums(logp, mask)
    chosen, rejected = pair(rewards)
    nll = negative_log_likelihood(logp[..., 0, :], mask[..., 0, :], normalize=normalize)
    return smoothed_log_loss(chosen - rejected, label_smoothing) + nll_weight * nll, record(rewards)


def orpo(
    logp: Float[Array, "*B 2 T"],
    mask: Bool[Array, "*B 2 T"],
    *,
    odds_weight: ScalarLike = 0.1,
    normalize: Normalization = "batch_tokens",
) -> tuple[Float[Array, "*B"], LossMetrics]:
    """Odds ratio preference optimization: NLL of the chosen response - lambda log sigma(log odds_w - log odds_l).

    log odds = log p - log(1 - p), with p the geometric mean of the response's token probabilities.

    Elsewhere: TRL calls lambda `beta` and takes the NLL over the prompt too; here it covers the response alone.

    Args:
        logp: Token log-probabilities of the policy, in nats. Shape [..., 2, T].
        mask: True at actions. Shape [..., 2, T].
        odds_weight: lambda; the paper's 0.1.
        normalize: How the NLL is averaged: see `negative_log_likelihood`.

    Returns:
        Loss of each pair, in nats, shape [...], and its metrics, whose rewards are lambda * mean_t log pi.

    References:
        Hong et al., "ORPO: monolithic preference optimization without reference model", arXiv 2403.07691, Eq. 6 and 7.
    """
    means = response_means(logp, mask)
    # An empty response has p = 1 and infinite odds; in float32, so has one of which the model is certain.
    uncertain = jnp.minimum(means, -1e-6)
    chosen, rejected = pair(uncertain - jnp.log(-jnp.expm1(uncertain)))
    nll = negative_log_likelihood(logp[..., 0, :], mask[..., 0, :], normalize=normalize)
    return nll - odds_weight * jax.nn.log_sigmoid(chosen - rejected), record(odds_weight * means)
