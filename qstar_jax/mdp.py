"""The token MDP: a language model's log-probabilities read as rewards, Q-values, state values and advantages.

Conventions, after "From r to Q*" (arXiv 2404.12358). A state is the prompt and the tokens so far, an action is the next
token, nothing is discounted, and the value of a terminal state (after EOS) is 0. Q contains beta * log pi_ref, as in
the paper. With unit-temperature logits z of the policy, Q = beta * z and V = beta * logsumexp(z); both are known up to
a potential (a shift of all logits of one state), the reward and the advantage are not.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenScores:
    """What a policy and its reference say of each response token, in nats, float32.

    Attributes:
        logp: log pi(a_t | s_t) of the chosen token. Shape [..., T].
        ref_logp: log pi_ref(a_t | s_t). Shape [..., T].
        logz: log-normaliser logsumexp(z(s_t)) of the policy's logits. Shape [..., T].
    """

    logp: Float[Array, "*B T"]
    ref_logp: Float[Array, "*B T"]
    logz: Float[Array, "*B T"]


def log_ratios(
    logp: Float[Array, "*B T"], ref_logp: Float[Array, "*B T"], mask: Bool[Array, "*B T"]
) -> Float[Array, "*B T"]:
    """Log-ratios log pi - log pi_ref of the response tokens; 0 where `mask` is False.

    Args:
        logp: Policy log-probabilities, in nats. Shape [..., T].
        ref_logp: Reference log-probabilities, in nats. Shape [..., T].
        mask: True at response tokens. Shape [..., T].

    Returns:
        Log-ratios in nats. Shape [..., T]. What stands under the mask can change neither values nor gradients.
    """
    # Both operands are masked before the subtraction: an infinity under the mask would else give a NaN gradient.
    return jnp.where(mask, logp, 0.0) - jnp.where(mask, ref_logp, 0.0)


def implicit_rewards(
    logp: Float[Array, "*B T"], ref_logp: Float[Array, "*B T"], mask: Bool[Array, "*B T"], *, beta: float
) -> Float[Array, "*B T"]:
    """Token rewards r(s_t, a_t) = beta * (log pi - log pi_ref), the member of the reward class that DPO learns.

    Args:
        logp: Policy log-probabilities, in nats. Shape [..., T].
        ref_logp: Reference log-probabilities, in nats. Shape [..., T].
        mask: True at response tokens. Shape [..., T].
        beta: Temperature, in reward a nat.

    Returns:
        Rewards, 0 where `mask` is False. Shape [..., T].

    References:
        arXiv 2404.12358, Eq. 10 and 11.
    """
    return beta * log_ratios(logp, ref_logp, mask)


def state_values(logz: Float[Array, "*B T"], *, beta: float) -> Float[Array, "*B T"]:
    """Soft values V(s_t) = beta * logsumexp(z(s_t)) of the states in which the tokens were chosen (Eq. 6).

    Args:
        logz: Log-normalisers of the policy's logits, in nats. Shape [..., T].
        beta: Temperature, in reward a nat.

    Returns:
        Values, known up to a potential. Shape [..., T].
    """
    return beta * logz


def q_values(logp: Float[Array, "*B T"], logz: Float[Array, "*B T"], *, beta: float) -> Float[Array, "*B T"]:
    """Soft Q-values Q(s_t, a_t) = beta * (log pi + logz) = beta * z of the chosen tokens (Eq. 5).

    Args:
        logp: Policy log-probabilities, in nats. Shape [..., T].
        logz: Log-normalisers of the policy's logits, in nats. Shape [..., T].
        beta: Temperature, in reward a nat.

    Returns:
        Q-values in the paper's convention (they contain beta * log pi_ref), known up to a potential. Shape [..., T].
    """
    return beta * (logp + logz)
