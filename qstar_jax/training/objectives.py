"""What a run minimises: `loss_fn(params, ref_params, batch)`, pure, as sums and denominators.

A metric is a pair (sum, denominator), so that means over steps, batches of unequal size and devices are exact. Sums of
squares (`squares/NAME`) become the standard error `NAME_stderr`.
"""

from collections.abc import Callable
from dataclasses import asdict, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qstar_jax import losses
from qstar_jax.config import LossOptions
from qstar_jax.data.batches import Batch
from qstar_jax.errors import InputError
from qstar_jax.models import CausalLM
from qstar_jax.models.causal_lm import Params
from qstar_jax.scoring import response_logprobs, score_policy, score_tokens
from qstar_jax.training.metrics import Metrics

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
        metrics = {"loss": (total, tokens), **_answers(batch, "completion"), **token_counts(batch)}
        return total / jnp.maximum(tokens, 1), metrics

    return loss_fn


def preference_loss(options: LossOptions) -> losses.PreferenceLoss:
    """Builds the loss that the options name.

    Args:
        options: Names, weights and options of losses.

    Returns:
        The loss.

    Raises:
        InputError: If the options do not make a loss, or one that needs arrays which a training batch cannot give.
    """
    loss = losses.make_loss(**asdict(options))
    if loss.extra_arrays:
        raise InputError(
            f"loss.name {loss} needs {', '.join(sorted(loss.extra_arrays))}, which a batch of pairs does not give; "
            "call it from a training loop of your own (qstar_jax.losses), or choose another loss"
        )
    return loss


def resolve_loss(options: LossOptions) -> LossOptions:
    """Fills in the defaults that the named loss has for options which are not set (each its own, in a list of losses).

    Args:
        options: Names, weights and options of losses.

    Returns:
        Options that say all of it, for the record; those of a list of losses as they are.

    Raises:
        InputError: See `preference_loss`.
    """
    loss = preference_loss(options)
    return options if isinstance(options.name, list) else replace(options, **loss.options[0])


def dpo_loss_fn(model: CausalLM, options: LossOptions) -> LossFn:
    """Makes a token-level preference loss, averaged over pairs.

    Args:
        model: The model; policy and reference have the same shape.
        options: The loss and its options; DPO by default.

    Returns:
        `loss_fn(params, ref_params, batch) -> (loss, metrics)` on batches of (chosen, rejected), with metrics under
        TRL's names. No gradient flows into `ref_params`, which may be None where the loss has no reference.

    Raises:
        InputError: See `preference_loss`.
    """
    loss = preference_loss(options)

    def loss_fn(params: Params, ref_params: Params | None, batch: Batch):
        if loss.uses_reference:
            scores = score_tokens(model, params, ref_params, batch)
        else:
            scores = score_policy(model, params, batch)
        # Examples that only fill up the batch count as empty, for losses that look at all of it.
        scores = replace(scores, mask=scores.mask & (batch.weights > 0)[:, None, None])
        values, record = loss(scores)
        pairs = batch.weights.sum()
        logps = jax.lax.stop_gradient(scores.logp).sum(-1)
        by_pair = {
            "loss": values,
            "rewards/chosen": record.rewards[:, 0],
            "squares/rewards/chosen": record.rewards[:, 0] ** 2,
            "rewards/rejected": record.rewards[:, 1],
            "rewards/margins": record.margins,
            "rewards/accuracies": record.accuracies,
            "logps/chosen": logps[:, 0],
            "logps/rejected": logps[:, 1],
        }
        metrics = {name: ((value * batch.weights).sum(), pairs) for name, value in by_pair.items()}
        metrics |= {**_answers(batch, "chosen", "rejected"), **token_counts(batch)}
        return metrics["loss"][0] / jnp.maximum(pairs, 1), metrics

    return loss_fn


def _answers(batch: Batch, *names: str) -> Metrics:
    """Mean length in tokens, EOS included, and share that was truncated, of each answer of the examples."""
    per_answer = {"lengths": batch.response_lengths, "truncated": batch.truncated}
    return {
        f"{metric}/{name}": ((values[:, i] * batch.weights).sum(), batch.weights.sum())
        for metric, values in per_answer.items()
        for i, name in enumerate(names)
    }


def token_counts(batch: Batch) -> Metrics:
    """Sizes that throughput is computed from; a denominator of 1 makes them sums."""
    one = jnp.ones(())
    return {
        "count/tokens": ((batch.blocks >= 0).sum().astype(jnp.float32), one),
        "count/slots": (jnp.float32(batch.blocks.size), one),
        "count/scored_tokens": (batch.response_lengths.sum().astype(jnp.float32), one),
    }
