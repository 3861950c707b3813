"""The language-model head, which turns last hidden states into logits for training, scoring and decoding alike."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Head:
    """Output embedding of the vocabulary, with an optional bias, scale and cap.

    Logits are z = scale * (hidden @ table.T) + bias, then softcap * tanh(z / softcap) if there is a cap, and all that
    over the temperature. The scale multiplies the product alone, like Granite's 1 / logits_scaling and Cohere's
    logit_scale, which have no bias. Q-values are read from the capped logits.

    Attributes:
        table: One output vector per token; None: the hidden states are logits already. Shape [V, D].
        bias: Added to the scaled product; None: no bias, hence no gradient. Shape [V].
        softcap: Bound on the magnitude of a logit; None: unbounded.
        scale: Multiplies the product.
        temperature: Divides the logits: that of a policy which is sampled and trained at another one than 1.
    """

    table: Float[Array, "V D"] | None
    bias: Float[Array, " V"] | None = None
    softcap: float | None = field(default=None, metadata={"static": True})
    scale: float = field(default=1.0, metadata={"static": True})
    temperature: float = field(default=1.0, metadata={"static": True})

    def logits(self, hidden: Float[Array, "*N D"]) -> Float32[Array, "*N V"]:
        """Computes next-token logits, all at once (see `logprobs` for long texts).

        bfloat16 inputs accumulate in float32, and everything after the product is float32.

        Args:
            hidden: Last hidden states. Shape [..., D].

        Returns:
            Logits. Shape [..., V].
        """
        if self.table is None:
            return hidden.astype(jnp.float32) / self.temperature
        # A plain matrix product: with more dimensions, XLA transposes first on a CPU.
        flat = hidden.reshape(-1, hidden.shape[-1])
        logits = self.scale * jnp.einsum("nd,vd->nv", flat, self.table, preferred_element_type=jnp.float32)
        if self.bias is not None:
            logits += self.bias.astype(jnp.float32)
        if self.softcap is not None:
            logits = self.softcap * jnp.tanh(logits / self.softcap)
        if self.temperature != 1.0:
            logits /= self.temperature
        return logits.reshape(*hidden.shape[:-1], -1)
