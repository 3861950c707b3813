"""What a search adds up: a score for every token, and a value for where the token leads.

Likelihood search, reward-guided search and decoding-time alignment differ in nothing else. An objective is a hashable
function of the logits of one or several policies.

References:
    arXiv 2404.12358, Eq. 12 and 13: with token rewards r + beta * log pi_ref and leaf values V*, search for reward is
    search for beta * log pi, up to the constant V*(s_0).
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qstar_jax.decoding.policies import Logits
from qstar_jax.mdp import implicit_rewards


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepScores:
    """Scores of every possible next token, float32 or better; of one token each where V is left out.

    Attributes:
        score: What a search adds up. Shape [..., V].
        value: Value of where the token leads, by which unfinished paths are compared; 0 after an end. Shape [..., V],
            or None for 0 everywhere.
        logp: log pi of the policy that is decoded, over the whole vocabulary, in nats. Shape [..., V].
        ref_logp: log pi_ref in nats, or None without a reference. Shape [..., V].
    """

    score: Float[Array, "*B V"]
    value: Float[Array, "*B V"] | None
    logp: Float[Array, "*B V"]
    ref_logp: Float[Array, "*B V"] | None

    def at(self, token: Int[Array, "*B"]) -> "StepScores":
        """Scores of one token each, shape [...]."""
        return jax.tree.map(lambda x: jnp.take_along_axis(x, token[..., None], axis=-1)[..., 0], self)


@runtime_checkable
class Objective(Protocol):
    """What a search maximizes.

    Attributes:
        monotone: Whether no token can raise the sum; only then can a search know that it is done.
        comparable_across_lengths: Whether dividing the sum by a length keeps its meaning.
    """

    monotone: bool
    comparable_across_lengths: bool

    def __call__(self, logits: Logits) -> StepScores:
        """Scores every next token."""


@dataclass(frozen=True)
class Likelihood:
    """The sum of log pi of the first policy; a second one is its reference, whose sum is only reported."""

    monotone = True
    comparable_across_lengths = True

    def __call__(self, logits: Logits) -> StepScores:
        """See `Objective`."""
        logp, *rest = _log_softmax(logits)
        return StepScores(logp, None, logp, rest[0] if rest else None)


@dataclass(frozen=True)
class RegularisedReward:
    """Implicit reward with its price: r + beta * log pi_ref with r = beta * log(pi / pi_ref), of (policy, reference).

    The policy is optimal for this objective, so it finds what `Likelihood` finds (Eq. 13); it is here for comparison.

    Attributes:
        beta: Temperature: reward per nat.
    """

    beta: float
    monotone = True
    comparable_across_lengths = False

    def __call__(self, logits: Logits) -> StepScores:
        """See `Objective`."""
        logp, ref_logp = _log_softmax(logits, 2)
        reward = implicit_rewards(logp, ref_logp, beta=self.beta)
        return StepScores(reward + self.beta * ref_logp, None, logp, ref_logp)


@dataclass(frozen=True)
class ImplicitReward:
    """Implicit reward alone: the sum of beta * log(pi / pi_ref), of (policy, reference).

    It differs from `Likelihood`: leaving the reference costs nothing, and the sum can rise and fall, so a search never
    knows that it is done.

    Attributes:
        beta: Temperature: reward per nat.
    """

    beta: float
    monotone = False
    comparable_across_lengths = False

    def __call__(self, logits: Logits) -> StepScores:
        """See `Objective`."""
        logp, ref_logp = _log_softmax(logits, 2)
        # A token that is impossible under both has no reward, rather than inf - inf.
        reward = jnp.where(logp > -jnp.inf, implicit_rewards(logp, ref_logp, beta=self.beta), -jnp.inf)
        return StepScores(reward, None, logp, ref_logp)


@dataclass(frozen=True)
class JudgedReference(ImplicitReward):
    """Implicit reward of tokens that the reference draws, of (policy, reference): the policy only judges.

    It is for policies that were trained to judge, by labels of single responses, and whose own samples may be poor.
    """

    def __call__(self, logits: Logits) -> StepScores:
        """See `Objective`; `logp` is that of the reference, which is decoded."""
        judged = super().__call__(logits)
        score = jnp.where(judged.ref_logp > -jnp.inf, judged.score, -jnp.inf)
        return StepScores(score, None, judged.ref_logp, None)


@dataclass(frozen=True)
class LogitArithmetic:
    """The sum of log pi of base + sum_i w_i * (tuned_i - untuned_i), of (base, tuned_1, untuned_1, tuned_2, ...).

    Log-probabilities are normalised before they are combined and again afterwards, so that sums over several tokens
    have meaning and a constant added to one model's logits has no effect. Proxy tuning: base is a large model, the pair
    a small one after and before tuning. Emulated fine-tuning: weight 1. DeRa: base is the reference, the pair is
    (policy, reference), and the weight is the strength of alignment, beta_trained / beta_wanted.

    Attributes:
        weights: One weight per pair.
        vocabulary: Truncates the vocabulary of every model to its first tokens, this many; needed where embeddings are
            padded differently.

    References:
        arXiv 2401.08565 (proxy tuning), 2310.12962 (emulated fine-tuning), 2402.02992 (DeRa).
    """

    weights: tuple[float, ...]
    vocabulary: int | None = None
    monotone = True
    comparable_across_lengths = True

    def __call__(self, logits: Logits) -> StepScores:
        """See `Objective`."""
        logits = logits if isinstance(logits, tuple) else (logits,)
        sizes = sorted({x.shape[-1] for x in logits})
        if self.vocabulary is None and len(sizes) > 1:
            raise ValueError(
                f"the models have vocabularies of {' and '.join(map(str, sizes))} tokens; if the first {sizes[0]} mean "
                f"the same in all of them, set vocabulary={sizes[0]}"
            )
        if self.vocabulary is not None and self.vocabulary > sizes[0]:
            raise ValueError(f"vocabulary {self.vocabulary} is larger than that of a model, {sizes[0]} tokens")
        logps = _log_softmax(tuple(x[..., : self.vocabulary] for x in logits), 1 + 2 * len(self.weights))
        base, *pairs = logps
        combined = base
        for weight, tuned, untuned in zip(self.weights, pairs[::2], pairs[1::2], strict=True):
            # A token that is impossible under any model stays impossible, rather than inf - inf.
            possible = (tuned > -jnp.inf) & (untuned > -jnp.inf)
            combined = combined + jnp.where(possible, weight * (tuned - untuned), -jnp.inf if weight else 0.0)
        combined = jax.nn.log_softmax(combined)
        return StepScores(combined, None, combined, base)


@dataclass(frozen=True)
class TableReward:
    """Rewards, reference and values as tables, of (r, log pi_ref, V(s')): see `token_tree.TreePolicy`.

    Attributes:
        beta: Temperature: reward per nat; 0 leaves the reference out.
        use_values: Whether paths are compared with the value of where they lead.
    """

    beta: float
    use_values: bool = True
    monotone = False
    comparable_across_lengths = False

    def __call__(self, logits: Logits) -> StepScores:
        """See `Objective`."""
        reward, ref_logp, values = logits
        score = reward + self.beta * ref_logp
        return StepScores(score, values if self.use_values else None, ref_logp, ref_logp)


def _log_softmax(logits: Logits, count: int | None = None) -> tuple[Float[Array, "*B V"], ...]:
    """Log-probabilities, float32 or better."""
    logits = logits if isinstance(logits, tuple) else (logits,)
    if count is not None and len(logits) != count:
        raise ValueError(f"this objective reads an Ensemble of {count} policies, found {len(logits)}")
    return tuple(jax.nn.log_softmax(x.astype(jnp.promote_types(x.dtype, jnp.float32))) for x in logits)
