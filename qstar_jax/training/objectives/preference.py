"""Token-level preference losses, on pairs and on rankings of R responses.

One file serves both: a pair is a ranking of two, and batches, scores, losses and metrics are the same for any R.
"""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from qstar_jax import losses
from qstar_jax.data.batches import Batch
from qstar_jax.errors import InputError
from qstar_jax.models import LanguageModel
from qstar_jax.models.causal_lm import Params
from qstar_jax.scoring import score_divergence, score_policy, score_tokens
from qstar_jax.training.metrics import SQUARES
from qstar_jax.training.objectives.base import LossFn, Objective
from qstar_jax.training.objectives.responses import response_metrics, token_counts

Weigh = Callable[[Float[Array, "B R T"], Bool[Array, "B R T"]], Float[Array, "B R T"]]


def preference_objective(loss: losses.PreferenceLoss, weigh: Weigh | None = None) -> Objective:
    """The objective of a preference loss (see `losses.make_loss`) on pairs, or of `plackett_luce` on rankings.

    Args:
        loss: The loss.
        weigh: `(log-ratios of a guide, mask) -> weights` of tokens, if the loss reads weights.

    Raises:
        InputError: If the loss reads arrays that a training batch does not have.
    """
    _check_weights(loss, weigh)
    if missing := loss.extra_arrays - {"kl", "guide_rewards", "turns", "weights"}:
        raise InputError(
            f"loss.name {loss} needs {', '.join(sorted(missing))}, which a batch of pairs does not have; "
            "call it from a training loop of your own (qstar_jax.losses), or choose another loss"
        )
    rankings = loss.terms == ("plackett_luce",)
    names = ("chosen", "place_1", "reference_samples", "margins", "accuracies")
    on_pairs = " (plackett_luce is sigmoid on pairs)" if "plackett_luce" in loss.terms else ""
    return Objective(
        lambda model: preference_loss_fn(model, loss, weigh),
        kind="rankings" if rankings else "preferences",
        headline=("loss", *(f"rewards/{name}" for name in names)),
        description=f"{loss}{on_pairs}",
        uses_reference=loss.uses_reference,
        couples_examples=loss.couples_rows,
        loss_at_reference=None if rankings else loss.loss_at_reference,
        beta=loss.beta,
        reads_logits="kl" in loss.arrays,
        guided=bool({"guide_rewards", "weights"} & loss.arrays),
        guide_beta=1.0 if "weights" in loss.arrays else None,
        by_turns="turns" in loss.arrays,
    )


def preference_loss_fn(model: LanguageModel, loss: losses.PreferenceLoss, weigh: Weigh | None = None) -> LossFn:
    """Makes the mean of a preference loss over examples; policy and reference have the shape of `model`.

    Args:
        model: The policy's network.
        loss: The loss.
        weigh: For losses that weigh tokens: (log-ratios of a guide, mask) -> weights, of `losses.token_weights`.

    Returns:
        `loss_fn(params, ref_params, batch)` on batches of R responses, best first; metrics have TRL's names. No
        gradient flows into `ref_params`, which may be None if the loss has no reference.

    Raises:
        ValueError: The loss weighs tokens, and `weigh` is None.
    """
    if "weights" in loss.arrays and weigh is None:
        raise ValueError("the loss weighs tokens: pass `weigh`, such as losses.token_weights.exponential")

    def loss_fn(params: Params, ref_params: Params | None, batch: Batch):
        # Score the responses; examples that only fill up count as empty, for losses that look at the whole batch.
        arrays = {}
        if "kl" in loss.arrays:
            scores, arrays["kl"] = score_divergence(model, params, ref_params, batch)
        elif loss.uses_reference:
            scores = score_tokens(model, params, ref_params, batch)
        else:
            scores = score_policy(model, params, batch)
        scores = replace(scores, mask=scores.mask & (batch.weights > 0)[:, None, None])
        # Compare them; rankings may have empty places.
        present = scores.mask.any(-1)
        if loss.terms == ("plackett_luce",):
            arrays["present"] = present
        if "guide_rewards" in loss.arrays:
            arrays["guide_rewards"] = batch.guide_rewards
        if "weights" in loss.arrays:
            arrays["weights"] = weigh(batch.guide_rewards, scores.mask)
        if "turns" in loss.arrays:
            arrays["turns"] = batch.turns
        values, record = loss(scores, **arrays)
        # Sum loss and metrics over examples, by weight.
        examples = batch.weights.sum()
        metrics = {"loss": ((values * batch.weights).sum(), examples)}
        for name, (value, weight) in _ranking_metrics(record.rewards, scores.logp, present).items():
            metrics[name] = ((value * weight * batch.weights).sum(), (weight * batch.weights).sum())
        metrics |= {**response_metrics(batch, _names(scores.mask.shape[1])), **token_counts(batch)}
        return metrics["loss"][0] / jnp.maximum(examples, 1), metrics

    return loss_fn


def _check_weights(loss: losses.PreferenceLoss, weigh: Weigh | None):
    reads = "weights" in loss.arrays
    if reads and weigh is None:
        raise InputError(
            f"loss.name {loss} needs weights of tokens; set weighting.transform, to {', '.join(losses.TOKEN_WEIGHTS)}"
        )
    if weigh is not None and not reads:
        raise InputError(f"weighting.transform has no effect with loss.name {loss}; weighted_sigmoid reads it")
    if reads and "guide_rewards" in loss.arrays:
        raise InputError(
            f"loss.name {loss}: tgdpo reads the guide's rewards and weighted_sigmoid its log-ratios, and a batch holds "
            "one of them; choose one of the two"
        )


def _names(responses: int) -> tuple[str, ...]:
    return ("chosen", "rejected") if responses == 2 else tuple(f"place_{place}" for place in range(1, responses + 1))


def _ranking_metrics(
    rewards: Float[Array, "B R"], logp: Float[Array, "B R T"], present: Bool[Array, "B R"]
) -> dict[str, tuple[Float[Array, " B"], Float[Array, " B"]]]:
    """Metrics of each example and their weights, for pairs under TRL's names; places of rankings may be empty.

    The margin is the reward of the best response minus the mean of the others, the accuracy the share of pairs of
    responses whose rewards are in the given order.
    """
    names, logps = _names(rewards.shape[1]), jax.lax.stop_gradient(logp).sum(-1)
    # In pairs both responses count, even an empty one.
    filled = jnp.ones(rewards.shape) if len(names) == 2 else present.astype(rewards.dtype)
    better, worse = jnp.triu_indices(len(names), 1)
    both = filled[:, better] * filled[:, worse]
    in_order = (rewards[:, better] > rewards[:, worse]).astype(rewards.dtype)
    others = (rewards * filled)[:, 1:].sum(-1) / jnp.maximum(filled[:, 1:].sum(-1), 1)
    every = jnp.ones(len(rewards))
    return {
        **{f"rewards/{name}": (rewards[:, r], filled[:, r]) for r, name in enumerate(names)},
        f"{SQUARES}rewards/{names[0]}": (rewards[:, 0] ** 2, filled[:, 0]),
        "rewards/margins": (rewards[:, 0] - others, every),
        "rewards/accuracies": ((in_order * both).sum(-1) / jnp.maximum(both.sum(-1), 1), every),
        **{f"logps/{name}": (logps[:, r], filled[:, r]) for r, name in enumerate(names)},
    }
