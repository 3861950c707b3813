"""Losses that learn from pairs: a chosen and a rejected answer to one prompt."""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def dpo(
    chosen_log_ratios: Float[Array, "*B T"],
    rejected_log_ratios: Float[Array, "*B U"],
    chosen_mask: Bool[Array, "*B T"],
    rejected_mask: Bool[Array, "*B U"],
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Float[Array, "*B"]:
    """Direct preference optimisation, the logistic loss on the margin of summed token rewards.

    -(1 - eps) log sigma(m) - eps log sigma(-m), with m = beta * (sum_t rho_t^chosen - sum_t rho_t^rejected) and rho the
    log-ratios log pi - log pi_ref. With eps = `label_smoothing` = 0 it is the token-level loss of the paper; with
    eps > 0 it is conservative DPO (in TRL, `label_smoothing` has no effect on the loss type of this name).

    Args:
        chosen_log_ratios: Token log-ratios of the chosen answers, in nats. Shape [..., T].
        rejected_log_ratios: Token log-ratios of the rejected answers, in nats. Shape [..., U].
        chosen_mask: True at tokens of the chosen answers. Shape [..., T].
        rejected_mask: True at tokens of the rejected answers. Shape [..., U].
        beta: Temperature, in reward a nat.
        label_smoothing: Probability that a label is flipped, in [0, 0.5).

    Returns:
        Loss of each pair, in nats. Shape [...].

    Raises:
        AssertionError: If an answer's log-ratios and mask differ in shape, and would be broadcast.

    References:
        arXiv 2404.12358, Eq. 9; arXiv 2305.18290, Eq. 7; label smoothing: E. Mitchell, "A note on DPO with noisy
        preferences", 2023.
    """
    chex.assert_equal_shape([chosen_log_ratios, chosen_mask])
    chex.assert_equal_shape([rejected_log_ratios, rejected_mask])
    chosen = jnp.where(chosen_mask, chosen_log_ratios, 0.0).sum(-1)
    rejected = jnp.where(rejected_mask, rejected_log_ratios, 0.0).sum(-1)
    margin = beta * (chosen - rejected)
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(margin) - label_smoothing * jax.nn.log_sigmoid(-margin)
