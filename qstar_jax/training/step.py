"""One optimizer step as a pure function of (state, batch), and the state that it carries."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int

from qstar_jax.data.batches import Batch
from qstar_jax.models.causal_lm import Params
from qstar_jax.models.lora import attach_adapter
from qstar_jax.training.metrics import Metrics
from qstar_jax.training.objectives import LossFn


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a step needs and changes.

    Attributes:
        step: Optimizer steps done.
        params: Parameters that are trained: the whole policy, or its adapter.
        opt_state: State of the optax optimizer.
        ref_params: Parameters of a live reference; None where there is none.
        frozen: Parameters beside an adapter; None where all are trained.
        finite: False after a step whose loss or gradient was not finite: that step and all later ones change nothing,
            so the rest is what it was before.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: optax.OptState
    ref_params: Params | None = None
    frozen: Params | None = None
    finite: Bool[Array, ""] | bool = True

    @property
    def policy(self) -> Params:
        """All parameters of the policy."""
        return with_frozen(self.params, self.frozen)


def with_frozen(params: Params, frozen: Params | None) -> Params:
    """Puts trained and frozen parameters together; see `TrainState`."""
    return params if frozen is None else attach_adapter(frozen, params)


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    sync_every: int = 0,
    sync_mix: float = 1.0,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Makes the pure step; jit it with `donate_argnums=0`.

    Args:
        loss_fn: The objective.
        optimizer: The optax transformation.
        accumulate: Micro-batches a step; above 1 the batch's arrays have them along a leading axis.
        sync_every: Steps after which the reference moves towards the policy (TR-DPO, arXiv 2404.09656); 0: never.
        sync_mix: Weight of the policy in the moved reference.

    Returns:
        `train_step(state, batch) -> (state, metrics)`. Metrics are of the parameters before the step. Sums and
        denominators are accumulated apart, so micro-batches of unequal size give the gradient of the whole batch.
    """

    def total(params: Params, state: TrainState, batch: Batch):
        _, metrics = loss_fn(with_frozen(params, state.frozen), state.ref_params, batch)
        return metrics["loss"][0], metrics

    def gradient_sums(state: TrainState, batch: Batch):
        grads, metrics = jax.grad(total, has_aux=True)(state.params, state, batch)
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
        norm = optax.global_norm(grads)
        metrics["grad_norm"] = (norm, jnp.ones(()))
        ref_params = state.ref_params
        if sync_every:
            ref_params = jax.lax.cond(
                (state.step + 1) % sync_every == 0,
                lambda: optax.incremental_update(params, ref_params, sync_mix),
                lambda: ref_params,
            )
        finite = state.finite & jnp.isfinite(norm) & jnp.isfinite(metrics["loss"][0])
        new = TrainState(state.step + 1, params, opt_state, ref_params, state.frozen, finite)
        old = replace(state, finite=finite)
        return jax.tree.map(lambda new, old: new if new is old else jnp.where(finite, new, old), new, old), metrics

    return train_step
