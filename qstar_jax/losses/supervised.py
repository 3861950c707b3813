"""The loss that imitates answers."""

import chex
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def negative_log_likelihood(logp: Float[Array, "*B T"], mask: Bool[Array, "*B T"]) -> Float[Array, "*B"]:
    """Negative log-likelihood -sum_t log pi(a_t | s_t) of each answer.

    Args:
        logp: Policy log-probabilities, in nats. Shape [..., T].
        mask: True at response tokens. Shape [..., T].

    Returns:
        Summed (not averaged) over the tokens of each answer, in nats. Shape [...]; divide the batch's sum by its number
        of tokens for the usual cross-entropy.
    """
    chex.assert_equal_shape([logp, mask])
    return -jnp.where(mask, logp, 0.0).sum(-1)
