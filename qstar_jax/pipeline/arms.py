"""Arms of an ablation: the same pairs, several losses, and on the way what they earn and how far they move."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from qstar_jax.config import TrainOptions
from qstar_jax.pipeline.objective import Compare, StagesOf, pipeline_loss_fn
from qstar_jax.pipeline.stage import Outputs, sample, stage_rewards
from qstar_jax.training.loop import Loop
from qstar_jax.training.source import Source
from qstar_jax.training.step import TrainState, make_train_step

TrueReward = Callable[[Any, Outputs], Float[np.ndarray, " B"]]  # (prompts, outputs of all stages) -> rewards


@dataclass(frozen=True)
class Point:
    """What a pipeline earned and how far it was from its reference, over samples of its own.

    Attributes:
        step: Optimizer steps before it.
        reward: Mean true reward.
        kl: KL(pi || pi_ref) of each stage in nats, with earlier outputs sampled from pi; their sum is that of the whole
            pipeline.
        outputs: What was sampled.
        reward_error: Standard error of `reward`.
    """

    step: int
    reward: float
    kl: tuple[float, ...]
    outputs: tuple[Outputs, ...] = ()
    reward_error: float = 0.0

    @property
    def total_kl(self) -> float:
        """KL of the whole pipeline, in nats."""
        return sum(self.kl)


@dataclass(frozen=True)
class Meter:
    """Measures a pipeline on samples of its own, always with the same keys.

    Attributes:
        stages_of: Makes the stages from the references' parameters.
        prompts: Batches of prompts.
        true_reward: (prompts, outputs of all stages) -> rewards.
        key: Random key.
        keeps_outputs: Whether points keep what was sampled.
    """

    stages_of: StagesOf
    prompts: Sequence[Any]
    true_reward: TrueReward
    key: jax.Array
    keeps_outputs: bool = False

    def __call__(self, params: Mapping[str, Any], ref_params: Any, step: int = 0) -> Point:
        """Measures parameters, by stage."""
        stages = self.stages_of(ref_params)
        unit, own = [replace(stage, beta=1.0) for stage in stages], [params[stage.name] for stage in stages]
        rewards, log_ratios, kept = [], [], []
        for number, prompt in enumerate(self.prompts):
            outputs = sample(stages, own, jax.random.fold_in(self.key, number), prompt)
            rewards.append(np.asarray(self.true_reward(prompt, outputs), np.float64))
            log_ratios.append(np.asarray(stage_rewards(unit, own, prompt, outputs), np.float64))
            kept.append(outputs)
        kl, earned = np.concatenate(log_ratios).mean(0), np.concatenate(rewards)
        outputs = tuple(kept) if self.keeps_outputs else ()
        error = float(earned.std(ddof=1) / np.sqrt(len(earned))) if len(earned) > 1 else 0.0
        return Point(step, float(earned.mean()), tuple(kl.tolist()), outputs, error)


def train_arm(
    meter: Meter,
    params: Mapping[str, Any],
    ref_params: Any,
    source: Source,
    arm: tuple[Compare, Sequence[str]],
    *,
    optimizer: optax.GradientTransformation,
    steps: int,
    measure_every: int,
    accumulate: int = 1,
) -> tuple[dict[str, Any], list[Point]]:
    """Trains a pipeline by one of `make_arms`, from its reference, and measures it on the way.

    Args:
        meter: Measures it.
        params: Parameters of every stage to begin with, by name; they are not consumed.
        ref_params: Passed to `meter.stages_of`.
        source: Makes a `PreferenceBatch` for each step.
        arm: The loss, and the stages that are trained.
        optimizer: The optax transformation.
        steps: Optimizer steps.
        measure_every: Steps between measurements.
        accumulate: Micro-batches per step, along a leading axis of the source's batches.

    Returns:
        Parameters at the end, by stage, and the curve: a point before the first step, and after every interval.
    """
    compare, trained = arm
    own = {name: jax.tree.map(jnp.copy, params[name]) for name in trained}
    state = TrainState(jnp.int32(0), own, optimizer.init(own), ref_params, finite=jnp.bool(True))
    curve: list[Point] = []

    def measure(moved: Mapping[str, Any], _: Any) -> dict[str, float]:
        curve.append(meter({**params, **moved}, ref_params, step=len(curve) * measure_every))
        return {"reward": curve[-1].reward, "kl": curve[-1].total_kl}

    step = make_train_step(pipeline_loss_fn(meter.stages_of, compare), optimizer, accumulate=accumulate)
    loop = Loop(
        options=TrainOptions(log_every=0, eval_every=measure_every),
        steps=steps,
        train_step=jax.jit(step),
        source=source,
        evaluators=[measure],
    )
    state, _ = loop.run(state)
    curve[-1] = replace(curve[-1], step=steps)
    return {**params, **state.params}, curve
