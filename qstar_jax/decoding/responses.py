"""What every decoder returns."""

from dataclasses import dataclass
from enum import IntEnum

import jax
from jaxtyping import Array, Bool, Float, Int, ScalarLike

from qstar_jax.mdp import implicit_rewards


class Finish(IntEnum):
    """Why a response ends where it does."""

    INVALID = 0
    """There is no such response: fewer exist than were asked for."""
    EOS = 1
    """It ends in an EOS token."""
    LENGTH = 2
    """It reached the limit."""
    STOP = 3
    """A stop string is complete."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Responses:
    """N responses to each of B prompts, best first where there is a search.

    Attributes:
        tokens: Token ids; 0 after a response's end. Shape [B, N, T].
        lengths: Tokens of each response, EOS included. Shape [B, N].
        logp: Unnormalised sum of log pi over these tokens, at temperature 1 and over the whole vocabulary, in nats;
            -inf where there is no response. Shape [B, N].
        ref_logp: The same under the reference, or None without one. Shape [B, N].
        score: What the search maximizes: the objective's sum, under the length rule if there is one. Shape [B, N].
        finish: A `Finish` for each. Shape [B, N].
        certified: Whether the first response is proven to be the best of all. Shape [B], or None where nothing can be.
        token_logp: log pi of each token, in nats, 0 after a response's end; or None unless it was asked for. Shape
            [B, N, T].
        drawn: Tokens drawn for each prompt in all, those of other responses included. Shape [B], or None where nothing
            is drawn.
    """

    tokens: Int[Array, "B N T"]
    lengths: Int[Array, "B N"]
    logp: Float[Array, "B N"]
    ref_logp: Float[Array, "B N"] | None
    score: Float[Array, "B N"]
    finish: Int[Array, "B N"]
    certified: Bool[Array, " B"] | None = None
    token_logp: Float[Array, "B N T"] | None = None
    drawn: Int[Array, " B"] | None = None

    @property
    def finished(self) -> Bool[Array, "B N"]:
        """Whether a response ended by EOS or a stop string, rather than at the limit."""
        return (self.finish == Finish.EOS) | (self.finish == Finish.STOP)

    def rewards(self, beta: ScalarLike) -> Float[Array, "B N"]:
        """Implicit rewards beta * log(pi / pi_ref) of whole responses.

        Args:
            beta: Temperature: reward per nat.

        Raises:
            ValueError: If there is no reference.
        """
        if self.ref_logp is None:
            raise ValueError("these responses have no ref_logp; decode with an Ensemble of policy and reference")
        return implicit_rewards(self.logp, self.ref_logp, beta=beta)
