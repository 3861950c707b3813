"""How one token is drawn: the temperature, and the restrictions of the distribution."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from qstar_jax.decoding.arguments import token_id_tuple
from qstar_jax.decoding.constraints import Constraints


@dataclass(frozen=True)
class SampleOptions:
    """How responses are drawn.

    Attributes:
        max_new_tokens: Longest response T, EOS included.
        eos_ids: Tokens that end a response.
        num_samples: Responses per prompt, N.
        temperature: Divides log pi before a token is drawn; 0 takes the most likely token; ties go to the lowest id.
        top_k: See `restrict`.
        top_p: See `restrict`.
        min_p: See `restrict`.
        constraints: Rules on repetition and minimum length. They change log pi before the temperature does;
            transformers changes raw logits, which differs for the repetition penalty.
    """

    max_new_tokens: int
    eos_ids: tuple[int, ...]
    num_samples: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    constraints: Constraints = Constraints()

    def __post_init__(self):
        """Refuses values that have no meaning or no effect."""
        object.__setattr__(self, "eos_ids", token_id_tuple("eos_ids", self.eos_ids))
        message = None
        if self.max_new_tokens < 1 or self.num_samples < 1:
            message = f"max_new_tokens {self.max_new_tokens} and num_samples {self.num_samples} must be at least 1"
        elif not 0 <= self.temperature < math.inf:
            message = f"temperature {self.temperature} must be a number of at least 0"
        elif self.top_k < 0 or not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
            message = (
                f"top_k {self.top_k} must be at least 0, top_p {self.top_p} above 0 and at most 1, min_p {self.min_p} "
                "between 0 and 1"
            )
        elif self.temperature == 0 and (self.top_k or self.top_p < 1 or self.min_p):
            message = "top_k, top_p and min_p restrict sampling, and temperature 0 does not sample; set a temperature"
        elif self.temperature == 0 and self.num_samples > 1:
            message = f"temperature 0 gives the same response {self.num_samples} times; set a temperature or one sample"
        elif self.constraints.min_new_tokens > self.max_new_tokens:
            message = f"min_new_tokens {self.constraints.min_new_tokens} is above max_new_tokens {self.max_new_tokens}"
        if message:
            raise ValueError(message)

    def draw(self, logp: Float[Array, "B N V"], keys: Key[Array, "B N"] | None) -> Int[Array, "B N"]:
        """Draws one token per response; any token where none is possible."""
        if self.temperature == 0:
            return jnp.argmax(logp, axis=-1).astype(jnp.int32)
        logits = restrict(logp / self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p)
        return jax.vmap(jax.vmap(jax.random.categorical))(keys, logits).astype(jnp.int32)


def restrict(
    logits: Float[Array, "*B V"], *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Float[Array, "*B V"]:
    """Sets the logits of unlikely tokens to -inf. At least the most likely token stays.

    Sums of probabilities are taken in float32 whatever the logits are: in bfloat16 the sum over a large vocabulary
    stops growing before it reaches top_p.

    Args:
        logits: Logits at the sampling temperature. Shape [..., V].
        top_k: Keep the k most likely tokens; 0 keeps all. Ties go to the lower id.
        top_p: Of these, keep the fewest whose probabilities reach this sum; 1 keeps all (arXiv 1904.09751).
        min_p: Of these, keep those with at least this fraction of the most likely one's probability; 0 keeps all
            (arXiv 2407.01082).

    Returns:
        Logits, float32 or better. Shape [..., V].
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    kept = jnp.ones(logits.shape, bool)
    if 0 < top_k < logits.shape[-1] or top_p < 1:
        kept = _nucleus(logits, top_k, top_p)
    if min_p > 0:
        kept &= logits >= logits.max(-1, keepdims=True) + math.log(min_p)
    return jnp.where(kept, logits, -jnp.inf)


def _nucleus(logits: Float[Array, "*B V"], top_k: int, top_p: float) -> Array:
    """Whether a token is among the top k and, of these, the top p. Sorts values alone, which is the cheap kind."""
    vocabulary = logits.shape[-1]
    ranked = jax.lax.top_k(logits, min(top_k or vocabulary, vocabulary))[0]
    count = jnp.full(logits.shape[:-1], ranked.shape[-1])
    if top_p < 1:
        highest = ranked[..., :1]
        weights = jnp.exp(ranked - jnp.where(highest > -jnp.inf, highest, 0.0))  # not normalised: exact where they are
        reached = jnp.cumsum(weights, axis=-1)
        needed = reached[..., :-1] < top_p * reached[..., -1:]
        count = 1 + jnp.cumprod(needed, axis=-1).sum(-1)
    threshold = jnp.take_along_axis(ranked, count[..., None] - 1, axis=-1)
    above, ties = logits > threshold, logits == threshold
    places = count - above.sum(-1)
    return above | (ties & (jnp.cumsum(ties, axis=-1) <= places[..., None]))
