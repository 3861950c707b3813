"""The token MDP: a language model's log-probabilities read as rewards, Q-values, state values and advantages.

Conventions, after "From r to Q*" (arXiv 2404.12358):

- A state is the prompt and the tokens so far, an action is the next token; nothing is discounted.
- The value of a terminal state is 0. A response that ends with EOS is terminal; one that was cut (truncated) is not,
  and the state in which it was cut keeps its value.
- Q contains beta * log pi_ref, as in the paper (Eq. 7). The KL convention, where the reference is a penalty outside the
  reward, subtracts it: see `to_kl_convention`. State values are the same in both.
- With unit-temperature logits z of the policy, Q = beta * z and V = beta * logsumexp(z). Both are known up to a
  potential (a shift of all logits of one state); rewards and advantages are not changed by it.

Arrays are [..., T]: entry t belongs to response token a_t and to the state s_t in which it was chosen. `mask` is True
at response tokens; what stands under it changes neither values nor gradients, and results are 0 there.
"""

from dataclasses import dataclass

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, ScalarLike


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenScores:
    """What a policy and its reference assign to each response token: the record that everything else reads.

    Values where `mask` is False change neither results nor gradients; per-token results are 0 there.

    Attributes:
        logp: log pi(a_t | s_t) of the chosen token, in nats. Shape [..., T].
        ref_logp: log pi_ref(a_t | s_t), in nats; None without a reference. Shape [..., T].
        logz: Log-normalizer logsumexp(z(s_t)) of the policy's logits, in nats; None where only log-probabilities are
            known. Shape [..., T].
        mask: True at response tokens. Shape [..., T].
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
            mask: True at response tokens; labels such as -100 may stand elsewhere. Shape [..., T].

        Returns:
            Scores in nats, float32 or more. Shape [..., T] each.
        """
        logp, logz = _chosen_logp(logits, tokens, mask)
        ref_logp = None
        if ref_logits is not None:
            chex.assert_equal_shape([logits, ref_logits])
            ref_logp, _ = _chosen_logp(ref_logits, tokens, mask)
        return cls(logp=logp, ref_logp=ref_logp, logz=logz, mask=mask)

    def log_ratios(self) -> Float[Array, "*B T"]:
        """Log-ratios log pi - log pi_ref, in nats. Shape [..., T]; raises ValueError without a reference."""
        # Both operands are masked before the subtraction: an infinity under the mask would make the gradient NaN.
        return _masked(self.logp, self.mask) - _masked(self.known("ref_logp"), self.mask)

    def rewards(self, beta: ScalarLike) -> Float[Array, "*B T"]:
        """Token rewards r(s_t, a_t) = beta * (log pi - log pi_ref), the member of the reward class that DPO learns.

        They are also the advantages of the KL convention: for the optimal policy they equal r + V*(s_{t+1}) - V*(s_t).

        Args:
            beta: Temperature: reward per nat.

        Returns:
            Rewards. Shape [..., T].

        Raises:
            ValueError: If there is no reference.

        References:
            arXiv 2404.12358, Eq. 10 and 11.
        """
        return beta * self.log_ratios()

    def returns(self, beta: ScalarLike) -> Float[Array, "*B"]:
        """Return of each response: the sum of its token rewards, which preferences compare (Eq. 8 and 9).

        For the optimal policy it equals the sum of the true rewards less V*(s_0), the same for all responses to one
        prompt.

        Args:
            beta: Temperature: reward per nat.

        Returns:
            Returns. Shape [...].

        Raises:
            ValueError: If there is no reference.
        """
        return self.rewards(beta).sum(-1)

    def v(self, beta: ScalarLike) -> Float[Array, "*B T"]:
        """Soft values V(s_t) = beta * logsumexp(z(s_t)) of the states in which the tokens were chosen (Eq. 6).

        Args:
            beta: Temperature: reward per nat.

        Returns:
            Values, known up to a potential. Shape [..., T].

        Raises:
            ValueError: If there are no log-normalizers.
        """
        return beta * _masked(self.known("logz"), self.mask)

    def q(self, beta: ScalarLike) -> Float[Array, "*B T"]:
        """Soft Q-values Q(s_t, a_t) = beta * (log pi + logz) = beta * z of the chosen tokens (Eq. 5).

        Args:
            beta: Temperature: reward per nat.

        Returns:
            Q-values in the paper's convention, known up to a potential. Shape [..., T].

        Raises:
            ValueError: If there are no log-normalizers.
        """
        return beta * (_masked(self.logp, self.mask) + _masked(self.known("logz"), self.mask))

    def advantages(self, beta: ScalarLike) -> Float[Array, "*B T"]:
        """Advantages Q - V = beta * log pi in the paper's convention, where Q contains beta * log pi_ref.

        Args:
            beta: Temperature: reward per nat.

        Returns:
            Advantages, at most 0. Shape [..., T]. In the KL convention the advantages are `rewards`.
        """
        return beta * _masked(self.logp, self.mask)

    def known(self, name: str) -> Float[Array, "*B T"]:
        """The field `name`; raises ValueError with the remedy where it is None."""
        if (values := getattr(self, name)) is None:
            fix = "score with a reference model" if name == "ref_logp" else "score with `scoring.score_tokens`"
            raise ValueError(f"these TokenScores have no {name}; {fix}, or pass {name} when you make them")
        return values


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Equivalence:
    """Whether two rewards are the same up to potential shaping (Definition 1), and the potential that links them.

    Attributes:
        equivalent: True where one potential explains every response. Shape [...].
        potentials: Phi(s_t) with other = rewards + Phi(s_{t+1}) - Phi(s_t). Shape [..., R, T].
        spread: Largest difference between responses in what shaping cannot explain, in reward. Shape [...].
    """

    equivalent: Bool[Array, "*B"]
    potentials: Float[Array, "*B R T"]
    spread: Float[Array, "*B"]


def token_scores(
    logits: Float[Array, "*B T V"],
    ref_logits: Float[Array, "*B T V"],
    tokens: Int[Array, "*B T"],
    mask: Bool[Array, "*B T"],
) -> TokenScores:
    """Reads the scores of given tokens off whole logits.

    For research code and small models: training and scoring go through `logprobs.token_logprobs`, which never holds
    logits of all positions.

    Args:
        logits: Logits of the policy at the states in which the tokens were chosen. Shape [..., T, V].
        ref_logits: Those of the reference. Shape [..., T, V].
        tokens: The tokens a_t. Shape [..., T].
        mask: True at response tokens; labels such as -100 may stand elsewhere. Shape [..., T].

    Returns:
        Scores in nats, float32 or more. Shape [..., T] each.
    """
    return TokenScores.from_logits(logits, ref_logits, tokens, mask)


def log_ratios(
    logp: Float[Array, "*B T"], ref_logp: Float[Array, "*B T"], mask: Bool[Array, "*B T"]
) -> Float[Array, "*B T"]:
    """Log-ratios log pi - log pi_ref of the response tokens.

    Args:
        logp: Policy log-probabilities, in nats. Shape [..., T].
        ref_logp: Reference log-probabilities, in nats. Shape [..., T].
        mask: True at response tokens. Shape [..., T].

    Returns:
        Log-ratios in nats. Shape [..., T].
    """
    # Both operands are masked before the subtraction: an infinity under the mask would else give a NaN gradient.
    return _masked(logp, mask) - _masked(ref_logp, mask)


def implicit_rewards(
    logp: Float[Array, "*B T"], ref_logp: Float[Array, "*B T"], mask: Bool[Array, "*B T"], *, beta: ScalarLike
) -> Float[Array, "*B T"]:
    """Token rewards r(s_t, a_t) = beta * (log pi - log pi_ref), the member of the reward class that DPO learns.

    They are also the advantages of the KL convention: for the optimal policy they equal r + V*(s_{t+1}) - V*(s_t).

    Args:
        logp: Policy log-probabilities, in nats. Shape [..., T].
        ref_logp: Reference log-probabilities, in nats. Shape [..., T].
        mask: True at response tokens. Shape [..., T].
        beta: Temperature, in reward a nat.

    Returns:
        Rewards. Shape [..., T].

    References:
        arXiv 2404.12358, Eq. 10 and 11.
    """
    return beta * log_ratios(logp, ref_logp, mask)


def state_values(logz: Float[Array, "*B T"], mask: Bool[Array, "*B T"], *, beta: ScalarLike) -> Float[Array, "*B T"]:
    """Soft values V(s_t) = beta * logsumexp(z(s_t)) of the states in which the tokens were chosen (Eq. 6).

    Args:
        logz: Log-normalisers of the policy's logits, in nats. Shape [..., T].
        mask: True at response tokens. Shape [..., T].
        beta: Temperature, in reward a nat.

    Returns:
        Values, known up to a potential. Shape [..., T].
    """
    return beta * _masked(logz, mask)


def q_values(
    logp: Float[Array, "*B T"], logz: Float[Array, "*B T"], mask: Bool[Array, "*B T"], *, beta: ScalarLike
) -> Float[Array, "*B T"]:
    """Soft Q-values Q(s_t, a_t) = beta * (log pi + logz) = beta * z of the chosen tokens (Eq. 5).

    Args:
        logp: Policy log-probabilities, in nats. Shape [..., T].
        logz: Log-normalisers of the policy's logits, in nats. Shape [..., T].
        mask: True at response tokens. Shape [..., T].
        beta: Temperature, in reward a nat.

    Returns:
        Q-values in the paper's convention, known up to a potential. Shape [..., T].
    """
    return beta * (_masked(logp, mask) + _masked(logz, mask))


def advantages(logp: Float[Array, "*B T"], mask: Bool[Array, "*B T"], *, beta: ScalarLike) -> Float[Array, "*B T"]:
    """Advantages Q - V = beta * log pi in the paper's convention, which count the reference's log-probability in.

    Args:
        logp: Policy log-probabilities, in nats. Shape [..., T].
        mask: True at response tokens. Shape [..., T].
        beta: Temperature, in reward a nat.

    Returns:
        Advantages, at most 0. Shape [..., T]. `to_kl_convention` of them are the implicit rewards.
    """
    return beta * _masked(logp, mask)


def to_kl_convention(
    values: Float[Array, "*B T"], ref_logp: Float[Array, "*B T"], mask: Bool[Array, "*B T"], *, beta: ScalarLike
) -> Float[Array, "*B T"]:
    """Turns Q-values or advantages of the paper's convention into those of the KL convention: x - beta * log pi_ref.

    There Q(s, a) = r + V(s'), V(s) = beta * log sum_a pi_ref(a | s) exp(Q(s, a) / beta), and pi = pi_ref exp((Q - V) /
    beta).

    Args:
        values: Q-values or advantages in the paper's convention. Shape [..., T].
        ref_logp: Reference log-probabilities, in nats. Shape [..., T].
        mask: True at response tokens. Shape [..., T].
        beta: Temperature, in reward a nat.

    Returns:
        The same quantity in the KL convention. Shape [..., T].
    """
    return _masked(values, mask) - beta * _masked(ref_logp, mask)


def to_paper_convention(
    values: Float[Array, "*B T"], ref_logp: Float[Array, "*B T"], mask: Bool[Array, "*B T"], *, beta: ScalarLike
) -> Float[Array, "*B T"]:
    """Turns Q-values or advantages of the KL convention into the paper's: x + beta * log pi_ref.

    Args:
        values: Q-values or advantages in the KL convention. Shape [..., T].
        ref_logp: Reference log-probabilities, in nats. Shape [..., T].
        mask: True at response tokens. Shape [..., T].
        beta: Temperature, in reward a nat.

    Returns:
        The same quantity in the paper's convention. Shape [..., T].
    """
    return _masked(values, mask) + beta * _masked(ref_logp, mask)


def successor_values(
    values: Float[Array, "*B T"],
    mask: Bool[Array, "*B T"],
    *,
    truncated: Bool[Array, "*B"] | None = None,
    final_values: Float[Array, "*B"] | None = None,
) -> Float[Array, "*B T"]:
    """V(s_{t+1}), or a potential of it, at the token that leads there.

    Tokens that are not the policy's (a user's turn, a tool's output) may stand between response tokens: the successor
    is the state in which the policy chooses next.

    Args:
        values: V(s_t). Shape [..., T].
        mask: True at response tokens. Shape [..., T].
        truncated: True for responses that were cut, and have no terminal state; None: all ended. Shape [...].
        final_values: V of the state in which a truncated response was cut. Shape [...]; not read where it ended.

    Returns:
        Values of the next states: 0 after the last token of a response that ended, `final_values` after the last token
        of a truncated one. Shape [..., T].

    Raises:
        ValueError: If only one of `truncated` and `final_values` is given: the value of a cut state is not 0, and
            cannot be told from the response.
    """
    final = _final_values(values, truncated, final_values)
    length = values.shape[-1]
    own = jnp.where(mask, jnp.arange(length), length)
    following = jax.lax.cummin(own, axis=own.ndim - 1, reverse=True)
    following = jnp.concatenate([following, jnp.full((*following.shape[:-1], 1), length)], axis=-1)[..., 1:]
    states = jnp.concatenate([_masked(values, mask), final[..., None]], axis=-1)
    return _masked(jnp.take_along_axis(states, following, axis=-1), mask)


def returns_to_go(
    rewards: Float[Array, "*B T"],
    mask: Bool[Array, "*B T"],
    *,
    truncated: Bool[Array, "*B"] | None = None,
    final_values: Float[Array, "*B"] | None = None,
) -> Float[Array, "*B T"]:
    """Undiscounted return from each token on, sum_{i >= t} r_i, plus the value of the state where a response was cut.

    Args:
        rewards: Token rewards. Shape [..., T].
        mask: True at response tokens. Shape [..., T].
        truncated: True for responses that were cut; None: all ended. Shape [...].
        final_values: V of the state in which a truncated response was cut. Shape [...].

    Returns:
        Returns. Shape [..., T].

    Raises:
        ValueError: If only one of `truncated` and `final_values` is given.
    """
    final = _final_values(rewards, truncated, final_values)
    rewards = _masked(rewards, mask)
    ahead = jax.lax.cumsum(rewards, axis=rewards.ndim - 1, reverse=True)
    return _masked(ahead + final[..., None], mask)


def prefix_values(rewards: Float[Array, "*B T"], mask: Bool[Array, "*B T"]) -> Float[Array, "*B T"]:
    """Running sum of implicit rewards up to and with each token: what a response is worth so far.

    For the optimal policy sum_{i <= t} beta log(pi*/pi_ref)(a_i) = sum_{i <= t} r_i + V*(s_{t+1}) - V*(s_0): the reward
    so far and the value of where it has led, less that of the prompt, which no comparison of answers to it depends on.

    Args:
        rewards: Implicit rewards of the tokens. Shape [..., T].
        mask: True at response tokens. Shape [..., T].

    Returns:
        Running sums. Shape [..., T].

    References:
        arXiv 2404.12358, Eq. 10, summed.
    """
    return _masked(jnp.cumsum(_masked(rewards, mask), axis=-1), mask)


def bellman_residual(
    rewards: Float[Array, "*B T"],
    q: Float[Array, "*B T"],
    next_values: Float[Array, "*B T"],
    ref_logp: Float[Array, "*B T"],
    mask: Bool[Array, "*B T"],
    *,
    beta: ScalarLike,
) -> Float[Array, "*B T"]:
    """Q(s_t, a_t) - [r(s_t, a_t) + beta * log pi_ref(a_t | s_t) + V(s_{t+1})], 0 everywhere for Q* (Eq. 7).

    Args:
        rewards: Rewards r. Shape [..., T].
        q: Q-values in the paper's convention. Shape [..., T].
        next_values: V(s_{t+1}), from `successor_values`. Shape [..., T].
        ref_logp: Reference log-probabilities, in nats. Shape [..., T].
        mask: True at response tokens. Shape [..., T].
        beta: Temperature, in reward a nat.

    Returns:
        Residuals. Shape [..., T].
    """
    target = _masked(rewards, mask) + beta * _masked(ref_logp, mask) + _masked(next_values, mask)
    return _masked(q, mask) - target


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
        mask: True at response tokens. Shape [..., T].

    Returns:
        Shaped rewards. Shape [..., T].

    References:
        arXiv 2404.12358, Definition 1; Ng, Harada, Russell, "Policy invariance under reward transformations", ICML
        1999.
    """
    return _masked(rewards, mask) + _masked(next_potentials, mask) - _masked(potentials, mask)


def are_equivalent(
    rewards: Float[Array, "*B R T"],
    other: Float[Array, "*B R T"],
    mask: Bool[Array, "*B R T"],
    *,
    truncated: Bool[Array, "*B R"] | None = None,
    atol: float = 1e-4,
) -> Equivalence:
    """Whether two rewards differ by potential shaping only, over R responses to one prompt (Definition 1).

    In the token MDP a state is reached in one way only, so along a single response any two rewards are linked by some
    potential. What binds is the end: a potential is 0 in terminal states, so the two returns must differ by the same
    number, -Phi(s_0), for every response that ended. (Both rewards must be functions of state and token: where
    responses share a prefix, so must their rewards.)

    Args:
        rewards: Token rewards r. Shape [..., R, T].
        other: Token rewards r'. Shape [..., R, T].
        mask: True at response tokens. Shape [..., R, T].
        truncated: True for responses that were cut; their last state may have any potential, so they bind nothing.
            None: all ended. Shape [..., R].
        atol: Largest spread of the differences, in reward, that is still called the same. The default allows for sums
            in float32.

    Returns:
        The verdict and the potential, with Phi(s_0) = 0 where no response binds it.
    """
    difference = _masked(other, mask) - _masked(rewards, mask)
    totals = difference.sum(-1)
    binding = mask.any(-1)
    if truncated is not None:
        chex.assert_equal_shape([truncated, binding])
        binding &= ~truncated
    start = -jnp.where(binding, totals, 0.0).sum(-1) / jnp.maximum(binding.sum(-1), 1)
    highest = totals.max(-1, where=binding, initial=-jnp.inf)
    lowest = totals.min(-1, where=binding, initial=jnp.inf)
    spread = jnp.where(binding.any(-1), highest - lowest, 0.0)
    before = jnp.cumsum(difference, axis=-1) - difference
    potentials = _masked(start[..., None, None] + before, mask)
    return Equivalence(equivalent=spread <= atol, potentials=potentials, spread=spread)


def preference_log_prob(
    returns: Float[Array, "*B R"], present: Bool[Array, "*B R"] | None = None
) -> Float[Array, "*B"]:
    """Log-probability that responses are ranked as they are listed, best first (Plackett-Luce; Bradley-Terry for two).

    sum_k [u_k - log sum_{j >= k} exp(u_j)] for returns u; for two responses log sigma(u_0 - u_1), the paper's Eq. 1.

    Args:
        returns: Return (summed token reward) of each response. Shape [..., R].
        present: False for places of a ranking that are not filled, None: all are. Shape [..., R].

    Returns:
        Log-probability of the ranking, in nats; 0 for rankings of fewer than two. Shape [...].

    References:
        arXiv 2404.12358, Eq. 1; arXiv 2305.18290, App. A.3.
    """
    if present is None:
        present = jnp.ones(returns.shape, bool)
    chex.assert_equal_shape([returns, present])
    # Finite, as gradients of sums of infinities are NaN; its exponential is 0 all the same.
    returns = jnp.where(present, returns, jnp.finfo(returns.dtype).min / 2)
    rest = jax.lax.cumlogsumexp(returns, axis=returns.ndim - 1, reverse=True)
    return jnp.where(present, returns - rest, 0.0).sum(-1)


def kl_to_reference(
    logits: Float[Array, "*B T V"], ref_logits: Float[Array, "*B T V"], mask: Bool[Array, "*B T"]
) -> Float[Array, "*B T"]:
    """KL(pi(. | s_t) || pi_ref(. | s_t)) in each state, the price that reinforcement learning pays (Eq. 2).

    Args:
        logits: Logits of the policy. Shape [..., T, V].
        ref_logits: Logits of the reference. Shape [..., T, V].
        mask: True at response tokens. Shape [..., T].

    Returns:
        Divergences in nats, at least 0. Shape [..., T].
    """
    return _divergence(logits, ref_logits, mask)


def kl_from_reference(
    logits: Float[Array, "*B T V"], ref_logits: Float[Array, "*B T V"], mask: Bool[Array, "*B T"]
) -> Float[Array, "*B T"]:
    """KL(pi_ref(. | s_t) || pi(. | s_t)) in each state: what Eq. 16 and token-level DPO (`losses.tdpo1`) measure.

    Args:
        logits: Logits of the policy. Shape [..., T, V].
        ref_logits: Logits of the reference. Shape [..., T, V].
        mask: True at response tokens. Shape [..., T].

    Returns:
        Divergences in nats, at least 0. Shape [..., T].
    """
    return _divergence(ref_logits, logits, mask)


def expected_reference_rewards(
    logits: Float[Array, "*B T V"], ref_logits: Float[Array, "*B T V"], mask: Bool[Array, "*B T"], *, beta: ScalarLike
) -> Float[Array, "*B T"]:
    """Mean implicit reward of what the reference itself would say: -beta KL(pi_ref || pi), never above 0.

    E_{a ~ pi_ref}[beta log(pi / pi_ref)(a | s_t)] starts at 0 and must fall as soon as the policy moves. So rewards of
    answers on which the reference was fitted are expected to fall in training; it is no fault of the run.

    Args:
        logits: Logits of the policy. Shape [..., T, V].
        ref_logits: Logits of the reference. Shape [..., T, V].
        mask: True at response tokens. Shape [..., T].
        beta: Temperature, in reward a nat.

    Returns:
        Expected rewards, at most 0. Shape [..., T].

    References:
        arXiv 2404.12358, Eq. 16.
    """
    return -beta * kl_from_reference(logits, ref_logits, mask)


def step_rewards(
    rewards: Float[Array, "*B T"], mask: Bool[Array, "*B T"], step_ids: Int[Array, "*B T"], *, num_steps: int
) -> Float[Array, "*B N"]:
    """Token rewards summed over steps (lines of reasoning, turns of a dialogue): an implicit process reward model.

    Args:
        rewards: Token rewards. Shape [..., T].
        mask: True at response tokens. Shape [..., T].
        step_ids: Step to which each token belongs, from 0; tokens with an id outside 0 .. num_steps - 1 belong to none.
            Shape [..., T].
        num_steps: N, how many steps there are at most; static (`jax.jit(..., static_argnames="num_steps")`).

    Returns:
        Reward of each step, 0 for a step without tokens. Shape [..., N].

    References:
        Yuan et al., "Free process rewards without process labels", arXiv 2412.01981, Eq. 3.
    """
    chex.assert_equal_shape([rewards, step_ids])
    belongs = step_ids[..., None, :] == jnp.arange(num_steps)[:, None]
    return jnp.where(belongs, _masked(rewards, mask)[..., None, :], 0.0).sum(-1)


def _masked(values: Float[Array, "*B T"], mask: Bool[Array, "*B T"]) -> Float[Array, "*B T"]:
    chex.assert_equal_shape([values, mask])
    return jnp.where(mask, values, 0.0)


def _final_values(
    like: Float[Array, "*B T"], truncated: Bool[Array, "*B"] | None, final_values: Float[Array, "*B"] | None
) -> Float[Array, "*B"]:
    """Values of the states after the last tokens: 0 where responses ended."""
    if (truncated is None) != (final_values is None):
        given, missing = ("truncated", "final_values") if final_values is None else ("final_values", "truncated")
        raise ValueError(
            f"{given} is given without {missing}: a truncated response keeps the value of the state in which it was "
            "cut; pass both, or neither if every response ended"
        )
    if truncated is None:
        return jnp.zeros(like.shape[:-1], like.dtype)
    chex.assert_shape([truncated, final_values], like.shape[:-1])
    return jnp.where(truncated, final_values, 0.0)


def _masked_logits(logits: Float[Array, "*B T V"], mask: Bool[Array, "*B T"]) -> Float[Array, "*B T V"]:
    chex.assert_shape(mask, logits.shape[:-1])
    # At least float32: log-ratios of bfloat16 log-probabilities are mostly rounding.
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return jnp.where(mask[..., None], logits, 0.0)


def _chosen_logp(
    logits: Float[Array, "*B T V"], tokens: Int[Array, "*B T"], mask: Bool[Array, "*B T"]
) -> tuple[Float[Array, "*B T"], Float[Array, "*B T"]]:
    """(log-probability of each token, log-normalizer of its state), 0 where `mask` is False."""
    chex.assert_equal_shape([tokens, mask])
    logits = _masked_logits(logits, mask)
    logz = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, jnp.where(mask, tokens, 0)[..., None], axis=-1)[..., 0]
    return _masked(chosen - logz, mask), _masked(logz, mask)


def _divergence(
    logits: Float[Array, "*B T V"], other: Float[Array, "*B T V"], mask: Bool[Array, "*B T"]
) -> Float[Array, "*B T"]:
    """KL(softmax(logits) || softmax(other)) as sum_a p log(p / q) + q - p, whose terms are all at least 0."""
    chex.assert_equal_shape([logits, other])
    logp, logq = (jax.nn.log_softmax(_masked_logits(x, mask)) for x in (logits, other))
    p, q = jnp.exp(logp), jnp.exp(logq)
    possible = p > 0
    difference = jnp.where(possible, logp, 0.0) - jnp.where(possible, logq, 0.0)
    # Near the reference the first form keeps the digits; far below it, where exp would overflow, the second does.
    near = difference > -10.0
    kept = jnp.where(near, difference, 0.0)
    terms = jnp.where(near, p * (kept + jnp.expm1(-kept)), p * difference + (q - p))
    return jnp.where(possible, jnp.maximum(terms, 0.0), q).sum(-1)
