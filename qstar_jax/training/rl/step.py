"""One step of reinforcement learning: the optimizer updates that one batch of samples is used for."""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp

from qstar_jax.data.batches import Batch
from qstar_jax.training.metrics import COUNT, Metrics
from qstar_jax.training.step import TrainState, TrainStep


def make_rl_step(update: TrainStep, *, inner_epochs: int = 1, minibatches: int = 1, accumulate: int = 1) -> TrainStep:
    """Makes the step that passes several times over its samples.

    Args:
        update: One optimizer update (see `training.step.make_train_step`), of `accumulate` micro-batches.
        inner_epochs: Passes over the samples.
        minibatches: Updates per pass.
        accumulate: Micro-batches per update.

    Returns:
        `step(state, batch) -> (state, metrics)`; the batch has minibatches * accumulate micro-batches along a leading
        axis, if they are several. Metrics are means over all updates, each at the parameters before it. An update that
        is not finite is not taken, nor any after it.
    """
    updates = inner_epochs * minibatches
    if updates == 1:
        return update

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        begun = state.step
        take = _minibatch(batch, minibatches, accumulate)
        first = jax.eval_shape(update, state, take(0))[1]
        sums = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)

        def next_update(carry, number):
            state, sums = carry
            state, metrics = update(state, take(number % minibatches))
            return (state, jax.tree.map(jnp.add, sums, metrics)), None

        (state, metrics), _ = jax.lax.scan(next_update, (state, sums), jnp.arange(updates))
        # Counts are sums over a step, not over an update.
        for name in [name for name in metrics if name.startswith(COUNT)]:
            metrics[name] = (metrics[name][0], metrics[name][1] / updates)
        return replace(state, step=begun + state.finite), metrics

    return step


def _minibatch(batch: Batch, minibatches: int, accumulate: int) -> Callable[[jax.Array], Batch]:
    """Makes the function that takes a minibatch, with its micro-batches along a leading axis if they are several."""
    if minibatches == 1:
        return lambda number: batch
    if accumulate > 1:
        batch = jax.tree.map(lambda x: x.reshape(minibatches, accumulate, *x.shape[1:]), batch)
    return lambda number: jax.tree.map(lambda x: x[number], batch)
