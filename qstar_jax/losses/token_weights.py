"""Weights of tokens from the log-ratios that another model gives them: TIS-DPO's and SePO's, for `weighted_sigmoid`.

A guide, such as a DPO model, says how good each token is: s_t = log pi_guide - log pi_guide_ref, in nats. In the chosen
response good tokens shall count, in the rejected one bad tokens, so every transform reads s_t there and -s_t here; all
but `exponential` limit that signed number. Shapes are [..., 2, T], chosen first; weights are 0 where `mask` is False,
and no gradient flows through them.

References:
    Liu et al., "TIS-DPO: token-level importance sampling for direct preference optimization with estimated weights",
    arXiv 2410.04350; Yang et al., "Selective preference optimization via token-level reward function estimation"
    (SePO), arXiv 2408.13518.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, ScalarLike

from qstar_jax.mdp import masked
from qstar_jax.shapes import check_shape

SIGNS = np.array([1.0, -1.0])[:, None]  # of chosen and rejected


def exponential(
    guide: Float[Array, "*B 2 T"],
    mask: Bool[Array, "*B 2 T"],
    *,
    low: ScalarLike = -0.5,
    high: ScalarLike = 1.5,
    sharpness: ScalarLike = 1.0,
) -> Float[Array, "*B 2 T"]:
    """TIS-DPO, the paper's form: exp(mu clip(s_t, L, U)), with -mu in the rejected response.

    The paper's factor k scales every weight, as `beta` does. The defaults are this library's: the released code has
    no such transform to take them from.

    Args:
        guide: s_t, in nats. Shape [..., 2, T].
        mask: True at actions. Shape [..., 2, T].
        low: L.
        high: U.
        sharpness: mu.

    Returns:
        Weights, above 0 at actions. Shape [..., 2, T].
    """
    limited = jnp.clip(_checked(guide, mask), low, high)
    return masked(jnp.exp(sharpness * SIGNS.astype(limited.dtype) * limited), mask)


def threshold(
    guide: Float[Array, "*B 2 T"], mask: Bool[Array, "*B 2 T"], *, low: ScalarLike = -1.0, high: ScalarLike = 1.0
) -> Float[Array, "*B 2 T"]:
    """TIS-DPO's code, `threshold`: the signed log-ratio itself, limited; tokens of the wrong sign count negatively.

    Args:
        guide: s_t, in nats. Shape [..., 2, T].
        mask: True at actions. Shape [..., 2, T].
        low: Lower limit.
        high: Upper limit.

    Returns:
        Weights. Shape [..., 2, T].
    """
    return masked(jnp.clip(_signed(guide, mask), low, high), mask)


def threshold_and_scale(
    guide: Float[Array, "*B 2 T"],
    mask: Bool[Array, "*B 2 T"],
    *,
    low: ScalarLike = -1.5,
    high: ScalarLike = 1.5,
    min_weight: ScalarLike = 0.7,
    max_weight: ScalarLike = 1.3,
) -> Float[Array, "*B 2 T"]:
    """TIS-DPO's code, `threshold_and_scale`: the limited signed log-ratio, scaled to a range of weights.

    Args:
        guide: s_t, in nats. Shape [..., 2, T].
        mask: True at actions. Shape [..., 2, T].
        low: Signed log-ratio of the smallest weight, and all below.
        high: That of the largest, and all above.
        min_weight: Smallest weight.
        max_weight: Largest weight.

    Returns:
        Weights. Shape [..., 2, T].
    """
    share = (jnp.clip(_signed(guide, mask), low, high) - low) / (high - low)
    return masked(min_weight + share * (max_weight - min_weight), mask)


def rank_based(
    guide: Float[Array, "*B 2 T"],
    mask: Bool[Array, "*B 2 T"],
    *,
    min_weight: ScalarLike = 0.7,
    max_weight: ScalarLike = 1.3,
) -> Float[Array, "*B 2 T"]:
    """TIS-DPO's code, `rank_based`: evenly spaced by the token's rank in its response; 1 for a single token.

    Args:
        guide: s_t, in nats. Shape [..., 2, T].
        mask: True at actions. Shape [..., 2, T].
        min_weight: Weight of the lowest token.
        max_weight: Weight of the highest.

    Returns:
        Weights. Shape [..., 2, T].
    """
    counts = mask.sum(-1, keepdims=True)
    share = _ranks(_signed(guide, mask), mask) / jnp.maximum(counts - 1, 1)
    weights = min_weight + share * (max_weight - min_weight)
    return masked(jnp.where(counts == 1, 1.0, weights).astype(guide.dtype), mask)


def select(
    guide: Float[Array, "*B 2 T"], mask: Bool[Array, "*B 2 T"], *, top: ScalarLike = 0.3
) -> Float[Array, "*B 2 T"]:
    """SePO's key tokens, `binary` in TIS-DPO's code: 1 for the best of the chosen and the worst of the rejected.

    Of N tokens floor(top * N) are selected, and at least one. Elsewhere: SePO trains on them without a reference.

    Args:
        guide: s_t, in nats. Shape [..., 2, T].
        mask: True at actions. Shape [..., 2, T].
        top: Share of each response's tokens that is selected.

    Returns:
        Weights, 0 or 1. Shape [..., 2, T].
    """
    counts = mask.sum(-1, keepdims=True)
    # The small number keeps 0.3 * 10 from becoming 2.
    selected = jnp.maximum(jnp.floor(top * counts + 1e-4), 1)
    from_top = counts - 1 - _ranks(_signed(guide, mask), mask)
    return masked((from_top < selected).astype(guide.dtype), mask)


def random(
    guide: Float[Array, "*B 2 T"],
    mask: Bool[Array, "*B 2 T"],
    *,
    min_weight: ScalarLike = 0.7,
    max_weight: ScalarLike = 1.3,
    control_seed: int = 0,
) -> Float[Array, "*B 2 T"]:
    """The control: uniform weights that know nothing of the guide, with the distribution of `rank_based`.

    A response has the same weights whenever it is seen: its log-ratios serve to seed the generator.

    Args:
        guide: s_t, in nats. Shape [..., 2, T].
        mask: True at actions. Shape [..., 2, T].
        min_weight: Lower end.
        max_weight: Upper end.
        control_seed: Another seed gives other weights.

    Returns:
        Weights. Shape [..., 2, T].
    """
    bits = jax.lax.bitcast_convert_type(_checked(guide, mask).astype(jnp.float32), jnp.uint32)
    names = (bits * (2 * jnp.arange(bits.shape[-1], dtype=jnp.uint32) + 1)).sum(-1, dtype=jnp.uint32)

    def draw(name: Array) -> Array:
        return jax.random.uniform(jax.random.fold_in(jax.random.key(control_seed), name), bits.shape[-1:], jnp.float32)

    uniform = jax.vmap(draw)(names.reshape(-1)).reshape(bits.shape).astype(guide.dtype)
    return masked(min_weight + uniform * (max_weight - min_weight), mask)


TOKEN_WEIGHTS = {
    function.__name__: function
    for function in (exponential, threshold, threshold_and_scale, rank_based, select, random)
}


def _checked(guide: Float[Array, "*B 2 T"], mask: Bool[Array, "*B 2 T"]) -> Float[Array, "*B 2 T"]:
    check_shape((*mask.shape[:-2], 2, *mask.shape[-1:]), mask=mask)
    return jax.lax.stop_gradient(masked(guide, mask))


def _signed(guide: Float[Array, "*B 2 T"], mask: Bool[Array, "*B 2 T"]) -> Float[Array, "*B 2 T"]:
    guide = _checked(guide, mask)
    return SIGNS.astype(guide.dtype) * guide


def _ranks(values: Float[Array, "*B T"], mask: Bool[Array, "*B T"]) -> Array:
    """Rank of each action's value within its response, from 0 for the lowest; earlier tokens first among equals."""
    order = jnp.argsort(jnp.where(mask, values, jnp.inf), axis=-1, stable=True)
    return jnp.argsort(order, axis=-1, stable=True)
