"""What a training of a pipeline measures on the way: rewards of held-out rows, and runs of its own."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from qstar_jax.data.feeder import Track
from qstar_jax.errors import InputError
from qstar_jax.pipeline.arms import Meter
from qstar_jax.pipeline.plan import PipelinePlan
from qstar_jax.pipeline.rows import PairFeeder, PairRow, pad_to_multiple
from qstar_jax.pipeline.stage import Outputs
from qstar_jax.pipeline.start import Opened
from qstar_jax.training.evaluator import Evaluator
from qstar_jax.training.objectives import LossFn

Evaluate = Callable[[dict[str, Any], Any], dict[str, float]]


def make_evaluators(
    plan: PipelinePlan,
    opened: Opened,
    loss_fn: LossFn,
    rows: Sequence[PairRow],
    examples: Sequence[Any],
    mesh: Mesh,
    track: Track,
) -> list[Evaluate]:
    """Makes the evaluators of a run.

    Args:
        plan: The run.
        opened: Its models.
        loss_fn: The loss of the pipeline.
        rows: Held-out rows.
        examples: Their examples (see `rows.row_examples`).
        mesh: Devices.
        track: `(batches, description, total)` wraps batches, for a progress bar.
    """
    config = plan.config
    size = config.train.eval_batch_size or config.train.batch_size
    feeder = PairFeeder(examples, config.data.eval, size, mesh, config.data.layout, "train.eval_batch_size")
    evaluators: list[Evaluate] = [Evaluator(feeder, jax.jit(lambda *args: loss_fn(*args)[1]), track=track)]
    if config.samples.eval_prompts:
        evaluators.append(_sampler(plan, opened, rows, mesh))
    return evaluators


def _sampler(plan: PipelinePlan, opened: Opened, rows: Sequence[PairRow], mesh: Mesh) -> Evaluate:
    """Makes the evaluator that runs the pipeline: KL of each stage, and the true reward if a task knows it."""
    samples, shards = plan.config.samples, mesh.shape["data"] * mesh.shape["fsdp"]
    prompts = list(dict.fromkeys(row.prompt for row in rows))[: samples.eval_prompts]
    size = -(-min(samples.batch_size, len(prompts)) // shards) * shards
    # A short last batch is filled up with its last prompt, so a few count more than once.
    batches = [pad_to_multiple(prompts[i : i + size], size) for i in range(0, len(prompts), size)]
    last = opened.stages[-1]

    def true_reward(prompt: Sequence[str], outputs: Outputs) -> np.ndarray:
        if plan.task is None:
            return np.zeros(len(prompt))
        return np.array([reward_of(plan, one, text) for one, text in zip(prompt, last.read(outputs[-1]), strict=True)])

    meter = Meter(opened.of, batches, true_reward, jax.random.key(samples.seed))

    def evaluate(params: dict[str, Any], ref_params: Any) -> dict[str, float]:
        # A stage that is not trained is its own reference.
        point = meter({**opened.fixed, **params}, {**opened.fixed, **(ref_params or {})})
        kl = {f"eval_{stage.name}/kl": value for stage, value in zip(opened.stages, point.kl, strict=True)}
        reward = {} if plan.task is None else {"eval_reward": point.reward}
        return {**kl, "eval_kl": point.total_kl, **reward}

    return evaluate


def reward_of(plan: PipelinePlan, prompt: str, text: str) -> float:
    """Returns the true reward of the last text.

    Raises:
        InputError: If the prompt is not one of the task, or the reward not finite.
    """
    reward = plan.task.true_reward(prompt, text)
    if reward is None:
        raise InputError(f"--task {plan.config.task} does not know the prompt {prompt[-200:]!r}; use its own prompts")
    if not math.isfinite(reward):
        raise InputError(
            f"--task {plan.config.task}: the true reward of {text[:200]!r} to the prompt {prompt[-200:]!r} is "
            f"{reward}; expected a finite number: correct the task"
        )
    return reward
