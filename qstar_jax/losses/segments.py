"""Contrastive preference learning on segments of behaviour, which need not begin in the same state.

Shapes: log-probabilities and masks are [..., 2, T], the chosen segment first, or [..., B, T] where a score orders the
segments of a batch. T counts steps (tokens), sigma is the logistic function, and A = sum_t gamma^t alpha log pi(a_t |
s_t) is the advantage that the policy gives to a segment.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, ScalarLike

from qstar_jax.losses.responses import LossMetrics, pair, record, response_sums
from qstar_jax.shapes import check_same_shape

Cloned = Literal["all", "chosen"]


def cpl(
    logp: Float[Array, "*B 2 T"],
    mask: Bool[Array, "*B 2 T"],
    *,
    beta: ScalarLike = 0.1,
    bias: ScalarLike = 0.5,
    discount: ScalarLike = 1.0,
    bc_weight: ScalarLike = 0.0,
    bc_data: Cloned = "all",
) -> tuple[Float[Array, "*B"], LossMetrics]:
    """Contrastive preference learning: -log sigma(A_w - lambda A_l), A = sum_t gamma^t alpha log pi(a_t | s_t).

    Regret instead of reward explains the preferences. With log-ratios in place of `logp` it is CPL-KL, and with lambda
    = gamma = 1 then DPO. The behaviour-cloning term adds the mean of -log pi over the tokens of the pair.

    Args:
        logp: Token log-probabilities of the policy (or log-ratios), in nats. Shape [..., 2, T].
        mask: True at the segments' steps. Shape [..., 2, T].
        beta: alpha, the temperature of the advantage alpha log pi; the paper's 0.1.
        bias: lambda in (0, 1], conservative where below 1; the paper's 0.5.
        discount: gamma in (0, 1]; the paper's code has 1.
        bc_weight: Weight of behaviour cloning.
        bc_data: Whether it imitates both segments or the chosen one.

    Returns:
        Loss of each pair, in nats, shape [...], and its metrics, whose rewards are the sums A.

    Raises:
        ValueError: If `bc_data` is neither.

    References:
        Hejna et al., "Contrastive preference learning: learning from human feedback without RL", arXiv 2310.13639,
        Eq. 5 and 6.
    """
    if bc_data not in ("all", "chosen"):
        raise ValueError(f"bc_data {bc_data!r} is unknown; choose all or chosen")
    check_same_shape(logp=logp, mask=mask)
    advantages = _advantages(logp, mask, beta, discount)
    chosen, rejected = pair(advantages)
    imitated = slice(None) if bc_data == "all" else slice(1)
    cloned = mask[..., imitated, :]
    total = jnp.where(cloned, logp[..., imitated, :], 0.0).sum((-1, -2))
    cloning = -total / jnp.maximum(cloned.sum((-1, -2)), 1)
    return -jax.nn.log_sigmoid(chosen - bias * rejected) + bc_weight * cloning, record(advantages)


def cpl_all_pairs(
    logp: Float[Array, "*G B T"],
    mask: Bool[Array, "*G B T"],
    scores: Float[Array, "*G B"],
    *,
    beta: ScalarLike = 0.1,
    bias: ScalarLike = 0.5,
    discount: ScalarLike = 1.0,
) -> tuple[Float[Array, "*G N"], LossMetrics]:
    """CPL of every pair of a batch: B segments in the order of their scores make N = B (B - 1) / 2 pairs.

    -log sigma(A_w - lambda A_l) where the first score is higher; equal scores have the label 0.5, the mean of the loss
    in both orders.

    Elsewhere: CPL's code averages over the pairs whose loss is not exactly 0, so pairs that float32 has learned raise
    the weight of the others; the mean of what this returns is over all pairs.

    Args:
        logp: Log-probabilities of the policy (or log-ratios: CPL-KL), in nats. Shape [..., B, T].
        mask: True at the segments' steps. Shape [..., B, T].
        scores: What orders the segments, higher for better, such as the negated regret. Shape [..., B].
        beta: alpha, the temperature of the advantage alpha log pi.
        bias: lambda in (0, 1], the weight of the segment with the lower score.
        discount: gamma in (0, 1].

    Returns:
        Loss of each pair, in nats, shape [..., N], and its metrics, whose rewards [..., N, 2] are the sums A.

    References:
        Hejna et al., arXiv 2310.13639, Eq. 5 and 6, and their code's mode `rank`.
    """
    check_same_shape(logp=logp, mask=mask)
    order = jnp.argsort(-scores, axis=-1)
    advantages = jnp.take_along_axis(_advantages(logp, mask, beta, discount), order, axis=-1)
    scores = jnp.take_along_axis(scores, order, axis=-1)
    better, worse = jnp.triu_indices(scores.shape[-1], k=1)
    chosen, rejected = advantages[..., better], advantages[..., worse]
    loss = -jax.nn.log_sigmoid(chosen - bias * rejected)
    reverse = -jax.nn.log_sigmoid(rejected - bias * chosen)
    tied = scores[..., better] == scores[..., worse]
    return jnp.where(tied, (loss + reverse) / 2, loss), record(jnp.stack([chosen, rejected], axis=-1))


def _advantages(
    logp: Float[Array, "*B T"], mask: Bool[Array, "*B T"], beta: ScalarLike, discount: ScalarLike
) -> Float[Array, "*B"]:
    times = jnp.maximum(jnp.cumsum(mask, axis=-1) - 1, 0)
    return response_sums(discount**times * beta * jnp.where(mask, logp, 0.0), mask)
