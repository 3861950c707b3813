"""What every decoder returns."""

from dataclasses import dataclass

import jax
from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Hypotheses:
    """N answers to each of B prompts.

    Attributes:
        tokens: Token ids; what stands after an answer's end has no meaning. Shape [B, N, T].
        lengths: Tokens of each answer, EOS included. Shape [B, N].
        logp: Unnormalised sum of log pi over these tokens, at temperature 1 and over the whole vocabulary, in nats;
            -inf where there is no such answer (a beam wider than the tree of answers). Shape [B, N].
        finished: Whether the answer ends in EOS; otherwise it ran into the limit. Shape [B, N].
    """

    tokens: Int[Array, "B N T"]
    lengths: Int[Array, "B N"]
    logp: Float[Array, "B N"]
    finished: Bool[Array, "B N"]
