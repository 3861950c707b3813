"""One optimizer step as a pure function of (state, batch), and the state that it carries."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from qstar_jax.config import OptimizerOptions
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


def learning_rate_schedule(options: OptimizerOptions, steps: int) -> optax.Schedule:
    """Linear warm-up, then the chosen schedule down to 0 at the end of the run.

    Args:
        options: Peak rate, warm-up and kind.
        steps: Length of the run.

    Returns:
        Rate as a function of the number of steps done.
    """
    peak, warmup = options.learning_rate, options.warmup_steps
    after = max(steps - warmup, 1)
    decay = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, after),
        "cosine": optax.cosine_decay_schedule(peak, after),
    }[options.schedule]
    # The first of W warm-up steps already has rate peak / W: a step at rate 0 would be wasted.
    return optax.join_schedules(
        [optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1)), decay], [warmup]
    )


def make_optimizer(options: OptimizerOptions, steps: int) -> optax.GradientTransformation:
    """Builds AdamW behind global-norm clipping.

    Args:
        options: Its options.
        steps: Length of the run, for the schedule.

    Returns:
        The optax transformation.
    """
    adamw = optax.adamw(
        learning_rate_schedule(options, steps),
        b1=options.beta1,
        b2=options.beta2,
        eps=options.eps,
        weight_decay=options.weight_decay,
        mask=_is_matrix,
    )
    if options.max_grad_norm == 0:
        return adamw
    return optax.chain(optax.clip_by_global_norm(options.max_grad_norm), adamw)


def _is_matrix(params: Params):
    return jax.tree_util.tree_map_with_path(lambda path, _: "norm" not in jax.tree_util.keystr(path), params)


def make_train_step(
    loss_fn: LossFn, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Makes the pure step; jit it with `donate_argnums=0`.

    Args:
        loss_fn: The objective.
        optimizer: The optax transformation.

    Returns:
        `train_step(state, batch) -> (state, metrics)`. Metrics are of the parameters before the step.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        (_, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, state.ref_params, batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics["grad_norm"] = (optax.global_norm(grads), jnp.ones(()))
        return TrainState(state.step + 1, params, opt_state, state.ref_params), metrics

    return train_step
