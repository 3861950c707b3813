"""The state of a pipeline in training: dictionaries by stage, while on disk every stage has checkpoints of its own."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import optax

from qstar_jax.pipeline.plan import PipelinePlan
from qstar_jax.store.checkpoint_store import CheckpointStore
from qstar_jax.store.checkpoints import Description
from qstar_jax.training.metrics import Metrics
from qstar_jax.training.setup import saved_arrays
from qstar_jax.training.step import TrainState


def by_stage(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Makes an optimizer of a dictionary of parameters: one for each entry, with a state and a norm of its own."""

    def init(params: dict[str, Any]) -> dict[str, Any]:
        return {name: optimizer.init(own) for name, own in params.items()}

    def update(grads: dict[str, Any], state: dict[str, Any], params: dict[str, Any] | None = None):
        pairs = {name: optimizer.update(grads[name], state[name], params and params[name]) for name in grads}
        return tuple({name: pair[i] for name, pair in pairs.items()} for i in (0, 1))

    return optax.GradientTransformation(init, update)


def join_states(states: Mapping[str, TrainState]) -> TrainState:
    """Makes one state of those of all stages."""

    def part(name: str) -> dict[str, Any] | None:
        parts = {stage: getattr(state, name) for stage, state in states.items()}
        return {stage: value for stage, value in parts.items() if value is not None} or None

    first = next(iter(states.values()))
    parts = {name: part(name) for name in ("params", "opt_state", "ref_params", "frozen")}
    return TrainState(step=first.step, finite=first.finite, **parts)


def save_stages(
    plan: PipelinePlan,
    stores: Mapping[str, CheckpointStore],
    descriptions: Mapping[str, Description],
    state: TrainState,
    step: int,
    window: Sequence[Metrics],
):
    """Writes a checkpoint of each trained stage.

    A stage that has this step already, because the run was interrupted before all had it, keeps it: resuming repeats
    steps exactly.

    Args:
        plan: The run.
        stores: Where to, by stage.
        descriptions: What is stored with the arrays, by stage.
        state: The joint state.
        step: Its step.
        window: Metrics of steps that are not logged yet; every stage has them all.
    """
    pending = [{name: [float(x) for x in pair] for name, pair in metrics.items()} for metrics in jax.device_get(window)]
    for name, run in plan.runs.items():
        own = TrainState(state.step, state.params[name], state.opt_state[name])
        stores[name].save(step, saved_arrays(run, own), replace(descriptions[name], window=pending))
