"""f-divergences in place of the KL divergence from the reference: f'(pi / pi_ref) of whole responses.

DPO's score of a response is its log-ratio x = log(pi / pi_ref), which is f'(pi / pi_ref) of the reverse KL divergence
(up to a constant). Each function here takes x and returns f' of another divergence, with TRL's constants: those cancel
in a pair, but not in losses that divide by lengths.

References:
    Wang et al., "Beyond reverse KL: generalizing direct preference optimization with diverse divergence constraints",
    arXiv 2309.16240.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Divergence = Callable[[Float[Array, "..."]], Float[Array, "..."]]

# A score of exp(40) can still be squared (by ipo) in float32; responses beyond it teach nothing.
MAX_EXPONENT = 40.0


def reverse_kl(log_ratios: Float[Array, "..."]) -> Float[Array, "..."]:
    """The log-ratio x itself: the divergence of DPO."""
    return log_ratios


def forward_kl(log_ratios: Float[Array, "..."]) -> Float[Array, "..."]:
    """1 - exp(-x). The exponent is capped at 40 (TRL's is not, and overflows in float32 beyond 88)."""
    return 1.0 - jnp.exp(jnp.minimum(-log_ratios, MAX_EXPONENT))


def js_divergence(log_ratios: Float[Array, "..."]) -> Float[Array, "..."]:
    """Jensen-Shannon: log 2 + log sigma(x)."""
    return math.log(2.0) + jax.nn.log_sigmoid(log_ratios)


def alpha_divergence(log_ratios: Float[Array, "..."], alpha: float = 0.5) -> Float[Array, "..."]:
    """(exp((alpha - 1) x) - 1) / (alpha - 1), with the exponent capped at 40 (TRL's at 80); alpha = 1 is reverse KL.

    Args:
        log_ratios: Log-ratios of responses, in nats. Any shape.
        alpha: Order, a Python number.

    Returns:
        Scores of the same shape.
    """
    if abs(alpha - 1.0) < 1e-6:  # the limit, where the quotient loses all its digits
        return log_ratios
    return jnp.expm1(jnp.minimum((alpha - 1.0) * log_ratios, MAX_EXPONENT)) / (alpha - 1.0)


DIVERGENCES: dict[str, Divergence] = {
    function.__name__: function for function in (reverse_kl, forward_kl, js_divergence, alpha_divergence)
}
