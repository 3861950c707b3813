"""What every decoder returns."""

from dataclasses import dataclass
from enum import IntEnum

import jax
from jaxtyping import Array, Bool, Float, Int, ScalarLike

from qstar_jax.mdp import implicit_rewards


class Finish(IntEnum):
    """Why an answer is as long as it is."""

    INVALID = 0
    """There is no such answer: fewer exist than were asked for."""
    EOS = 1
    """It ends in a token that ends answers."""
    LENGTH = 2
    """It ran into the limit."""
    STOP = 3
    """A stop string is complete."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Responses:
    """N answers to each of B prompts, the best first where there is a search.

    Attributes:
        tokens: Token ids; 0 after an answer's end. Shape [B, N, T].
        lengths: Tokens of each answer, EOS included. Shape [B, N].
        logp: Unnormalised sum of log pi over these tokens, at temperature 1 and over the whole vocabulary, in nats;
            -inf where there is no such answer. Shape [B, N].
        ref_logp: The same under the reference, or None without one. Shape [B, N].
        score: What the search compared: the objective's sum, with the length rule if there is one. Shape [B, N].
        finish: A `Finish` for each. Shape [B, N].
        certified: Whether the first answer is proven to be the best of all. Shape [B], or None where nothing can be.
    """

    tokens: Int[Array, "B N T"]
    lengths: Int[Array, "B N"]
    logp: Float[Array, "B N"]
    ref_logp: Float[Array, "B N"] | None
    score: Float[Array, "B N"]
    finish: Int[Array, "B N"]
    certified: Bool[Array, " B"] | None = None

    @property
    def finished(self) -> Bool[Array, "B N"]:
        """Whether an answer came to its own end: by EOS or a stop string."""
        return (self.finish == Finish.EOS) | (self.finish == Finish.STOP)

    def rewards(self, beta: ScalarLike) -> Float[Array, "B N"]:
        """Implicit rewards beta * log(pi / pi_ref) of whole answers.

        Args:
            beta: Temperature: reward per nat.

        Raises:
            ValueError: If there was no reference.
        """
        if self.ref_logp is None:
            raise ValueError("these answers have no ref_logp; decode with an Ensemble of policy and reference")
        return implicit_rewards(self.logp, self.ref_logp, beta=beta)
