"""Weights that apply to any loss: of tokens (LD-DPO) and of pairs (WPO)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, ScalarLike

from qstar_jax.losses.responses import response_means
from qstar_jax.shapes import check_same_shape


def desensitize_length(
    values: Float[Array, "*B 2 T"], mask: Bool[Array, "*B 2 T"], *, ld_alpha: ScalarLike
) -> Float[Array, "*B 2 T"]:
    """LD-DPO: multiplies by alpha the tokens of the longer response beyond the length of the shorter one.

    Elsewhere: TRL's `ld_alpha` does this to policy and reference alike, as here when `values` are log-ratios;
    LLaMA-Factory's applies to the policy only: same name, different number.

    Args:
        values: Token log-ratios (or log-probabilities). Shape [..., 2, T].
        mask: True at actions. Shape [..., 2, T].
        ld_alpha: alpha in [0, 1]; 1 changes nothing.

    Returns:
        Weighted values, 0 where `mask` is False; pass them to any loss. Shape [..., 2, T].

    References:
        Liu et al., "Length desensitization in direct preference optimization", arXiv 2409.06411.
    """
    check_same_shape(values=values, mask=mask)
    # Tokens that both responses have keep their weight.
    shared = mask.sum(-1).min(-1)[..., None, None]
    weights = jnp.where(jnp.cumsum(mask, axis=-1) <= shared, 1.0, ld_alpha).astype(values.dtype)
    return weights * jnp.where(mask, values, 0.0)


def wpo_weights(
    logp: Float[Array, "*B 2 T"], mask: Bool[Array, "*B 2 T"], log_sum_sq: Float[Array, "*B 2 T"] | None = None
) -> Float[Array, "*B"]:
    """WPO: weights each pair by its probability under the policy; multiply the loss by it.

    exp(mean_t [log pi(a_t) - log sum_a pi(a | s_t)^2]) of the chosen response times that of the rejected one.

    Elsewhere: TRL's `use_weighting` takes this aligned form; without `log_sum_sq` it is the paper's plain form.

    Args:
        logp: Token log-probabilities of the policy, in nats. Shape [..., 2, T].
        mask: True at actions. Shape [..., 2, T].
        log_sum_sq: log sum_a pi(a | s_t)^2 = logsumexp(2 log pi), in nats, which aligns the weights: a
            token sampled by the policy then weighs 1 on average; None: not aligned. Shape [..., 2, T].

    Returns:
        Weights, with the gradient stopped. Shape [...].

    References:
        Zhou et al., "WPO: enhancing RLHF with weighted preference optimization", arXiv 2406.11827, Eq. 2.
    """
    if log_sum_sq is not None:
        check_same_shape(log_sum_sq=log_sum_sq, mask=mask)
        logp = jnp.where(mask, logp, 0.0) - jnp.where(mask, log_sum_sq, 0.0)
    return jax.lax.stop_gradient(jnp.exp(response_means(logp, mask).sum(-1)))
