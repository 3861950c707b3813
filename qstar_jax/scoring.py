"""From a batch of responses to the scores of their actions."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qstar_jax.data.batches import Batch
from qstar_jax.mdp import TokenScores
from qstar_jax.models import LanguageModel
from qstar_jax.models.function import check_model
from qstar_jax.models.head import Head
from qstar_jax.models.logprobs import reference_kl, token_entropies, token_logprobs, top_logprobs
from qstar_jax.models.lora import split_adapter
from qstar_jax.models.masks import PackedMask
from qstar_jax.sharding import batch_shards, map_batch


def score_policy(model: LanguageModel, params: Any, batch: Batch, *, temperature: float = 1.0) -> TokenScores:
    """Scores responses under one model, in one pass over the sequences.

    Args:
        model: The model.
        params: Its parameters.
        batch: B prompts with R responses each.
        temperature: Divides the logits.

    Returns:
        Scores of shape [B, R, T], float32, without `ref_logp`.
    """
    check_model(model, "hidden_states")
    head = replace(model.head(params), temperature=temperature)
    return _scores(_scored_states(model, params, batch), head, batch)


def _scores(hidden: Float[Array, "M K D"], head: Head, batch: Batch) -> TokenScores:
    scores = token_logprobs(hidden, head, batch.targets)
    logp, logz = (jnp.where(batch.action_mask, _of_responses(x, batch), 0.0) for x in scores)
    return TokenScores(logp, None, logz, batch.action_mask)


def score_tokens(model: LanguageModel, params: Any, ref_params: Any, batch: Batch) -> TokenScores:
    """Scores responses under policy and reference: the record that losses, rewards and values read.

    Args:
        model: The model; policy and reference have the same shape, except for an adapter.
        params: The policy's parameters.
        ref_params: The reference's parameters, without an adapter; not used where the batch carries `ref_logp`. None
            where the reference is the policy without its adapter.
        batch: B prompts with R responses each.

    Returns:
        Scores of shape [B, R, T]; no gradient flows into the reference.

    Raises:
        ValueError: If there is no reference.
    """
    check_model(model, "hidden_states")
    if ref_params is None and batch.ref_logp is None and model.lora is None:
        raise ValueError("no reference: expected ref_params, a batch with ref_logp, or a model with an adapter")
    scores, ref_logp = score_policy(model, params, batch), batch.ref_logp
    if ref_logp is None:
        base = split_adapter(params)[0] if ref_params is None else ref_params
        ref_logp = score_policy(model.base, base, batch).logp
    return replace(scores, ref_logp=jax.lax.stop_gradient(ref_logp))


def score_divergence(
    model: LanguageModel, params: Any, ref_params: Any, batch: Batch
) -> tuple[TokenScores, Float[Array, "B R T"]]:
    """Scores responses as `score_tokens` does, and the divergence of whole distributions beside them.

    Args:
        model: The model; policy and reference have the same shape, except for an adapter.
        params: The policy's parameters.
        ref_params: The reference's parameters; None where it is the policy without its adapter. Log-probabilities in
            the batch do not replace them.
        batch: B prompts with R responses each.

    Returns:
        Scores, and KL(pi_ref || pi) in the state of each action, in nats; 0 elsewhere. Shape [B, R, T]; no gradient
        flows into the reference.
    """
    base = jax.lax.stop_gradient(split_adapter(params)[0] if ref_params is None else ref_params)
    hidden, ref_hidden = _scored_states(model, params, batch), _scored_states(model.base, base, batch)
    head, ref_head = model.head(params), model.base.head(base)
    scores, ref_scores = _scores(hidden, head, batch), _scores(ref_hidden, ref_head, batch)
    kl = _of_responses(reference_kl(hidden, head, ref_hidden, ref_head), batch)
    return replace(scores, ref_logp=ref_scores.logp), jnp.where(batch.action_mask, kl, 0.0)


def reference_entropies(model: LanguageModel, params: Any, ref_params: Any, batch: Batch) -> Float[Array, "B R T"]:
    """Entropy of the reference's next token in the state of each action: where it is undecided.

    Args:
        model: The model.
        params: The policy's parameters.
        ref_params: The reference's parameters, without an adapter; None where it is the policy without its adapter.
        batch: B prompts with R responses each.

    Returns:
        Entropies in nats; 0 where there is no action. Shape [B, R, T].
    """
    base = split_adapter(params)[0] if ref_params is None else ref_params
    entropies = token_entropies(_scored_states(model.base, base, batch), model.base.head(base))
    return jnp.where(batch.action_mask, _of_responses(entropies, batch), 0.0)


def response_alternatives(
    model: LanguageModel, params: Any, ref_params: Any, batch: Batch, count: int
) -> tuple[Int[Array, "B R T K"], Float[Array, "B R T K"], Float[Array, "B R T K"]]:
    """Ranks the tokens that the policy could have chosen at each position of the responses.

    Args:
        model: The model; policy and reference have the same shape, except for an adapter.
        params: The policy's parameters.
        ref_params: The reference's parameters, without an adapter; None where it is the policy without its adapter.
        batch: B prompts with R responses each.
        count: Tokens per position, K; at most the size of the vocabulary.

    Returns:
        (ids, logp, ref_logp) of the policy's most likely tokens, most likely first; float32 in nats. Shape
        [B, R, T, K]; entries that belong to no action are undefined.
    """
    base = split_adapter(params)[0] if ref_params is None else ref_params
    hidden, ref_hidden = _scored_states(model, params, batch), _scored_states(model.base, base, batch)
    ranked = top_logprobs(hidden, model.head(params), ref_hidden, model.base.head(base), count)
    return tuple(_of_responses(x, batch) for x in ranked)


def _scored_states(model: LanguageModel, params: Any, batch: Batch) -> Float[Array, "M K D"]:
    """Hidden states of the slots whose next token is scored, in any layout of the sequences; no others see the head."""
    mask = PackedMask(batch.blocks, batch.branches, batch.texts)
    hidden = model.hidden_states(params, batch.tokens, batch.positions, mask)

    def gather(_, hidden: Array, slots: Array) -> Array:
        of_shards = hidden.reshape(len(slots), -1, hidden.shape[-1])
        return jnp.take_along_axis(of_shards, slots[..., None], axis=1)

    return map_batch(gather, None, hidden, batch.slots)


def _of_responses(scored: Array, batch: Batch) -> Array:
    """Gathers from scored slots, [M, K, ...], to the actions of responses, [B, R, T, ...]."""

    def gather(_, scored: Array, index: Array) -> Array:
        return scored.reshape(-1, *scored.shape[2:])[index]

    if batch.shards == 1 or batch.shards != batch_shards():
        return gather(None, scored, batch.index)
    # The sequences of an example lie on its device, and so do its scored slots.
    return map_batch(gather, None, scored, batch.index % scored.shape[1])
