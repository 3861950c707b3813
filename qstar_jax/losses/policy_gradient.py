"""Policy gradients on samples of the policy: rewards of tokens, advantages, REINFORCE and PPO's clipped surrogate.

Arrays are [..., T], or [..., G, T] for G samples of one prompt; `mask` is True at actions, and values elsewhere change
neither results nor gradients, which are 0 there. Nothing is discounted. No gradient flows through rewards, advantages
or the log-probabilities of other policies. Losses are those of single tokens: their sum over a response is the loss
whose expected gradient is that of the return; averages over tokens are another objective.

The KL-regularized problem (arXiv 2404.12358, Eq. 2) is the one whose token rewards are
`rewards - kl_coef * kl_penalty(logp, ref_logp, mask)`; its optimum is that of `tabular.soft_value_iteration` with
`beta = kl_coef`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, ScalarLike

from qstar_jax.mdp import masked
from qstar_jax.shapes import check_same_shape, check_shape


def rto_rewards(
    token_rewards: Float[Array, "*B T"],
    scores: Float[Array, "*B"],
    mask: Bool[Array, "*B T"],
    *,
    token_weight: ScalarLike = 1.0,
    token_clip: float | None = None,
    sequence_weight: ScalarLike = 1.0,
) -> Float[Array, "*B T"]:
    """RTO: a DPO model's token rewards, and the reward of the whole response at its last action.

    clip(b1 m_t, -c, c) + [t is the last action] b3 R. Without token rewards (`token_weight=0`) it is the usual reward
    of a sequence. Since the optimal m_t sum to R - V*(s_0) (Eq. 10), unclipped token rewards alone have the optimal
    policy of R, and b1 and b3 together that of (b1 + b3) R.

    Elsewhere: the authors' code weighs log-ratios, that is m_t / beta, with 0.05, and clips the product at 0.05.

    Args:
        token_rewards: m_t, for instance `TokenScores.rewards` of a DPO model. Shape [..., T].
        scores: R, the reward of each response. Shape [...].
        mask: True at actions. Shape [..., T].
        token_weight: b1.
        token_clip: c, above 0; None: token rewards are not clipped.
        sequence_weight: b3.

    Returns:
        Token rewards, without the penalty for leaving the reference (`kl_penalty`). Shape [..., T].

    References:
        Zhong et al., "DPO meets PPO: reinforced token optimization for RLHF", arXiv 2404.18922.
    """
    check_same_shape(token_rewards=token_rewards, mask=mask)
    check_shape(mask.shape[:-1], scores=scores)
    dense = token_weight * jax.lax.stop_gradient(masked(token_rewards, mask))
    if token_clip is not None:
        dense = jnp.clip(dense, -token_clip, token_clip)
    last = mask & (_actions_from(mask) == 1)
    return dense + jnp.where(last, sequence_weight * jax.lax.stop_gradient(scores)[..., None], 0.0)


def kl_penalty(
    logp: Float[Array, "*B T"],
    ref_logp: Float[Array, "*B T"],
    mask: Bool[Array, "*B T"],
    *,
    estimator: str = "k1",
) -> Float[Array, "*B T"]:
    """Estimates KL(pi || pi_ref) in each state from the token that the policy sampled there.

    With d = log pi - log pi_ref: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d. k1 and k3 are unbiased, and k2 and k3 are
    at least 0. As a reward, take k1. As a term of the loss, its gradient is what counts: that of k2 is unbiased (in
    each state), that of k3 is the gradient of KL(pi_ref || pi), and that of k1 is 0 on average.

    Args:
        logp: log pi(a_t | s_t), in nats. Shape [..., T].
        ref_logp: log pi_ref(a_t | s_t), in nats; no gradient flows through it. Shape [..., T].
        mask: True at actions. Shape [..., T].
        estimator: `k1`, `k2` or `k3`.

    Returns:
        Estimates, in nats. Shape [..., T].

    Raises:
        ValueError: If the estimator is unknown.

    References:
        Schulman, "Approximating KL divergence", joschu.net/blog/kl-approx.html, 2020; Tang and Munos, "On a few
        pitfalls in KL divergence gradient estimation for RL", arXiv 2506.09477.
    """
    difference = masked(logp, mask) - jax.lax.stop_gradient(masked(ref_logp, mask))
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference**2 / 2
    if estimator == "k3":
        return jnp.expm1(-difference) + difference
    raise ValueError(f"estimator is {estimator!r}; expected k1, k2 or k3")


def returns_to_go(rewards: Float[Array, "*B T"], mask: Bool[Array, "*B T"]) -> Float[Array, "*B T"]:
    """Sums the rewards from each action on: the return that the action can still change.

    Args:
        rewards: Token rewards. Shape [..., T].
        mask: True at actions. Shape [..., T].

    Returns:
        Returns to go, in float32 or more. Shape [..., T].
    """
    return masked(_to_go(rewards, mask), mask)


def leave_one_out(returns: Float[Array, "*B G"]) -> Float[Array, "*B G"]:
    """Advantages of whole responses: each return less the mean return of the prompt's other samples.

    The baseline does not depend on the sample's own tokens, so the expected gradient is the same as without it.

    Args:
        returns: Return of each sample of a prompt. Shape [..., G], G at least 2.

    Returns:
        Advantages. Shape [..., G].

    Raises:
        ValueError: If there is one sample only.

    References:
        Ahmadian et al., "Back to basics: revisiting REINFORCE-style optimization for learning from human feedback in
        LLMs", arXiv 2402.14740.
    """
    return jax.lax.stop_gradient(returns - _mean_of_others(returns, axis=-1))


def token_advantages(rewards: Float[Array, "*B G T"], mask: Bool[Array, "*B G T"]) -> Float[Array, "*B G T"]:
    """Advantages of tokens: each return to go less the mean of that of the other samples at the same position.

    A sample that has ended counts with the return to go of its last action, not with 0. So where all reward comes with
    the last action, these are the advantages of `leave_one_out`, repeated for every token. The baseline depends on the
    other samples and on the position alone, so the expected gradient is the same as without it.

    Args:
        rewards: Token rewards of the samples of a prompt. Shape [..., G, T], G at least 2.
        mask: True at actions. Shape [..., G, T].

    Returns:
        Advantages. Shape [..., G, T].

    Raises:
        ValueError: If there is one sample only.
    """
    to_go = _to_go(rewards, mask)
    is_last = mask & (_actions_from(mask) == 1)
    at_last = jnp.where(is_last, to_go, 0.0).sum(-1, keepdims=True)
    held = jnp.where(_actions_from(mask) > 0, to_go, at_last)
    return masked(jax.lax.stop_gradient(to_go - _mean_of_others(held, axis=-2)), mask)


def reinforce(
    logp: Float[Array, "*B T"], advantages: Float[Array, "*B T"], mask: Bool[Array, "*B T"]
) -> Float[Array, "*B T"]:
    """REINFORCE: -A_t log pi(a_t | s_t), whose gradient estimates that of the negative return.

    Args:
        logp: log pi(a_t | s_t) of tokens that this policy sampled, in nats. Shape [..., T].
        advantages: Advantages, or returns, of the tokens; that of a response repeated for all of its tokens will do.
            Shape [..., T].
        mask: True at actions. Shape [..., T].

    Returns:
        Loss of each token. Shape [..., T].

    References:
        Williams, "Simple statistical gradient-following algorithms for connectionist reinforcement learning", Machine
        Learning 8, 1992.
    """
    return -jax.lax.stop_gradient(masked(advantages, mask)) * masked(logp, mask)


def clipped_surrogate(
    logp: Float[Array, "*B T"],
    old_logp: Float[Array, "*B T"],
    advantages: Float[Array, "*B T"],
    mask: Bool[Array, "*B T"],
    *,
    clip_low: ScalarLike = 0.2,
    clip_high: ScalarLike = 0.2,
) -> tuple[Float[Array, "*B T"], Bool[Array, "*B T"]]:
    """PPO: -min(q_t A_t, clip(q_t, 1 - e_low, 1 + e_high) A_t) with the ratio q_t = pi(a_t | s_t) / pi_old(a_t | s_t).

    Where pi is still pi_old its gradient is that of `reinforce`.

    Args:
        logp: log pi(a_t | s_t), in nats. Shape [..., T].
        old_logp: Log-probabilities of the same tokens by the policy that sampled them, in nats. Shape [..., T].
        advantages: Advantages of the tokens. Shape [..., T].
        mask: True at actions. Shape [..., T].
        clip_low: How far below 1 a ratio still counts.
        clip_high: How far above 1; more than `clip_low` is DAPO's "clip higher".

    Returns:
        (Loss of each token, whether the bound removes its gradient). Shape [..., T] each.

    References:
        Schulman et al., "Proximal policy optimization algorithms", arXiv 1707.06347, Eq. 7; Yu et al., "DAPO", arXiv
        2503.14476.
    """
    advantages = jax.lax.stop_gradient(masked(advantages, mask))
    ratio = jnp.exp(masked(logp, mask) - jax.lax.stop_gradient(masked(old_logp, mask)))
    bounded = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    clipped = jnp.where(advantages < 0, ratio < 1 - clip_low, ratio > 1 + clip_high) & (advantages != 0)
    return -jnp.minimum(ratio * advantages, bounded * advantages), clipped & mask


def _actions_from(mask: Bool[Array, "*B T"]) -> Array:
    """Number of actions at each position or after it. Shape [..., T]."""
    return jax.lax.cumsum(mask.astype(int), axis=mask.ndim - 1, reverse=True)


def _to_go(rewards: Float[Array, "*B T"], mask: Bool[Array, "*B T"]) -> Float[Array, "*B T"]:
    """Rewards of the actions at each position or after it, at the environment's positions too. Shape [..., T]."""
    rewards = masked(rewards, mask)
    rewards = rewards.astype(jnp.promote_types(rewards.dtype, jnp.float32))
    return jax.lax.stop_gradient(jax.lax.cumsum(rewards, axis=rewards.ndim - 1, reverse=True))


def _mean_of_others(values: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    """Mean over the other samples of a prompt, which lie along `axis`."""
    count = values.shape[axis]
    if count < 2:
        raise ValueError(f"{count} sample of each prompt is given; a baseline of the others needs at least 2")
    return (values.sum(axis, keepdims=True) - values) / (count - 1)
