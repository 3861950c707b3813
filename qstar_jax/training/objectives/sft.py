"""Supervised fine-tuning: cross-entropy of the responses, averaged over their actions."""

import jax.numpy as jnp

from qstar_jax import losses
from qstar_jax.data.batches import Batch
from qstar_jax.models import LanguageModel
from qstar_jax.models.causal_lm import Params
from qstar_jax.scoring import score_policy
from qstar_jax.training.objectives.base import LossFn, Objective
from qstar_jax.training.objectives.responses import response_metrics, token_counts


def sft_objective() -> Objective:
    """The cross-entropy of one response per prompt; it reads no reference."""
    return Objective(sft_loss_fn, kind="completions")


def sft_loss_fn(model: LanguageModel) -> LossFn:
    """Makes the loss `loss_fn(params, ref_params, batch)`; `ref_params` is not used and may be None."""

    def loss_fn(params: Params, ref_params: Params | None, batch: Batch):
        scores = score_policy(model, params, batch)
        weights = batch.weights[:, None]
        tokens = (batch.num_actions * weights).sum()
        total = (losses.negative_log_likelihood(scores.logp, scores.mask) * weights).sum()
        metrics = {"loss": (total, tokens), **response_metrics(batch, ("completion",)), **token_counts(batch)}
        return total / jnp.maximum(tokens, 1), metrics

    return loss_fn
