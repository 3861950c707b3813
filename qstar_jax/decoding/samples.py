"""Answers on their way: what a decoder keeps of each sample while it grows."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qstar_jax.decoding.responses import Finish, Responses


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Samples:
    """N answers a prompt, finished or not.

    Attributes:
        tokens: New tokens, then 0. Shape [B, N, T].
        length: How many. Shape [B, N].
        score: The objective's sum. Shape [B, N].
        value: The objective's value of where the last token has led; 0 without one. Shape [B, N].
        logp: Sum of log pi. Shape [B, N].
        ref_logp: Sum of log pi_ref, or None without a reference. Shape [B, N].
        finish: A `Finish`; LENGTH also for those that can still grow. Shape [B, N].
        paused: Whether the last token has ended a step. Shape [B, N].
        stop: State of each stop string. Shape [B, N, stop strings].
    """

    tokens: Int[Array, "B N T"]
    length: Int[Array, "B N"]
    score: Float[Array, "B N"]
    value: Float[Array, "B N"]
    logp: Float[Array, "B N"]
    ref_logp: Float[Array, "B N"] | None
    finish: Int[Array, "B N"]
    paused: Bool[Array, "B N"]
    stop: Int[Array, "B N S"]

    @classmethod
    def empty(cls, rows: int, count: int, room: int, stops: int, dtype: Any, has_reference: bool) -> "Samples":
        """Answers without a token."""
        none, zeros = jnp.zeros((rows, count), jnp.int32), jnp.zeros((rows, count), dtype)
        return cls(
            tokens=jnp.zeros((rows, count, room), jnp.int32),
            length=none,
            score=zeros,
            value=zeros,
            logp=zeros,
            ref_logp=zeros if has_reference else None,
            finish=jnp.full_like(none, Finish.LENGTH),
            paused=none > 0,
            stop=jnp.zeros((rows, count, stops), jnp.int32),
        )

    @property
    def growing(self) -> Bool[Array, "B N"]:
        """Whether an answer can have more tokens."""
        return (self.finish == Finish.LENGTH) & (self.length < self.tokens.shape[-1])

    @property
    def worth(self) -> Float[Array, "B N"]:
        """What answers and unfinished ones are compared by: score and value, -inf where there is none."""
        return jnp.where(self.finish == Finish.INVALID, -jnp.inf, self.score + self.value)

    def take(self, index: Int[Array, "B K"]) -> "Samples":
        """Some of the answers, in this order."""
        return jax.tree.map(lambda x: take_rows(x, index), self)

    def best(self, count: int) -> "Samples":
        """The best answers, best first; of equals the earlier."""
        return self.take(jax.lax.top_k(self.worth, count)[1])

    def joined(self, other: "Samples") -> "Samples":
        """These answers, then those."""
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), self, other)

    def without(self, void: Bool[Array, "B N"]) -> "Samples":
        """The same with some declared not to exist."""
        return replace(self, finish=jnp.where(void, Finish.INVALID, self.finish))

    def responses(self) -> Responses:
        """As decoders return them."""
        valid = self.finish != Finish.INVALID
        length = jnp.where(valid, self.length, 0)
        return Responses(
            tokens=jnp.where(jnp.arange(self.tokens.shape[-1]) < length[..., None], self.tokens, 0),
            lengths=length,
            logp=jnp.where(valid, self.logp, -jnp.inf),
            ref_logp=None if self.ref_logp is None else jnp.where(valid, self.ref_logp, -jnp.inf),
            score=self.worth,
            finish=self.finish,
        )


def take_rows(x: Array, index: Int[Array, "B K"]) -> Array:
    """x[b, index[b, k]] of [B, N, ...]."""
    return x[jnp.arange(x.shape[0])[:, None], index]
