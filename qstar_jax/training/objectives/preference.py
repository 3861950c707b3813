"""Token-level preference losses, on pairs and on rankings of R responses.

One file serves both: a pair is a ranking of two, and batches, scores, losses and metrics are the same for any R.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qstar_jax import losses
from qstar_jax.data.batches import Batch
from qstar_jax.errors import InputError
from qstar_jax.models import CausalLM
from qstar_jax.models.causal_lm import Params
from qstar_jax.scoring import score_policy, score_tokens
from qstar_jax.training.metrics import SQUARES
from qstar_jax.training.objectives.base import LossFn, Objective
from qstar_jax.training.objectives.responses import response_metrics, token_counts


def preference_objective(loss: losses.PreferenceLoss) -> Objective:
    """The objective of a preference loss (see `losses.make_loss`); its `loss_at_reference` is that of pairs.

    Raises:
        InputError: If the loss reads arrays that a training batch does not have.
    """
    if loss.extra_arrays:
        raise InputError(
            f"loss.name {loss} needs {', '.join(sorted(loss.extra_arrays))}, which a batch of pairs does not have; "
            "call it from a training loop of your own (qstar_jax.losses), or choose another loss"
        )
    return Objective(
        lambda model: preference_loss_fn(model, loss),
        kind="preferences",
        headline=("loss", *(f"rewards/{name}" for name in ("chosen", "reference_samples", "margins", "accuracies"))),
        description=f"{loss} (plackett_luce is sigmoid on pairs)" if "plackett_luce" in loss.terms else str(loss),
        uses_reference=loss.uses_reference,
        couples_examples=loss.couples_rows,
        loss_at_reference=loss.loss_at_reference,
        beta=loss.beta,
    )


def preference_loss_fn(model: CausalLM, loss: losses.PreferenceLoss) -> LossFn:
    """Makes the mean of a preference loss over examples; policy and reference have the shape of `model`.

    Returns:
        `loss_fn(params, ref_params, batch)` on batches of R responses, best first; metrics have TRL's names. No
        gradient flows into `ref_params`, which may be None if the loss has no reference.
    """

    def loss_fn(params: Params, ref_params: Params | None, batch: Batch):
        # Score the responses; examples that only fill up count as empty, for losses that look at the whole batch.
        if loss.uses_reference:
            scores = score_tokens(model, params, ref_params, batch)
        else:
            scores = score_policy(model, params, batch)
        scores = replace(scores, mask=scores.mask & (batch.weights > 0)[:, None, None])
        # Compare them.
        values, record = loss(scores)
        # Sum loss and metrics over examples, by weight.
        examples = batch.weights.sum()
        by_example = {"loss": values, **_ranking_metrics(record.rewards, scores.logp)}
        metrics = {name: ((value * batch.weights).sum(), examples) for name, value in by_example.items()}
        metrics |= {**response_metrics(batch, _names(scores.mask.shape[1])), **token_counts(batch)}
        return metrics["loss"][0] / jnp.maximum(examples, 1), metrics

    return loss_fn


def _names(responses: int) -> tuple[str, ...]:
    return ("chosen", "rejected") if responses == 2 else tuple(f"place_{place}" for place in range(1, responses + 1))


def _ranking_metrics(rewards: Float[Array, "B R"], logp: Float[Array, "B R T"]) -> dict[str, Float[Array, " B"]]:
    """Metrics of each example, for pairs under TRL's names.

    The margin is the reward of the best response minus the mean of the others, the accuracy the share of pairs of
    responses whose rewards are in the given order.
    """
    names, logps = _names(rewards.shape[1]), jax.lax.stop_gradient(logp).sum(-1)
    better, worse = jnp.triu_indices(len(names), 1)
    return {
        **{f"rewards/{name}": rewards[:, r] for r, name in enumerate(names)},
        f"{SQUARES}rewards/{names[0]}": rewards[:, 0] ** 2,
        "rewards/margins": rewards[:, 0] - rewards[:, 1:].mean(-1),
        "rewards/accuracies": (rewards[:, better] > rewards[:, worse]).astype(rewards.dtype).mean(-1),
        **{f"logps/{name}": logps[:, r] for r, name in enumerate(names)},
    }
