"""Stages of a pipeline, and the loss that trains them from preferences between what comes out at its end.

A stage sees the prompt and the outputs of the stages before it, and samples its own output, any pytree: tokens, a
trajectory of continuous states. All that training asks is how much more likely its policy makes an output than its
reference does. No gradient flows through outputs: they were sampled, and each model answers for its own part.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from qstar_jax import losses
from qstar_jax.errors import InputError

Outputs = Sequence[Any]  # of the stages, in their order


@dataclass(frozen=True)
class Stage:
    """One model of a pipeline.

    Attributes:
        name: Its name, for records and errors.
        log_ratio: (params, prompt, outputs before it, output) -> log pi / pi_ref of the output, in nats, summed over
            its own actions. Shape [B].
        sample: (params, key, prompt, outputs before it) -> output, one per prompt.
        beta: Temperature: reward per nat. Stages may differ, as beta and gamma of Eq. 17; equal ones price a nat of
            divergence alike everywhere.
    """

    name: str
    log_ratio: Callable[[Any, Any, Outputs, Any], Float[Array, " B"]]
    sample: Callable[[Any, PRNGKeyArray, Any, Outputs], Any]
    beta: float = 0.1


def sample(stages: Sequence[Stage], params: Sequence[Any], key: PRNGKeyArray, prompt: Any) -> tuple[Any, ...]:
    """Runs the pipeline: each stage samples given the prompt and what came before.

    Args:
        stages: The stages.
        params: Parameters of each.
        key: Random key.
        prompt: Prompts, a pytree with a leading axis B.

    Returns:
        Outputs of all stages; users see the last one.

    Raises:
        InputError: If there are not as many parameters as stages.
    """
    _check(stages, params=params)
    outputs: tuple[Any, ...] = ()
    for stage, own, stage_key in zip(stages, params, jax.random.split(key, len(stages)), strict=True):
        outputs = (*outputs, stage.sample(own, stage_key, prompt, outputs))
    return outputs


def stage_rewards(
    stages: Sequence[Stage], params: Sequence[Any], prompt: Any, outputs: Outputs
) -> Float[Array, "B stages"]:
    """Splits the implicit return of a run of the pipeline among its stages: which model is to blame.

    Args:
        stages: The stages.
        params: Parameters of each; None for a stage that is its reference, whose log-ratio is 0 and is not computed.
        prompt: Prompts, a pytree with a leading axis B.
        outputs: Outputs of all stages.

    Returns:
        beta * log-ratio of each stage; their sum is the implicit return (Eq. 17). Shape [B, stages].

    Raises:
        InputError: If there are not as many parameters, or outputs, as stages, or none has parameters.
    """
    _check(stages, params=params, outputs=outputs)
    outputs = jax.lax.stop_gradient(tuple(outputs))
    rewards = [
        None if own is None else stage.beta * stage.log_ratio(own, prompt, outputs[:place], outputs[place])
        for place, (stage, own) in enumerate(zip(stages, params, strict=True))
    ]
    first = next((reward for reward in rewards if reward is not None), None)
    if first is None:
        raise InputError("no stage has parameters: expected those of at least one, as all others stay their reference")
    return jnp.stack([jnp.zeros_like(first) if reward is None else reward for reward in rewards], axis=-1)


def pair_rewards(
    stages: Sequence[Stage], params: Sequence[Any], prompt: Any, chosen: Outputs, rejected: Outputs
) -> Float[Array, "B 2 stages"]:
    """Splits the implicit returns of both runs of each pair among the stages; see `stage_rewards`."""
    return jnp.stack([stage_rewards(stages, params, prompt, outputs) for outputs in (chosen, rejected)], axis=-2)


def joint_loss(
    stages: Sequence[Stage], params: Sequence[Any], prompt: Any, chosen: Outputs, rejected: Outputs
) -> tuple[Float[Array, " B"], losses.LossMetrics]:
    """Preference loss of a whole pipeline: one label of its last output trains all stages.

    -log sigma(sum of the stages' rewards, chosen less rejected). Where a stage's output is the same in both, its
    margin is 0, and the others learn.

    Args:
        stages: The stages.
        params: Parameters of each; None for stages that are not trained.
        prompt: Prompts, which both share. A pytree with a leading axis B.
        chosen: Outputs of all stages in the preferred run.
        rejected: Outputs of all stages in the other run.

    Returns:
        Loss of each pair, in nats, shape [B], and its metrics.

    Raises:
        InputError: See `stage_rewards`.

    References:
        arXiv 2404.12358, Eq. 17 and 18.
    """
    rewards = pair_rewards(stages, params, prompt, chosen, rejected)
    # A stage is to the pipeline what a token is to a response.
    return losses.sigmoid(rewards, jnp.ones(rewards.shape, bool), beta=1.0)


def _check(stages: Sequence[Stage], **others: Sequence[Any]):
    for name, values in others.items():
        if len(values) != len(stages):
            names = ", ".join(stage.name for stage in stages)
            raise InputError(f"{len(values)} {name} for {len(stages)} stages ({names}): expected one of each stage")
