"""What a run minimises: `loss_fn(params, ref_params, batch)`, pure, as sums and denominators.

A metric is a pair (sum, denominator), so that means over steps, batches of unequal size and devices are exact.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qstar_jax import losses, mdp
from qstar_jax.config import LossOptions
from qstar_jax.data.batches import Batch
from qstar_jax.models import CausalLM
from qstar_jax.models.causal_lm import Params
from qstar_jax.scoring import response_logprobs, score_tokens

Metrics = dict[str, tuple[Float[Array, ""], Float[Array, ""]]]
LossFn = Callable[[Params, Params | None, Batch], tuple[Float[Array, ""], Metrics]]


def sft_loss_fn(model: CausalLM) -> LossFn:
    """Makes the cross-entropy of the answers, averaged over their tokens.

    Args:
        model: The model.

    Returns:
        `loss_fn(params, ref_params, batch) -> (loss, metrics)`; `ref_params` is not used and may be None.
    """

    def loss_fn(params: Params, ref_params: Params | None, batch: Batch):
        logp, _ = response_logprobs(model, params, batch)
        weights = batch.weights[:, None]
        tokens = (batch.response_lengths * weights).sum()
        total = (losses.negative_log_likelihood(logp, batch.response_mask) * weights).sum()
        metrics = {"loss": (total, tokens), **_counts(batch)}
        return total / jnp.maximum(tokens, 1), metrics

    return loss_fn


def dpo_loss_fn(model: CausalLM, options: LossOptions) -> LossFn:
    """Makes the token-level DPO loss, averaged over pairs.

    Args:
        model: The model; policy and reference have the same shape.
        options: Temperature and label smoothing.

    Returns:
        `loss_fn(params, ref_params, batch) -> (loss, metrics)` on batches of (chosen, rejected), with metrics under
        TRL's names. No gradient flows into `ref_params`.
    """

    def loss_fn(params: Params, ref_params: Params | None, batch: Batch):
        scores = score_tokens(model, params, ref_params, batch)
        ratios = mdp.log_ratios(scores.logp, scores.ref_logp, batch.response_mask)
        loss = losses.dpo(
            ratios[:, 0],
            ratios[:, 1],
            batch.response_mask[:, 0],
            batch.response_mask[:, 1],
            beta=options.beta,
            label_smoothing=options.label_smoothing,
        )
        pairs = batch.weights.sum()
        rewards = options.beta * jax.lax.stop_gradient(ratios).sum(-1)
        logps = jax.lax.stop_gradient(scores.logp).sum(-1)
        values = {
            "loss": loss,
            "rewards/chosen": rewards[:, 0],
            "rewards/rejected": rewards[:, 1],
            "rewards/margins": rewards[:, 0] - rewards[:, 1],
            "rewards/accuracies": (rewards[:, 0] > rewards[:, 1]).astype(jnp.float32),
            "logps/chosen": logps[:, 0],
            "logps/rejected": logps[:, 1],
        }
        metrics = {name: ((value * batch.weights).sum(), pairs) for name, value in values.items()}
        return metrics["loss"][0] / jnp.maximum(pairs, 1), {**metrics, **_counts(batch)}

    return loss_fn


def _counts(batch: Batch) -> Metrics:
    """Sizes that throughput is computed from; a denominator of 1 makes them sums."""
    one = jnp.ones(())
    responses = batch.tokens.shape[1]
    scored = (batch.response_lengths * batch.weights[:, None]).sum()
    prompts = (batch.prompt_lengths * batch.weights).sum() * responses
    return {"count/tokens": (prompts + scored, one), "count/scored_tokens": (scored, one)}
