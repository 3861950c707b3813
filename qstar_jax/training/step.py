"""One optimizer step as a pure function of (state, batch), and the state that it carries."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int

from qstar_jax.models.causal_lm import Params
from qstar_jax.models.lora import attach_adapter
from qstar_jax.training.metrics import COUNT, Metrics
from qstar_jax.training.objectives.base import LossFn, PrepareFn


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a step needs and changes. A donated state is gone after its step: keep copies, not its arrays.

    Attributes:
        step: Optimizer steps done.
        params: Trained parameters: the whole policy, or its adapter.
        opt_state: State of the optax optimizer.
        ref_params: Parameters of a live reference; None without one.
        frozen: Parameters beside an adapter; None if all are trained.
        finite: False after a step whose loss or gradient was not finite: that step and all later ones change nothing
            else.
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


TrainStep = Callable[[TrainState, Any], tuple[TrainState, Metrics]]


def with_frozen(params: Params, frozen: Params | None) -> Params:
    """Joins trained and frozen parameters; see `TrainState`."""
    return params if frozen is None else attach_adapter(frozen, params)


def first_nonfinite(tree: Params | None) -> str | None:
    """Path of the first tensor with a NaN or an infinity; None if there is none."""
    finite = jax.device_get(jax.jit(lambda tree: jax.tree.map(lambda x: jnp.isfinite(x).all(), tree))(tree))
    for path, is_finite in jax.tree_util.tree_leaves_with_path(finite):
        if not is_finite:
            return jax.tree_util.keystr(path, simple=True, separator="/")
    return None


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    prepare: PrepareFn | None = None,
    sync_every: int = 0,
    sync_mix: float = 1.0,
) -> TrainStep:
    """Makes the pure step; jit it with `donate_argnums=0`.

    Args:
        loss_fn: The objective's loss.
        optimizer: The optax transformation.
        accumulate: Micro-batches per step; above 1 the batch's arrays have them along a leading axis.
        prepare: The objective's function that micro-batches go through first, together.
        sync_every: Steps after which the reference moves towards the policy (TR-DPO, arXiv 2404.09656); 0: never.
        sync_mix: Weight of the policy in the moved reference.

    Returns:
        `train_step(state, batch) -> (state, metrics)`. Metrics are those of the parameters before the step. Sums and
        denominators are accumulated apart, so micro-batches of unequal size give the gradient of the whole batch.
    """

    def total(params: Params, state: TrainState, batch: Any):
        _, metrics = loss_fn(with_frozen(params, state.frozen), state.ref_params, batch)
        return metrics["loss"][0], metrics

    def gradient_sums(state: TrainState, batch: Any):
        grads, metrics = jax.grad(total, has_aux=True)(state.params, state, batch)
        return jax.tree.map(lambda x: x.astype(jnp.float32), grads), metrics

    def accumulated_sums(state: TrainState, batches: Any):
        if prepare is not None:
            batches = prepare(state.policy, state.ref_params, batches)
        first = jax.tree.map(lambda x: x[0], batches)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient_sums, state, first))

        def add(sums, batch):
            return jax.tree.map(jnp.add, sums, gradient_sums(state, batch)), None

        (grads, metrics), _ = jax.lax.scan(add, zeros, batches)
        # Counts are sums over a step: their denominator counts steps, not micro-batches.
        for name in [name for name in metrics if name.startswith(COUNT)]:
            metrics[name] = (metrics[name][0], metrics[name][1] / accumulate)
        return grads, metrics

    def train_step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        # The gradient of the mean loss: the gradient of its sum, over its denominator.
        grads, metrics = (gradient_sums if accumulate == 1 else accumulated_sums)(state, batch)
        denominator = jnp.maximum(metrics["loss"][1], 1.0)
        grads = jax.tree.map(lambda g, x: (g / denominator).astype(x.dtype), grads, state.params)
        norm = optax.global_norm(grads)
        metrics["grad_norm"] = (norm, jnp.ones(()))
        # The optimizer moves the policy.
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        # Every `sync_every` steps the reference follows it.
        ref_params = state.ref_params
        if sync_every:
            ref_params = jax.lax.cond(
                (state.step + 1) % sync_every == 0,
                lambda: optax.incremental_update(params, ref_params, sync_mix),
                lambda: ref_params,
            )
        # A step that is not finite is not taken, nor any later one.
        finite = state.finite & jnp.isfinite(norm) & jnp.isfinite(metrics["loss"][0])
        new = TrainState(state.step + 1, params, opt_state, ref_params, state.frozen, finite)
        old = replace(state, finite=finite)
        return jax.tree.map(lambda new, old: new if new is old else jnp.where(finite, new, old), new, old), metrics

    return train_step
