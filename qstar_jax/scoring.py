"""From a batch of answers to what a model says of each of their tokens."""

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from qstar_jax.data.batches import Batch
from qstar_jax.logprobs import token_logprobs
from qstar_jax.mdp import TokenScores
from qstar_jax.models import CausalLM
from qstar_jax.models.causal_lm import Params, right_padded


def response_logprobs(
    model: CausalLM, params: Params, batch: Batch
) -> tuple[Float[Array, "B R T"], Float[Array, "B R T"]]:
    """Log-probabilities and log-normalisers of the answers' tokens, in one pass over the concatenated rows.

    Args:
        model: The model.
        params: Its parameters.
        batch: B prompts with R answers each.

    Returns:
        (logp, logz), float32 in nats, shape [B, R, T]; 0 after the end of an answer.
    """
    rows, responses, length = batch.tokens.shape
    tokens = rearrange(batch.tokens, "b r s -> (b r) s")
    targets = rearrange(batch.targets, "b r t -> (b r) t")
    prompt_lengths = jnp.repeat(batch.prompt_lengths, responses)
    lengths = prompt_lengths + rearrange(batch.response_lengths, "b r -> (b r)")
    hidden, _ = model.hidden_states(params, tokens, *right_padded(lengths, length))
    # Only positions that predict an answer's token enter the kernel: from the prompt's last token on.
    slots = prompt_lengths[:, None] - 1 + jnp.arange(targets.shape[1])
    hidden = jnp.take_along_axis(hidden, jnp.minimum(slots, length - 1)[..., None], axis=1)
    scores = token_logprobs(hidden, model.unembedding(params), targets)
    return tuple(
        jnp.where(batch.response_mask, rearrange(x, "(b r) t -> b r t", b=rows, r=responses), 0.0) for x in scores
    )


def score_tokens(model: CausalLM, params: Params, ref_params: Params | None, batch: Batch) -> TokenScores:
    """Policy and reference side by side: everything that rewards, values and losses are made of.

    Args:
        model: The model; policy and reference have the same shape.
        params: The policy's parameters.
        ref_params: The reference's parameters; not used where the batch carries `ref_logp`.
        batch: B prompts with R answers each.

    Returns:
        Scores of shape [B, R, T]; no gradient flows into the reference.
    """
    logp, logz = response_logprobs(model, params, batch)
    ref_logp = batch.ref_logp
    if ref_logp is None:
        ref_logp, _ = response_logprobs(model, ref_params, batch)
    return TokenScores(logp=logp, ref_logp=jax.lax.stop_gradient(ref_logp), logz=logz)
