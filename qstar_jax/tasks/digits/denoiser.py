"""The network that draws: an MLP that predicts the noise in an image, given its step and what it shall show."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from qstar_jax.diffusion import EpsFn
from qstar_jax.tasks.digits.images import CLASSES, PIXELS

_FREQUENCIES = 2.0 ** -jnp.arange(0, 8)  # of steps; the slowest wave is longer than a hundred steps
Params = list[tuple[Float[Array, "in out"], Float[Array, " out"]]]  # weights and biases, layer by layer


def init_denoiser(key: PRNGKeyArray, hidden: Sequence[int] = (256, 256, 256), *, conditions: int = CLASSES) -> Params:
    """Draws parameters; the last layer is zero, so that training begins from a prediction of no noise.

    Args:
        key: Random key.
        hidden: Widths of the hidden layers.
        conditions: C, the length of a condition.
    """
    sizes = [PIXELS + 2 * len(_FREQUENCIES) + conditions, *hidden, PIXELS]
    keys = jax.random.split(key, len(sizes) - 1)
    layers = [
        (jax.random.normal(key, (before, after)) / jnp.sqrt(before), jnp.zeros(after))
        for key, before, after in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]
    return [*layers[:-1], (jnp.zeros_like(layers[-1][0]), layers[-1][1])]


def predict_noise(
    params: Params, x: Float[Array, "... 64"], t: Int[Array, "..."], condition: Float[Array, "... C"]
) -> Float[Array, "... 64"]:
    """Predicts the noise in images after t steps.

    Args:
        params: See `init_denoiser`.
        x: Noisy images. Shape [..., 64].
        t: Steps. Shape [...].
        condition: What the images shall show; of digits, `one_hot`. Shape [..., C].

    Returns:
        Predicted noise. Shape [..., 64].
    """
    angles = t[..., None] * _FREQUENCIES
    hidden = jnp.concatenate([x, jnp.sin(angles), jnp.cos(angles), condition], axis=-1)
    for weights, bias in params[:-1]:
        hidden = jax.nn.silu(hidden @ weights + bias)
    weights, bias = params[-1]
    return hidden @ weights + bias


def one_hot(digit: Int[Array, "..."]) -> Float[Array, "... 10"]:
    """The condition of images of digits."""
    return jax.nn.one_hot(digit, CLASSES)


def conditioned(params: Params, condition: Float[Array, "B C"]) -> EpsFn:
    """Binds parameters and conditions: an `eps_fn` of `qstar_jax.diffusion`, for images [B, 64] or pairs [B, 2, 64]."""

    def eps_fn(x: Float[Array, "B ..."], t: Int[Array, "B ..."]) -> Float[Array, "B ..."]:
        count, size = condition.shape
        shape = (count, *[1] * (t.ndim - 1), size)
        return predict_noise(params, x, t, jnp.broadcast_to(condition.reshape(shape), (*t.shape, size)))

    return eps_fn
