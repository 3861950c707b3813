"""Losses of single responses: labels (`kto`, `implicit_prm`) or rewards (`a_star`, `qrpo`) instead of pairs."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qstar_jax import losses
from qstar_jax.data.batches import Batch
from qstar_jax.losses.responses import response_sums
from qstar_jax.mdp import TokenScores
from qstar_jax.models import LanguageModel
from qstar_jax.models.causal_lm import Params
from qstar_jax.scoring import score_tokens
from qstar_jax.training.metrics import SQUARES, Metrics
from qstar_jax.training.objectives.base import LossFn, Objective, PrepareFn
from qstar_jax.training.objectives.responses import response_metrics, token_counts


def single_objective(loss: losses.PreferenceLoss) -> Objective:
    """The objective of a loss whose terms all judge single responses (`PreferenceLoss.reads_single`)."""
    labelled = "labels" in loss.arrays
    names = ("chosen", "completion", "reference_samples", "rejected", "accuracies")
    has_baseline = "baseline" in loss.arrays  # which is estimated from the batch
    return Objective(
        lambda model: single_loss_fn(model, loss),
        kind="labels" if labelled else "returns",
        headline=("loss", *(f"rewards/{name}" for name in names)),
        description=str(loss),
        uses_reference=True,
        couples_examples=loss.couples_rows or has_baseline,
        loss_at_reference=loss.loss_at_reference,
        beta=loss.beta,
        mismatches=has_baseline,
        prepare=share_baseline if has_baseline and not loss.couples_rows else None,
    )


def single_loss_fn(model: LanguageModel, loss: losses.PreferenceLoss) -> LossFn:
    """Makes the mean of a loss over single responses; policy and reference have the shape of `model`.

    Returns:
        `loss_fn(params, ref_params, batch)` on batches with an `outcome`, and, if the loss reads a baseline, with a
        second response that belongs to another prompt. No gradient flows into `ref_params`.
    """

    def loss_fn(params: Params, ref_params: Params | None, batch: Batch):
        scores = _score(model, params, ref_params, batch)
        own = jax.tree.map(lambda x: x[:, :1], scores)
        # What the loss reads beside them.
        outcome = {name: value[:, None] for name, value in batch.outcome.items()}
        arrays = {name: outcome[name] for name in loss.arrays & outcome.keys()}
        if (shared := batch.outcome.get("baseline")) is not None:
            arrays["baseline"] = shared[0]
        elif "baseline" in loss.arrays:
            arrays["baseline"] = losses.kto_baseline(scores.log_ratios()[:, 1], scores.mask[:, 1])
        values, record = loss(own, **arrays)
        # Sum loss and metrics over examples, by weight.
        examples = batch.weights.sum()
        metrics = {"loss": ((values * batch.weights).sum(), examples)}
        if "baseline" in arrays:
            metrics["kl"] = (arrays["baseline"] * examples, examples)
        threshold = loss.beta * arrays.get("baseline", jnp.zeros(()))
        metrics |= _metrics(record.rewards[:, 0], own, batch, threshold)
        metrics |= {**response_metrics(batch, ("completion",)), **token_counts(batch)}
        return metrics["loss"][0] / jnp.maximum(examples, 1), metrics

    return loss_fn


def share_baseline(model: LanguageModel) -> PrepareFn:
    """Makes the function that gives stacked micro-batches the baseline of them all.

    No gradient flows through it, so that the gradient of the whole batch is the sum of those of its micro-batches. It
    costs one forward pass more.

    Returns:
        `prepare(params, ref_params, batches)`, which adds `baseline` to their outcome, once per example.
    """

    def prepare(params: Params, ref_params: Params | None, batches: Batch) -> Batch:
        def score(_, batch: Batch):
            scores = _score(model, params, ref_params, batch)
            mask = scores.mask[:, 1]
            return None, (response_sums(scores.log_ratios()[:, 1], mask), mask.any(-1))

        _, (sums, present) = jax.lax.scan(score, None, batches)
        baseline = losses.kto_baseline(sums[..., None], present[..., None])
        shared = jnp.broadcast_to(baseline, batches.weights.shape)
        return replace(batches, outcome=batches.outcome | {"baseline": shared})

    return prepare


def _score(model: LanguageModel, params: Params, ref_params: Params | None, batch: Batch) -> TokenScores:
    """Scores the responses; examples that only fill up count as empty."""
    scores = score_tokens(model, params, ref_params, batch)
    return replace(scores, mask=scores.mask & (batch.weights > 0)[:, None, None])


def _metrics(rewards: Float[Array, " B"], scores: TokenScores, batch: Batch, threshold: Float[Array, ""]) -> Metrics:
    """Means of rewards, log-probabilities and lengths, of desirable and other responses apart where labels tell.

    The accuracy is the share of responses whose reward is above `threshold` exactly if they are desirable.
    """
    logps = jax.lax.stop_gradient(scores.logp).sum((1, 2))
    groups = {"completion": batch.weights}
    if labelled := "labels" in batch.outcome:
        labels = batch.outcome["labels"]
        groups = {"chosen": batch.weights * labels, "rejected": batch.weights * ~labels}
    metrics = {}
    for name, weights in groups.items():
        metrics[f"rewards/{name}"] = ((rewards * weights).sum(), weights.sum())
        metrics[f"{SQUARES}rewards/{name}"] = ((rewards**2 * weights).sum(), weights.sum())
        metrics[f"logps/{name}"] = ((logps * weights).sum(), weights.sum())
        metrics[f"lengths/{name}"] = ((batch.num_actions[:, 0] * weights).sum(), weights.sum())
    if labelled:
        correct = (rewards > threshold) == labels
        return metrics | {"rewards/accuracies": ((correct * batch.weights).sum(), batch.weights.sum())}
    returns = batch.outcome["rewards"]
    return metrics | {"returns": ((returns * batch.weights).sum(), batch.weights.sum())}
