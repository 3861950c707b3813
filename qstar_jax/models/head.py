"""From last hidden states to logits: the one thing that log-probabilities, decoding and `CausalLM.logits` read."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Head:
    """Output vectors of the vocabulary, and what a model does to their products with its hidden states.

    Logits are z = scale * (hidden @ table.T) + bias, and softcap * tanh(z / softcap) where there is a cap. The scale
    multiplies the product alone, as Granite's 1 / logits_scaling and Cohere's logit_scale do, which have no bias. The
    policy's logits are the capped ones: they are what Q-values are read from.

    Attributes:
        table: One output vector a token. Shape [V, D].
        bias: Added to the scaled product; None: there is none, and no gradient of it. Shape [V].
        softcap: Bound on the size of a logit; None: there is none.
        scale: What the product is multiplied by.
    """

    table: Float[Array, "V D"]
    bias: Float[Array, " V"] | None = None
    softcap: float | None = field(default=None, metadata={"static": True})
    scale: float = field(default=1.0, metadata={"static": True})

    def logits(self, hidden: Float[Array, "*N D"]) -> Float32[Array, "*N V"]:
        """Computes logits of the tokens that come next, all at once (see `logprobs` for long texts).

        Products of bfloat16 inputs accumulate in float32, and everything that follows is float32.

        Args:
            hidden: Last hidden states. Shape [..., D].

        Returns:
            Logits. Shape [..., V].
        """
        # One row a token: a product of matrices, where XLA would transpose three dimensions on a CPU.
        rows = hidden.reshape(-1, hidden.shape[-1])
        logits = self.scale * jnp.einsum("nd,vd->nv", rows, self.table, preferred_element_type=jnp.float32)
        if self.bias is not None:
            logits += self.bias.astype(jnp.float32)
        if self.softcap is not None:
            logits = self.softcap * jnp.tanh(logits / self.softcap)
        return logits.reshape(*hidden.shape[:-1], -1)
