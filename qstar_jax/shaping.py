"""Potential shaping: which rewards are the same to a policy and to its preferences (Definition 1).

Arrays and conventions are those of `mdp`: values of states and potentials are 0 in terminal states, and a truncated
response keeps the value of its last state.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from qstar_jax.mdp import masked
from qstar_jax.shapes import check_same_shape, check_shape


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Equivalence:
    """Whether two rewards are the same up to potential shaping (Definition 1), and the potential that links them.

    Attributes:
        equivalent: True where one potential explains every response. Shape [...].
        potentials: Phi(s_t) with other = rewards + Phi(s_{t+1}) - Phi(s_t). Shape [..., R, T].
        spread: Largest difference between responses that shaping cannot explain, in units of reward. Shape [...].
    """

    equivalent: Bool[Array, "*B"]
    potentials: Float[Array, "*B R T"]
    spread: Float[Array, "*B"]


def successor_values(
    values: Float[Array, "*B T"],
    mask: Bool[Array, "*B T"],
    *,
    truncated: Bool[Array, "*B"] | None = None,
    final_values: Float[Array, "*B"] | None = None,
) -> Float[Array, "*B T"]:
    """V(s_{t+1}), or a potential of it: the value of the state to which each token leads.

    Tokens that are not the policy's (a user's turn, a tool's output) may stand between response tokens: the successor
    is the state in which the policy chooses next.

    Args:
        values: V(s_t). Shape [..., T].
        mask: True at actions. Shape [..., T].
        truncated: True for responses that were truncated and have no terminal state; None: all ended. Shape [...].
        final_values: V of the last state of a truncated response; not read where a response ended. Shape [...].

    Returns:
        Values of the next states: 0 after the last token of a response that ended, `final_values` after the last token
        of a truncated one. Shape [..., T].

    Raises:
        ValueError: If only one of `truncated` and `final_values` is given: the value after truncation is not 0, and
            the response alone does not tell it.
    """
    if (truncated is None) != (final_values is None):
        given, missing = ("truncated", "final_values") if final_values is None else ("final_values", "truncated")
        raise ValueError(
            f"{given} is given without {missing}: a truncated response keeps the value of its last state; pass both, "
            "or neither if every response ended"
        )
    # Entry T of `states` is the value after the last token.
    final = jnp.zeros(values.shape[:-1], values.dtype)
    if truncated is not None:
        check_shape(values.shape[:-1], truncated=truncated, final_values=final_values)
        final = jnp.where(truncated, final_values, 0.0)
    states = jnp.concatenate([masked(values, mask), final[..., None]], axis=-1)
    # The successor of token t is the next response token, or entry T where none follows.
    length = values.shape[-1]
    positions = jnp.where(mask, jnp.arange(length), length)
    following = jax.lax.cummin(positions, axis=positions.ndim - 1, reverse=True)[..., 1:]
    following = jnp.concatenate([following, jnp.full_like(positions[..., :1], length)], axis=-1)
    return masked(jnp.take_along_axis(states, following, axis=-1), mask)


def shape_rewards(
    rewards: Float[Array, "*B T"],
    potentials: Float[Array, "*B T"],
    next_potentials: Float[Array, "*B T"],
    mask: Bool[Array, "*B T"],
) -> Float[Array, "*B T"]:
    """Potential shaping r + Phi(s_{t+1}) - Phi(s_t), which changes neither optimal policy nor preferences.

    Args:
        rewards: Token rewards. Shape [..., T].
        potentials: Phi(s_t). Shape [..., T].
        next_potentials: Phi(s_{t+1}), from `successor_values`: 0 in terminal states. Shape [..., T].
        mask: True at actions. Shape [..., T].

    Returns:
        Shaped rewards. Shape [..., T].

    References:
        arXiv 2404.12358, Definition 1; Ng, Harada, Russell, "Policy invariance under reward transformations", ICML
        1999.
    """
    return masked(rewards, mask) + masked(next_potentials, mask) - masked(potentials, mask)


def are_equivalent(
    rewards: Float[Array, "*B R T"],
    other: Float[Array, "*B R T"],
    mask: Bool[Array, "*B R T"],
    *,
    truncated: Bool[Array, "*B R"] | None = None,
    atol: float = 1e-4,
) -> Equivalence:
    """Whether two rewards differ by potential shaping only, over R responses to one prompt (Definition 1).

    Every state of the token MDP is reached in one way only, so along a single response any two rewards are linked by
    some potential. The end is what constrains it: a potential is 0 in terminal states, so the two returns must differ
    by the same number, -Phi(s_0), for every response that ended. (Both rewards must be functions of state and token:
    responses that share a prefix must share its rewards.)

    Args:
        rewards: Token rewards r. Shape [..., R, T].
        other: Token rewards r'. Shape [..., R, T].
        mask: True at actions. Shape [..., R, T].
        truncated: True for truncated responses, which constrain nothing: their last state may have any potential.
            None: all ended. Shape [..., R].
        atol: Largest spread of the differences, in reward, that counts as equal. The default allows for sums in
            float32.

    Returns:
        The verdict and the potential, with Phi(s_0) = 0 where no response constrains it.
    """
    difference = masked(other, mask) - masked(rewards, mask)
    totals = difference.sum(-1)
    ended = mask.any(-1)
    if truncated is not None:
        check_same_shape(truncated=truncated, ended=ended)
        ended &= ~truncated
    # How far the differences of the returns are from being the same number.
    highest = totals.max(-1, where=ended, initial=-jnp.inf)
    lowest = totals.min(-1, where=ended, initial=jnp.inf)
    spread = jnp.where(ended.any(-1), highest - lowest, 0.0)
    # Phi(s_0) from the mean of them; Phi(s_t) by adding the differences up to s_t.
    start = -jnp.where(ended, totals, 0.0).sum(-1) / jnp.maximum(ended.sum(-1), 1)
    before = jnp.cumsum(difference, axis=-1) - difference
    potentials = masked(start[..., None, None] + before, mask)
    return Equivalence(equivalent=spread <= atol, potentials=potentials, spread=spread)
