"""Losses of rankings with any number of responses."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, ScalarLike

from qstar_jax.losses.responses import LossMetrics, record, response_sums
from qstar_jax.mdp import preference_log_prob


def plackett_luce(
    log_ratios: Float[Array, "*B R T"],
    mask: Bool[Array, "*B R T"],
    present: Bool[Array, "*B R"] | None = None,
    *,
    beta: ScalarLike = 0.1,
) -> tuple[Float[Array, "*B"], LossMetrics]:
    """DPO over rankings: -log of the probability that the implicit rewards rank the responses as given (Plackett-Luce).

    -sum_k [u_k - log sum_{j >= k} exp(u_j)], u_k = beta * sum_t log-ratio_t of the response in place k; on pairs
    it is `sigmoid`.

    Args:
        log_ratios: Token log-ratios of the responses, best first, in nats. Shape [..., R, T].
        mask: True at actions. Shape [..., R, T].
        present: False for places that are empty; None: all are filled. Shape [..., R].
        beta: Temperature: reward per nat.

    Returns:
        Loss of each ranking, in nats, shape [...], and its metrics; rewards of empty places are 0.

    References:
        arXiv 2305.18290, App. A.3; arXiv 2404.12358, Theorem 1.
    """
    rewards = beta * response_sums(log_ratios, mask)
    loss = -preference_log_prob(rewards, present)
    return loss, record(rewards if present is None else jnp.where(present, rewards, 0.0))
