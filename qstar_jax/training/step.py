"""One optimizer step as a pure function of (state, batch), and the state that it carries."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from qstar_jax.data.batches import Batch
from qstar_jax.models.causal_lm import Params
from qstar_jax.training.objectives import LossFn, Metrics


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a step needs and changes.

    Attributes:
        step: Optimizer steps done.
        params: Parameters of the policy.
        opt_state: State of the optax optimizer.
        ref_params: Parameters of the frozen reference; None where the objective has none.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: optax.OptState
    ref_params: Params | None = None


def make_train_step(
    loss_fn: LossFn, optimizer: optax.GradientTransformation, *, accumulate: int = 1
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Makes the pure step; jit it with `donate_argnums=0`.

    Args:
        loss_fn: The objective.
        optimizer: The optax transformation.
        accumulate: Micro-batches a step; above 1 the batch's arrays have them along a leading axis.

    Returns:
        `train_step(state, batch) -> (state, metrics)`. Metrics are of the parameters before the step. Sums and
        denominators are accumulated apart, so micro-batches of unequal size give the gradient of the whole batch.
    """

    def total(params: Params, ref_params: Params | None, batch: Batch):
        _, metrics = loss_fn(params, ref_params, batch)
        return metrics["loss"][0], metrics

    def gradient_sums(state: TrainState, batch: Batch):
        grads, metrics = jax.grad(total, has_aux=True)(state.params, state.ref_params, batch)
        return jax.tree.map(lambda x: x.astype(jnp.float32), grads), metrics

    def accumulated(state: TrainState, batches: Batch):
        first = jax.tree.map(lambda x: x[0], batches)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient_sums, state, first))

        def add(sums, batch):
            return jax.tree.map(jnp.add, sums, gradient_sums(state, batch)), None

        (grads, metrics), _ = jax.lax.scan(add, zeros, batches)
        # Counts are sums over a step: their denominator counts steps, not micro-batches.
        for name in [name for name in metrics if name.startswith("count/")]:
            metrics[name] = (metrics[name][0], metrics[name][1] / accumulate)
        return grads, metrics

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        grads, metrics = (gradient_sums if accumulate == 1 else accumulated)(state, batch)
        denominator = jnp.maximum(metrics["loss"][1], 1.0)
        grads = jax.tree.map(lambda g, x: (g / denominator).astype(x.dtype), grads, state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics["grad_norm"] = (optax.global_norm(grads), jnp.ones(()))
        return TrainState(state.step + 1, params, opt_state, state.ref_params), metrics

    return train_step
