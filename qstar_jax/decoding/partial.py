"""Responses while they grow: beams, samples, chunks and search trees all append their tokens here."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qstar_jax.decoding.objectives import StepScores
from qstar_jax.decoding.responses import Finish, Responses
from qstar_jax.decoding.stop_strings import StopStrings


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Partial:
    """N responses to each of B prompts, growing or finished; at most T tokens each.

    Attributes:
        tokens: Token ids, then 0. Shape [B, N, T].
        lengths: Number of tokens. Shape [B, N].
        total: Sum of the objective's scores. Shape [B, N].
        score: What responses are compared by: `total` plus the value of where the last token leads, unless a search
            replaces it; -inf where there is no response. Shape [B, N].
        logp: Sum of log pi, in nats. Shape [B, N].
        ref_logp: Sum of log pi_ref, in nats, or None without a reference. Shape [B, N].
        finish: A `Finish`; LENGTH also for responses that still grow. Shape [B, N].
        stop: State of each stop string. Shape [B, N, stop strings].
        token_logp: log pi of each token, in nats, or None where only the sum is kept. Shape [B, N, T].
    """

    tokens: Int[Array, "B N T"]
    lengths: Int[Array, "B N"]
    total: Float[Array, "B N"]
    score: Float[Array, "B N"]
    logp: Float[Array, "B N"]
    ref_logp: Float[Array, "B N"] | None
    finish: Int[Array, "B N"]
    stop: Int[Array, "B N S"]
    token_logp: Float[Array, "B N T"] | None = None

    @classmethod
    def start(
        cls,
        step: StepScores,
        max_new_tokens: int,
        stop_strings: StopStrings | None = None,
        *,
        keep_token_logps: bool = False,
    ) -> "Partial":
        """Makes responses without a token.

        Args:
            step: Scores of their first tokens, which fix sizes and types. Shape [B, N, V].
            max_new_tokens: Longest response, T.
            stop_strings: Strings that will end responses.
            keep_token_logps: Whether log pi of each token is kept beside the sum.
        """
        shape = step.score.shape[:2]
        zeros = jax.tree.map(lambda x: jnp.zeros(shape, x.dtype), step)
        return cls(
            tokens=jnp.zeros((*shape, max_new_tokens), jnp.int32),
            lengths=jnp.zeros(shape, jnp.int32),
            total=zeros.score,
            score=zeros.score,
            logp=zeros.logp,
            ref_logp=zeros.ref_logp,
            finish=jnp.full(shape, Finish.LENGTH, jnp.int32),
            stop=jnp.zeros((*shape, stop_strings.count if stop_strings else 0), jnp.int32),
            token_logp=jnp.zeros((*shape, max_new_tokens), step.logp.dtype) if keep_token_logps else None,
        )

    @property
    def exists(self) -> Bool[Array, "B N"]:
        """Whether there is such a response."""
        return self.finish != Finish.INVALID

    @property
    def growing(self) -> Bool[Array, "B N"]:
        """Whether another token may follow."""
        return (self.finish == Finish.LENGTH) & (self.lengths < self.tokens.shape[-1])

    def append(
        self,
        token: Int[Array, "B N"],
        step: StepScores,
        where: Bool[Array, "B N"],
        *,
        eos_ids: tuple[int, ...],
        stop_strings: StopStrings | None = None,
    ) -> "Partial":
        """Appends one token to each response, and finishes those that it ends.

        Args:
            token: Token ids. Shape [B, N].
            step: Scores of these tokens. Shape [B, N].
            where: Responses that get their token; the others stay as they are. Shape [B, N].
            eos_ids: Tokens that end a response.
            stop_strings: Strings that end a response.
        """
        stop, stopped = self.stop, jnp.zeros_like(where)
        if stop_strings is not None:
            stop = stop_strings.advance(stop, token)
            stopped = (stop == stop_strings.lengths).any(-1)
        finish = jnp.where(stopped, Finish.STOP, Finish.LENGTH)
        finish = jnp.where(is_one_of(token, eos_ids), Finish.EOS, finish)
        total = self.total + step.score
        last = jnp.arange(self.tokens.shape[-1]) == self.lengths[..., None]
        token_logp = self.token_logp
        if token_logp is not None:
            token_logp = jnp.where(last, step.logp[..., None], token_logp)
        longer = Partial(
            tokens=jnp.where(last, token[..., None], self.tokens),
            lengths=self.lengths + 1,
            total=total,
            score=total if step.value is None else (total + step.value).astype(total.dtype),
            logp=self.logp + step.logp,
            ref_logp=None if self.ref_logp is None else self.ref_logp + step.ref_logp,
            finish=finish.astype(jnp.int32),
            stop=stop,
            token_logp=token_logp,
        )
        return jax.tree.map(lambda new, old: jnp.where(_like(where, new), new, old), longer, self)

    def take(self, index: Int[Array, "B K"]) -> "Partial":
        """The responses at `index` of each prompt, in this order."""
        return jax.tree.map(lambda x: take_rows(x, index), self)

    def best(self, count: int) -> "Partial":
        """The `count` responses of highest score, best first; ties go to the earlier."""
        return self.take(jax.lax.top_k(self.score, count)[1])

    def joined(self, *others: "Partial") -> "Partial":
        """These responses, then the others."""
        return jax.tree.map(lambda *xs: jnp.concatenate(xs, axis=1), self, *others)

    def without(self, pruned: Bool[Array, "#B #N"]) -> "Partial":
        """The same, in which the pruned responses do not exist."""
        score = jnp.where(pruned, -jnp.inf, self.score)
        return replace(self, score=score, finish=jnp.where(pruned, Finish.INVALID, self.finish))

    def responses(self, certified: Bool[Array, " B"] | None = None, drawn: Int[Array, " B"] | None = None) -> Responses:
        """Makes what decoders return: nothing but zeros and -inf where there is no response."""
        return Responses(
            tokens=jnp.where(self.exists[..., None], self.tokens, 0),
            lengths=jnp.where(self.exists, self.lengths, 0),
            logp=jnp.where(self.exists, self.logp, -jnp.inf),
            ref_logp=None if self.ref_logp is None else jnp.where(self.exists, self.ref_logp, -jnp.inf),
            score=self.score,
            finish=self.finish,
            certified=certified,
            token_logp=None if self.token_logp is None else jnp.where(self.exists[..., None], self.token_logp, 0.0),
            drawn=drawn,
        )


def is_one_of(token: Int[Array, "*B"], ids: tuple[int, ...]) -> Bool[Array, "*B"]:
    """Whether each token is one of `ids`."""
    return (token[..., None] == jnp.array(ids, token.dtype)).any(-1)


def take_rows(x: Array, index: Int[Array, "B K"]) -> Array:
    """x[b, index[b, k]] of [B, N, ...]."""
    return x[jnp.arange(x.shape[0])[:, None], index]


def _like(mask: Bool[Array, "B N"], x: Array) -> Array:
    """The mask with as many axes as x."""
    return mask.reshape(*mask.shape, *[1] * (x.ndim - mask.ndim))
