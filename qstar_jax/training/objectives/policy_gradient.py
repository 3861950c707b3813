"""Policy gradients: REINFORCE and PPO's clipped ratio, on samples that carry their advantages."""

import jax
import jax.numpy as jnp

from qstar_jax import losses
from qstar_jax.config import RlOptions
from qstar_jax.data.batches import Batch
from qstar_jax.models import LanguageModel
from qstar_jax.models.causal_lm import Params
from qstar_jax.scoring import score_policy
from qstar_jax.training.metrics import SQUARES, Metrics
from qstar_jax.training.objectives.base import LossFn, Objective
from qstar_jax.training.objectives.responses import token_counts


def policy_gradient_objective(
    options: RlOptions, score_weight: float | None = 1.0, *, has_guide: bool = False
) -> Objective:
    """The objective of `qstar rl`: the expected reward, less `kl_coef` per nat from the reference.

    Args:
        options: Variants filled in.
        score_weight: Weight of the score in the rewards of a response, for metrics; None: there is no score.
        has_guide: Whether its tokens have rewards of their own.
    """
    names = ("scores", "rlhf_reward", "kl")
    return Objective(
        lambda model: policy_gradient_loss_fn(model, options, score_weight, has_guide=has_guide),
        kind="prompts",
        headline=tuple(f"objective/{name}" for name in names),
        description=_describe(options),
        uses_reference=options.kl_coef > 0,
        beta=options.kl_coef or None,
    )


def _describe(options: RlOptions) -> str:
    shown = f"{options.algorithm}, {options.samples_per_prompt} samples per prompt, kl_coef {options.kl_coef:g}"
    if options.algorithm == "ppo":
        passes = f"{options.inner_epochs} x {options.minibatches} updates per step"
        shown += f", clip_ratio {options.clip_ratio:g}, {passes}"
    return shown


def policy_gradient_loss_fn(
    model: LanguageModel, options: RlOptions, score_weight: float | None = 1.0, *, has_guide: bool = False
) -> LossFn:
    """Makes the policy-gradient loss: summed over the tokens of a sample, averaged over samples.

    Returns:
        `loss_fn(params, ref_params, batch)` on batches whose `outcome` has `logp`, `scores`, `rewards` and `advantages`
        (see `training.rl.rewards`); `ref_params` is not used, as `ref_logp` is in the batch.
    """

    def loss_fn(params: Params, ref_params: Params | None, batch: Batch):
        scores, outcome = score_policy(model, params, batch, temperature=options.temperature), batch.outcome
        weights = jnp.broadcast_to(batch.weights[:, None], scores.mask.shape[:2])
        # The loss of each token.
        clipped = jnp.zeros_like(scores.mask)
        if options.algorithm == "ppo":
            clip = {"clip_low": options.clip_ratio, "clip_high": options.clip_ratio}
            token_losses, clipped = losses.clipped_surrogate(
                scores.logp, outcome["logp"], outcome["advantages"], scores.mask, **clip
            )
        else:
            token_losses = losses.reinforce(scores.logp, outcome["advantages"], scores.mask)
        # Sum it and the metrics over samples, by weight.
        samples = weights.sum()
        metrics = {"loss": ((token_losses.sum(-1) * weights).sum(), samples)}
        change = jnp.where(scores.mask, jax.lax.stop_gradient(scores.logp) - outcome["logp"], 0.0)
        actions = (scores.mask * weights[..., None]).sum()
        of_tokens = {"approxkl_avg": 0.5 * change**2, "clipfrac_avg": clipped.astype(jnp.float32)}
        for name, values in of_tokens.items():
            metrics[f"policy/{name}"] = ((values * scores.mask * weights[..., None]).sum(), actions)
        metrics["val/ratio"] = ((jnp.exp(change) * scores.mask * weights[..., None]).sum(), actions)
        metrics |= sample_metrics(batch, options.kl_coef, score_weight, has_guide=has_guide) | token_counts(batch)
        return metrics["loss"][0] / jnp.maximum(samples, 1), metrics

    return loss_fn


def sample_metrics(
    batch: Batch, kl_coef: float, score_weight: float | None = 1.0, *, has_guide: bool = False
) -> Metrics:
    """What samples earn and what they are, under TRL's names; means over samples.

    `objective/scores` is the score before it is weighted, `objective/kl` the log-ratio to the reference summed over a
    response, `objective/non_score_reward` its price, `objective/token_reward` what a guide gives,
    `objective/rlhf_reward` the sum of all, and `objective/entropy` -log pi of the response. `frac_reward_zero_std` is
    the share of prompts whose samples, if they are several, all earn the same, so that rewards teach nothing there.

    References:
        huggingface/trl, PPOTrainer, RLOOTrainer and GRPOTrainer, "Explanation of the logged metrics", "Logged metrics".
    """
    outcome = batch.outcome
    logp = outcome["logp"].sum(-1)
    values = {
        "objective/entropy": -logp,
        "lengths/completion": batch.num_actions,
        "truncated/completion": batch.truncated,
    }
    reward = outcome["rewards"].sum(-1)
    if reward.shape[-1] > 1:
        values["frac_reward_zero_std"] = jnp.broadcast_to(jnp.ptp(reward, axis=-1, keepdims=True) == 0, reward.shape)
    if score_weight is not None:
        values["objective/scores"] = outcome["scores"]
        values[f"{SQUARES}objective/scores"] = outcome["scores"] ** 2
    if has_guide:
        values["objective/token_reward"] = reward - (1.0 if score_weight is None else score_weight) * outcome["scores"]
    if batch.ref_logp is not None:
        values["objective/kl"] = logp - batch.ref_logp.sum(-1)
        values["objective/non_score_reward"] = -kl_coef * values["objective/kl"]
        reward += values["objective/non_score_reward"]
    values["objective/rlhf_reward"] = reward
    values[f"{SQUARES}objective/rlhf_reward"] = reward**2
    weights = jnp.broadcast_to(batch.weights[:, None], logp.shape)
    return {name: ((value * weights).sum(), weights.sum()) for name, value in values.items()}
