"""One step of reinforcement learning: the optimizer updates that one batch of samples is used for."""

from collections.abc import Callable, Sequence
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
        axis, if they are several. Metrics are means over all updates, each at the parameters before it. With an update
        that is not finite, none of the step is taken, nor any later one; so several updates need the trained parameters
        and the optimizer's state once more.
    """
    updates = inner_epochs * minibatches
    if updates == 1:
        return update

    def step(begun: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        take = _minibatch(batch, minibatches, accumulate)
        first = jax.eval_shape(update, begun, take(0))[1]
        sums = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)

        def next_update(carry, number):
            state, sums = carry
            state, metrics = update(state, take(number % minibatches))
            return (state, jax.tree.map(jnp.add, sums, metrics)), None

        (state, metrics), _ = jax.lax.scan(next_update, (begun, sums), jnp.arange(updates))
        # Counts are sums over a step, not over an update.
        for name in [name for name in metrics if name.startswith(COUNT)]:
            metrics[name] = (metrics[name][0], metrics[name][1] / updates)
        # What the updates do not change is not compared, so it is not copied either.
        new = replace(state, step=begun.step + 1, ref_params=begun.ref_params, frozen=begun.frozen)
        old = replace(begun, finite=state.finite)
        return jax.tree.map(
            lambda new, old: new if new is old else jnp.where(state.finite, new, old), new, old
        ), metrics

    return step


def find_cause_of_update(
    find_cause: Callable[[TrainState, Batch, Callable[[Sequence[int]], str]], str],
    update: TrainStep,
    state: TrainState,
    batch: Batch,
    locate: Callable[[Sequence[int]], str],
    *,
    inner_epochs: int = 1,
    minibatches: int = 1,
    accumulate: int = 1,
) -> str:
    """Takes the updates of a step one by one, up to the one that is not finite, and finds its cause.

    Args:
        find_cause: Finds the cause in an update (see `diagnostics.nonfinite`).
        update: As for `make_rl_step`, and so are the numbers below.
        state: The state before the step, whether the step has marked it or not.
        batch: The batch of the step.
        locate: Names prompts, counted from 0 over the batch.
        inner_epochs: Passes over the samples.
        minibatches: Updates per pass.
        accumulate: Micro-batches per update.

    Returns:
        A clause that names the update, and what was not finite.
    """
    updates, take, update = inner_epochs * minibatches, _minibatch(batch, minibatches, accumulate), jax.jit(update)
    prompts = batch.weights.size // minibatches
    state = replace(state, finite=jnp.ones_like(state.finite))
    for number in range(updates):
        begun, part, first = state, take(number % minibatches), number % minibatches * prompts
        state, _ = update(begun, part)
        if not state.finite:
            cause = find_cause(begun, part, lambda examples, first=first: locate([first + i for i in examples]))
            return cause if updates == 1 else f"in update {number + 1} of {updates}, {cause}"
    return "each of its updates is finite when they are taken one by one"


def _minibatch(batch: Batch, minibatches: int, accumulate: int) -> Callable[[jax.Array], Batch]:
    """Makes the function that takes a minibatch, with its micro-batches along a leading axis if they are several."""
    if minibatches == 1:
        return lambda number: batch
    if accumulate > 1:
        batch = jax.tree.map(lambda x: x.reshape(minibatches, accumulate, *x.shape[1:]), batch)
    return lambda number: jax.tree.map(lambda x: x[number], batch)
