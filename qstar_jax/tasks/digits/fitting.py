"""The two trainings: noise prediction on images, and Diffusion-DPO on pairs of images."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from qstar_jax import diffusion
from qstar_jax.diffusion import Schedule
from qstar_jax.tasks.digits.denoiser import Params, conditioned
from qstar_jax.tasks.digits.images import PIXELS


@dataclass(frozen=True)
class Pairs:
    """Pairs of images under one condition.

    Attributes:
        images: The preferred one first. Shape [N, 2, 64].
        conditions: What both were to show. Shape [N, C].
    """

    images: Float[np.ndarray, "N 2 64"]
    conditions: Float[np.ndarray, "N C"]


def fit_denoiser(
    params: Params,
    schedule: Schedule,
    images: Float[np.ndarray, "N 64"],
    conditions: Float[np.ndarray, "N C"],
    key: PRNGKeyArray,
    *,
    steps: int,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
) -> tuple[Params, float]:
    """Fits a denoiser to images with Adam, whose rate falls as a cosine.

    Args:
        params: Where to begin.
        schedule: The schedule.
        images: The images.
        conditions: What each shows, as the denoiser reads it.
        key: Key of batches, steps and noise.
        steps: Steps of training.
        batch_size: Images per step.
        learning_rate: The highest.

    Returns:
        Parameters, and the mean squared error per pixel in the last tenth of the steps.
    """
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))
    arrays = (schedule, jnp.asarray(images)[:, None], jnp.asarray(conditions))
    keys = jax.random.split(key, steps)
    params, _, losses = _train(_denoising_loss, optimizer, batch_size, arrays, params, optimizer.init(params), keys)
    return params, float(losses[-max(steps // 10, 1) :].mean())


def fit_dpo(
    reference: Params,
    schedule: Schedule,
    pairs: Pairs,
    key: PRNGKeyArray,
    *,
    beta_dpo: float,
    stops: tuple[int, ...],
    batch_size: int = 128,
    learning_rate: float = 1e-4,
) -> Iterator[tuple[int, Params]]:
    """Trains a copy of the reference by Diffusion-DPO.

    Args:
        reference: The reference, and the first policy.
        schedule: The schedule.
        pairs: The preferences.
        key: Key of batches, steps and noise.
        beta_dpo: Strength of the penalty, see `diffusion.diffusion_dpo`.
        stops: Numbers of steps after which the policy is wanted, ascending.
        batch_size: Pairs per step.
        learning_rate: Of Adam, constant.

    Yields:
        Steps so far, and the policy.
    """
    optimizer = _adam(learning_rate)
    arrays = (schedule, jnp.asarray(pairs.images), jnp.asarray(pairs.conditions), reference, jnp.float32(beta_dpo))
    keys, params, state = jax.random.split(key, stops[-1]), reference, optimizer.init(reference)
    for begin, end in zip((0, *stops[:-1]), stops, strict=True):
        params, state, _ = _train(_dpo_loss, optimizer, batch_size, arrays, params, state, keys[begin:end])
        yield end, params


_adam = cache(optax.adam)  # the same object, so that runs of one learning rate share their program


def _denoising_loss(params, arrays, batch_size, key):
    schedule, images, conditions = arrays
    rows, t, noise = _draw(key, len(images), batch_size, schedule.steps)
    return diffusion.noise_errors(schedule, conditioned(params, conditions[rows]), images[rows], t, noise).mean()


def _dpo_loss(params, arrays, batch_size, key):
    schedule, images, conditions, reference, beta_dpo = arrays
    rows, t, noise = _draw(key, len(images), batch_size, schedule.steps)
    errors, ref_errors = (
        diffusion.noise_errors(schedule, conditioned(model, conditions[rows]), images[rows], t, noise)
        for model in (params, reference)
    )
    return diffusion.diffusion_dpo(errors, ref_errors, beta_dpo=beta_dpo)[0].mean()


def _draw(key: PRNGKeyArray, rows: int, count: int, steps: int) -> tuple[Array, Array, Array]:
    """Rows, steps and noise of a batch."""
    keys = jax.random.split(key, 3)
    chosen = jax.random.randint(keys[0], (count,), 0, rows)
    return chosen, jax.random.randint(keys[1], (count,), 1, steps + 1), jax.random.normal(keys[2], (count, PIXELS))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _train(
    loss_fn: Callable[[Params, Any, int, PRNGKeyArray], Float[Array, ""]],
    optimizer: optax.GradientTransformation,
    batch_size: int,
    arrays: Any,
    params: Params,
    state: Any,
    keys: PRNGKeyArray,
) -> tuple[Params, Any, Float[Array, " K"]]:
    """Takes one step per key, as one program."""

    def step(carry, key):
        params, state = carry
        loss, gradient = jax.value_and_grad(loss_fn)(params, arrays, batch_size, key)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state), loss

    (params, state), losses = jax.lax.scan(step, (params, state), keys)
    return params, state, losses
