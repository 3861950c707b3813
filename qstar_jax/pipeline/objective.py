"""The loss of a pipeline as the trainer reads it, and the arms of an ablation: what else one could do with the pairs.

All arms are functions of the stages' rewards of both runs, [B, 2, stages], chosen first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qstar_jax import losses
from qstar_jax.errors import InputError
from qstar_jax.pipeline.stage import Outputs, Stage, pair_rewards
from qstar_jax.training.metrics import Metrics
from qstar_jax.training.objectives import LossFn

# Parameters of the references, by name (None where stages hold them) -> the stages.
StagesOf = Callable[[Any], Sequence[Stage]]
# (rewards, betas [stages]) -> loss of each pair.
Compare = Callable[[Float[Array, "B 2 S"], Float[Array, " S"]], Float[Array, " B"]]

_SAME = 1e-5  # nats: outputs whose log-ratios differ by less are the same but for rounding


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PreferenceBatch:
    """Pairs of runs of a pipeline to the same prompts.

    Attributes:
        prompt: Prompts, a pytree with a leading axis B; None where the outputs hold what stages read of them.
        chosen: Outputs of all stages in the preferred run.
        rejected: Outputs of all stages in the other run.
        weights: 1, or 0 for pairs that only fill up the batch. Shape [B].
    """

    prompt: Any
    chosen: Outputs
    rejected: Outputs
    weights: Float[Array, " B"]


def joint(rewards: Float[Array, "B 2 S"], betas: Float[Array, " S"]) -> Float[Array, " B"]:
    """One sigmoid of the sum of all stages' margins (Eq. 18)."""
    return losses.sigmoid(rewards, jnp.ones(rewards.shape, bool), beta=1.0)[0]


def separate(rewards: Float[Array, "B 2 S"], betas: Float[Array, " S"]) -> Float[Array, " B"]:
    """A DPO loss of each stage on the same labels: each is told that its own part of the chosen run was better."""
    return -jax.nn.log_sigmoid(rewards[:, 0] - rewards[:, 1]).sum(-1)


def winners(rewards: Float[Array, "B 2 S"], betas: Float[Array, " S"]) -> Float[Array, " B"]:
    """Fine-tuning on chosen runs: the negative log-likelihood of their outputs, relative to the reference, in nats."""
    return -(rewards[:, 0] / betas).sum(-1)


def make_arms(names: Sequence[str]) -> dict[str, tuple[Compare, tuple[str, ...]]]:
    """Lists the arms of an ablation, for stages of these names.

    Returns:
        Name of the arm -> its loss, and the stages that it trains; the others stay their references.
    """
    every = tuple(names)
    alone = {f"only {name}": (joint, (name,)) for name in names}
    return {"joint": (joint, every), **alone, "separate": (separate, every), "winners": (winners, every)}


def pipeline_loss_fn(stages_of: StagesOf, compare: Compare = joint) -> LossFn:
    """Makes the mean loss of a pipeline over pairs.

    Args:
        stages_of: Makes the stages from the references' parameters.
        compare: The loss of each pair.

    Returns:
        `loss_fn(params, ref_params, batch)` on a `PreferenceBatch`. Parameters are a dictionary by stage; stages that
        are not in it are not trained. Metrics have TRL's names, for the whole pipeline and, behind `STAGE/`, for each
        trained stage, whose accuracy counts only pairs in which its outputs differ.
    """

    def loss_fn(params: dict[str, Any], ref_params: Any, batch: PreferenceBatch):
        stages = stages_of(ref_params)
        if unknown := params.keys() - {stage.name for stage in stages}:
            raise InputError(f"parameters of {', '.join(sorted(unknown))}, which are no stages of the pipeline")
        trained = [params.get(stage.name) for stage in stages]
        rewards = pair_rewards(stages, trained, batch.prompt, batch.chosen, batch.rejected)
        betas = jnp.array([stage.beta for stage in stages], rewards.dtype)
        values, pairs = compare(rewards, betas), batch.weights.sum()
        metrics = {"loss": ((values * batch.weights).sum(), pairs)}
        metrics |= _metrics("", rewards.sum(-1), batch.weights, counted=batch.weights)
        for place, stage in enumerate(stages):
            if stage.name in params:
                own = rewards[..., place]
                differs = jnp.abs(own[:, 0] - own[:, 1]) > _SAME * stage.beta
                metrics |= _metrics(f"{stage.name}/", own, batch.weights, counted=differs * batch.weights)
        return metrics["loss"][0] / jnp.maximum(pairs, 1), metrics

    return loss_fn


def _metrics(
    prefix: str, rewards: Float[Array, "B 2"], weights: Float[Array, " B"], *, counted: Float[Array, " B"]
) -> Metrics:
    rewards = jax.lax.stop_gradient(rewards)
    margins = rewards[:, 0] - rewards[:, 1]
    values = {"chosen": rewards[:, 0], "rejected": rewards[:, 1], "margins": margins}
    metrics = {f"{prefix}rewards/{name}": ((value * weights).sum(), weights.sum()) for name, value in values.items()}
    return metrics | {f"{prefix}rewards/accuracies": (((margins > 0) * counted).sum(), counted.sum())}
