"""The token MDP: a language model's log-probabilities read as rewards, Q-values, state values and advantages.

Conventions, after "From r to Q*" (arXiv 2404.12358):

- A state is the prompt and the tokens so far; an action is the next token; nothing is discounted.
- The value of a terminal state is 0. A response that ends with EOS is terminal. A truncated one is not: the state in
  which it was truncated keeps its value.
- Q contains beta * log pi_ref, as in the paper (Eq. 7). In the KL convention, where the reference is a penalty outside
  the reward, Q is `rewards + v` and the advantage is `rewards`. State values are the same in both.
- Where an environment answers (a user, a tool), its tokens are no actions. The successor of the last action before them
  is the state after them: its reward is r + E V*(s') - V*(s), an expectation over what the environment may say.
- With unit-temperature logits z of the policy, Q = beta * z and V = beta * logsumexp(z). Both are known up to a
  potential (a shift of all logits of one state), which changes neither rewards nor advantages.

Arrays are [..., T]: entry t belongs to token a_t of a response and to the state s_t before it. `mask` is True at
actions, the tokens that the policy chose; values elsewhere change neither results nor gradients, and results are 0
there. `beta` is the temperature: reward per nat.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int, ScalarLike

from qstar_jax.shapes import check_dtype, check_same_shape, check_shape


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenScores:
    """What a policy and its reference assign to each action of a response: the record that everything else reads.

    Attributes:
        logp: log pi(a_t | s_t) of the chosen token, in nats. Shape [..., T].
        ref_logp: log pi_ref(a_t | s_t), in nats; None without a reference. Shape [..., T].
        logz: Log-normalizer logsumexp(z(s_t)) of the policy's logits, in nats; None where only log-probabilities are
            known. Shape [..., T].
        mask: True at actions. Shape [..., T].
    """

    logp: Float[Array, "*B T"]
    ref_logp: Float[Array, "*B T"] | None
    logz: Float[Array, "*B T"] | None
    mask: Bool[Array, "*B T"]

    @classmethod
    def from_logits(
        cls,
        logits: Float[Array, "*B T V"],
        ref_logits: Float[Array, "*B T V"] | None,
        tokens: Int[Array, "*B T"],
        mask: Bool[Array, "*B T"],
    ) -> "TokenScores":
        """Scores given tokens from whole logits.

        For research code and small models: training and scoring go through `logprobs.token_logprobs`, which never holds
        the logits of all positions.

        Args:
            logits: Logits of the policy at the states in which the tokens were chosen. Shape [..., T, V].
            ref_logits: Logits of the reference, or None without one. Shape [..., T, V].
            tokens: The tokens a_t. Shape [..., T].
            mask: True at actions; labels such as -100 may stand elsewhere. Shape [..., T].

        Returns:
            Scores in nats, float32 or more. Shape [..., T] each.

        Raises:
            InputError: If tokens are no integers or the mask is not boolean, as where they are swapped.
        """
        order = "as in from_logits(logits, ref_logits, tokens, mask)"
        check_dtype(int, f"token ids, {order}", tokens=tokens)
        check_dtype(bool, f"bool, True at actions, {order}", mask=mask)
        logp, logz = _chosen_logp(logits, tokens, mask)
        ref_logp = None
        if ref_logits is not None:
            check_same_shape(logits=logits, ref_logits=ref_logits)
            ref_logp, _ = _chosen_logp(ref_logits, tokens, mask)
        return cls(logp=logp, ref_logp=ref_logp, logz=logz, mask=mask)

    def log_ratios(self) -> Float[Array, "*B T"]:
        """Log-ratios log pi - log pi_ref, in nats. Shape [..., T]; ValueError without a reference."""
        return self.rewards(1.0)

    def rewards(self, beta: ScalarLike) -> Float[Array, "*B T"]:
        """Token rewards beta * log-ratio: the member of the reward class that DPO learns (Eq. 11).

        They are also the advantages of the KL convention: for the optimal policy they equal r + V*(s_{t+1}) - V*(s_t)
        (Eq. 10).

        Args:
            beta: Temperature: reward per nat.

        Returns:
            Rewards. Shape [..., T].

        Raises:
            ValueError: If there is no reference.
        """
        # Both operands are masked before the subtraction: an infinity under the mask would make the gradient NaN.
        logp, ref_logp = (masked(self.require(name), self.mask) for name in ("logp", "ref_logp"))
        return implicit_rewards(logp, ref_logp, beta=beta)

    def returns(self, beta: ScalarLike) -> Float[Array, "*B"]:
        """Implicit return of each response: the sum of its token rewards, which preferences compare (Theorem 1).

        For the optimal policy it is sum_t r(s_t, a_t) - V*(s_0) (Eq. 10, summed): the true return less the value of the
        prompt, which all its responses share.

        Args:
            beta: Temperature: reward per nat.

        Returns:
            Returns. Shape [...].

        Raises:
            ValueError: If there is no reference.
        """
        return self.rewards(beta).sum(-1)

    def v(self, beta: ScalarLike) -> Float[Array, "*B T"]:
        """Soft values V(s_t) = beta * logz, up to a potential (Eq. 6). Shape [..., T]; ValueError without logz."""
        return beta * masked(self.require("logz"), self.mask)

    def q(self, beta: ScalarLike) -> Float[Array, "*B T"]:
        """Soft Q-values Q(s_t, a_t) = beta * (logp + logz) = beta * z (Eq. 5). Shape and errors as for `v`."""
        return beta * (masked(self.logp, self.mask) + masked(self.require("logz"), self.mask))

    def advantages(self, beta: ScalarLike) -> Float[Array, "*B T"]:
        """Advantages Q - V = beta * logp of the paper's convention, at most 0. Shape [..., T]."""
        return beta * masked(self.logp, self.mask)

    def require(self, name: str) -> Float[Array, "*B T"]:
        """The field `name`; raises ValueError with the remedy where it is None."""
        if (values := getattr(self, name)) is None:
            fix = "score with a reference model" if name == "ref_logp" else "score with `scoring.score_tokens`"
            raise ValueError(f"these TokenScores have no {name}; {fix}, or pass {name} when you make them")
        return values


def implicit_rewards(
    logp: Float[ArrayLike, "..."], ref_logp: Float[ArrayLike, "..."], *, beta: ScalarLike
) -> Float[ArrayLike, "..."]:
    """Implicit rewards beta * (log pi - log pi_ref), elementwise: of tokens, of tables, or of whole responses.

    Args:
        logp: Policy log-probabilities, in nats. Any shape.
        ref_logp: Reference log-probabilities, in nats. Any shape that broadcasts with it.
        beta: Temperature: reward per nat.

    Returns:
        Rewards.

    References:
        arXiv 2404.12358, Eq. 10 and 11.
    """
    return beta * (logp - ref_logp)


def masked(values: Float[Array, "*B T"], mask: Bool[Array, "*B T"]) -> Float[Array, "*B T"]:
    """Values where `mask` is True, else 0; InputError if the shapes differ and would be broadcast."""
    check_same_shape(values=values, mask=mask)
    return jnp.where(mask, values, 0.0)


def preference_log_prob(
    returns: Float[Array, "*B R"], present: Bool[Array, "*B R"] | None = None
) -> Float[Array, "*B"]:
    """Log-probability that responses rank as listed, best first (Plackett-Luce; Bradley-Terry for two).

    sum_k [u_k - log sum_{j >= k} exp(u_j)] for returns u; for two responses log sigma(u_0 - u_1), the paper's Eq. 1.

    Args:
        returns: Return (summed token reward) of each response. Shape [..., R].
        present: False for places of a ranking that are empty; None: all are filled. Shape [..., R].

    Returns:
        Log-probability of the ranking, in nats; 0 for rankings of fewer than two. Shape [...].

    References:
        arXiv 2404.12358, Eq. 1; arXiv 2305.18290, App. A.3.
    """
    if present is None:
        present = jnp.ones(returns.shape, bool)
    check_same_shape(returns=returns, present=present)
    # Finite, since gradients of sums of infinities are NaN; its exponential is 0 all the same.
    returns = jnp.where(present, returns, jnp.finfo(returns.dtype).min / 2)
    rest = jax.lax.cumlogsumexp(returns, axis=returns.ndim - 1, reverse=True)
    return jnp.where(present, returns - rest, 0.0).sum(-1)


def kl_divergence(
    logits: Float[Array, "*B T V"], other_logits: Float[Array, "*B T V"], mask: Bool[Array, "*B T"]
) -> Float[Array, "*B T"]:
    """KL(p(. | s_t) || q(. | s_t)) in each state, for p = softmax(logits) and q = softmax(other_logits).

    Of the policy to its reference it is the penalty of Eq. 2. Of the reference to the policy it is what token-level DPO
    (`losses.tdpo1`) reads, and -beta times it is the mean implicit reward of the reference's own tokens (Eq. 16): 0 at
    first and negative as soon as the policy moves, so a fall of the rewards is expected in training.

    Args:
        logits: Logits of p. Shape [..., T, V].
        other_logits: Logits of q. Shape [..., T, V].
        mask: True at actions. Shape [..., T].

    Returns:
        Divergences in nats, at least 0. Shape [..., T].

    References:
        arXiv 2404.12358, Eq. 2 and 16.
    """
    check_same_shape(logits=logits, other_logits=other_logits)
    logp, logq = (jax.nn.log_softmax(_masked_logits(x, mask)) for x in (logits, other_logits))
    p, q = jnp.exp(logp), jnp.exp(logq)
    # Every term of sum_a p log(p / q) + q - p is at least 0. Tokens that p rules out add q only.
    possible = p > 0
    difference = jnp.where(possible, logp, 0.0) - jnp.where(possible, logq, 0.0)
    # The first form keeps the digits where p is near q; the second cannot overflow where p is far below q.
    near = difference > -10.0
    kept = jnp.where(near, difference, 0.0)
    terms = jnp.where(near, p * (kept + jnp.expm1(-kept)), p * difference + (q - p))
    return jnp.where(possible, jnp.maximum(terms, 0.0), q).sum(-1)


def entropy(logits: Float[Array, "*B T V"], mask: Bool[Array, "*B T"]) -> Float[Array, "*B T"]:
    """Entropy of softmax(logits) in each state: how undecided a model is about the next token.

    Args:
        logits: Logits; -inf rules a token out. Shape [..., T, V].
        mask: True at actions. Shape [..., T].

    Returns:
        Entropies in nats, 0 to log V. Shape [..., T].
    """
    logp = jax.nn.log_softmax(_masked_logits(logits, mask))
    finite = jnp.where(jnp.isfinite(logp), logp, 0.0)  # 0 log 0 is 0
    return masked(-(jnp.exp(logp) * finite).sum(-1), mask)


def step_rewards(
    rewards: Float[Array, "*B T"], mask: Bool[Array, "*B T"], step_ids: Int[Array, "*B T"], *, num_steps: int
) -> Float[Array, "*B N"]:
    """Token rewards summed over steps (lines of reasoning, turns of a dialogue): an implicit process reward model.

    Args:
        rewards: Token rewards. Shape [..., T].
        mask: True at actions. Shape [..., T].
        step_ids: Step of each token; tokens with an id outside 0 .. num_steps - 1 belong to none. Shape [..., T].
        num_steps: N, the largest number of steps; static (`jax.jit(..., static_argnames="num_steps")`).

    Returns:
        Reward of each step, 0 for a step without tokens. Shape [..., N].

    References:
        Yuan et al., "Free process rewards without process labels", arXiv 2412.01981, Eq. 3.
    """
    check_same_shape(rewards=rewards, step_ids=step_ids)
    in_step = step_ids[..., None, :] == jnp.arange(num_steps)[:, None]
    return jnp.where(in_step, masked(rewards, mask)[..., None, :], 0.0).sum(-1)


def endogenous_rewards(
    q: Float[Array, "*B T"], next_values: Float[Array, "*B T"], mask: Bool[Array, "*B T"]
) -> Float[Array, "*B T"]:
    """Rewards Q(s_t, a_t) - V(s_{t+1}) that a policy's own logits imply, without a reference.

    Logits are read as soft Q-values, and the Bellman equation (Eq. 7) is solved for the reward: beta * logp + V(s_t) -
    V(s_{t+1}). If the logits are Q*/beta, it is r + beta * log pi_ref; of a policy trained by DPO, whose Q-values are
    known up to a potential, it is that up to potential shaping.

    Args:
        q: Q-values, from `TokenScores.q`, so from logp and logz alone. Shape [..., T].
        next_values: V(s_{t+1}), from `shaping.successor_values` of `TokenScores.v`. Shape [..., T].
        mask: True at actions. Shape [..., T].

    Returns:
        Rewards. Shape [..., T].

    References:
        Li et al., "Generalist reward models: found inside large language models", arXiv 2506.23235.
    """
    return masked(q, mask) - masked(next_values, mask)


def prefix_values(rewards: Float[Array, "*B T"], mask: Bool[Array, "*B T"]) -> Float[Array, "*B T"]:
    """Token rewards summed up to and including each token: what the prefix is worth, relative to the prompt.

    For implicit rewards of a policy that is optimal for rewards paid at the end, it is V*(s_{t+1}) - V*(s_0): beta
    times the log-average of exp(return / beta) over the reference's completions of the prefix, less that over its
    responses to the prompt (Eq. 10, summed). At a terminal state it is the return less V*(s_0).

    Args:
        rewards: Token rewards. Shape [..., T].
        mask: True at actions. Shape [..., T].

    Returns:
        Running sums, 0 at tokens that are no actions. Shape [..., T].

    References:
        Yuan et al., "Free process rewards without process labels", arXiv 2412.01981, whose q_t it is.
    """
    return masked(jnp.cumsum(masked(rewards, mask), axis=-1), mask)


def _masked_logits(logits: Float[Array, "*B T V"], mask: Bool[Array, "*B T"]) -> Float[Array, "*B T V"]:
    check_shape(logits.shape[:-1], mask=mask)
    # At least float32: log-ratios of bfloat16 log-probabilities are mostly rounding.
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return jnp.where(mask[..., None], logits, 0.0)


def _chosen_logp(
    logits: Float[Array, "*B T V"], tokens: Int[Array, "*B T"], mask: Bool[Array, "*B T"]
) -> tuple[Float[Array, "*B T"], Float[Array, "*B T"]]:
    """(log-probability of each token, log-normalizer of its state), 0 where `mask` is False."""
    check_same_shape(tokens=tokens, mask=mask)
    logits = _masked_logits(logits, mask)
    logz = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, jnp.where(mask, tokens, 0)[..., None], axis=-1)[..., 0]
    return masked(chosen - logz, mask), masked(logz, mask)
