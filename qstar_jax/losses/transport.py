"""Alignment by optimal transport, which compares distributions of margins instead of pairs.

Both losses sort within the batch (the axis before the two responses), so each loss depends on the whole batch, and
micro-batches change it. The loss of a quantile is returned at the example that holds it. Examples whose responses are
both empty (padding) take no part.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, ScalarLike

from qstar_jax.losses.responses import LossMetrics, pair, record, response_sums, smoothed_log_loss
from qstar_jax.mdp import implicit_rewards


def aot(
    logp: Float[Array, "*G B 2 T"],
    ref_logp: Float[Array, "*G B 2 T"],
    mask: Bool[Array, "*G B 2 T"],
    *,
    beta: ScalarLike = 0.1,
    label_smoothing: ScalarLike = 0.0,
) -> tuple[Float[Array, "*G B"], LossMetrics]:
    """Alignment via optimal transport, paired: sorted policy margins against sorted reference margins.

    Smoothed logistic loss of beta (sort(log pi_w - log pi_l) - sort(log pi_ref,w - log pi_ref,l)), quantile by
    quantile.

    Elsewhere: TRL's `aot` returns the same numbers in sorted order.

    Args:
        logp: Token log-probabilities of the policy, in nats. Shape [..., B, 2, T].
        ref_logp: Token log-probabilities of the reference, in nats. Shape [..., B, 2, T].
        mask: True at actions. Shape [..., B, 2, T].
        beta: Temperature: reward per nat.
        label_smoothing: eps, the probability that a label is flipped, in [0, 0.5).

    Returns:
        Loss at each example, in nats, shape [..., B], and its metrics.

    References:
        Melnyk et al., "Distributional preference alignment of LLMs via optimal transport", arXiv 2406.05882.
    """
    sums, ref_sums = response_sums(logp, mask), response_sums(ref_logp, mask)
    (chosen, rejected), (ref_chosen, ref_rejected) = pair(sums), pair(ref_sums)
    delta = _between_quantiles(chosen - rejected, ref_chosen - ref_rejected, mask.any((-1, -2)))
    return smoothed_log_loss(beta * delta, label_smoothing), record(implicit_rewards(sums, ref_sums, beta=beta))


def aot_unpaired(
    log_ratios: Float[Array, "*G B 2 T"],
    mask: Bool[Array, "*G B 2 T"],
    *,
    beta: ScalarLike = 0.1,
    label_smoothing: ScalarLike = 0.0,
) -> tuple[Float[Array, "*G B"], LossMetrics]:
    """Alignment via optimal transport, unpaired: sorted chosen log-ratios against sorted rejected ones.

    Smoothed logistic loss of beta (sort(c) - sort(r)), quantile by quantile; the two responses of an example need not
    share a prompt.

    Elsewhere: TRL's `aot_unpaired` returns the same numbers in sorted order.

    Args:
        log_ratios: Token log-ratios, in nats. Shape [..., B, 2, T].
        mask: True at actions. Shape [..., B, 2, T].
        beta: Temperature: reward per nat.
        label_smoothing: eps, the probability that a label is flipped, in [0, 0.5).

    Returns:
        Loss at each example (of the quantile of its chosen response), in nats, shape [..., B], and its metrics.

    References:
        Melnyk et al., arXiv 2406.05882.
    """
    sums = response_sums(log_ratios, mask)
    delta = _between_quantiles(*pair(sums), mask.any((-1, -2)))
    return smoothed_log_loss(beta * delta, label_smoothing), record(beta * sums)


def _between_quantiles(
    values: Float[Array, "*G B"], others: Float[Array, "*G B"], present: Bool[Array, "*G B"]
) -> Float[Array, "*G B"]:
    """For each example, its value minus the other distribution's value of the same rank; 0 where not present."""
    order = jnp.argsort(jnp.where(present, values, jnp.inf), axis=-1)
    ranks = jnp.argsort(order, axis=-1)
    # Examples that are not present sort last on both sides, so the ranks of the others agree.
    sorted_others = jnp.take_along_axis(others, jnp.argsort(jnp.where(present, others, jnp.inf), axis=-1), axis=-1)
    return jnp.where(present, values - jnp.take_along_axis(sorted_others, ranks, axis=-1), 0.0)
