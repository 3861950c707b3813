"""Greedy decoding and sampling."""

from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from qstar_jax.decoding.cached_model import feed, prefill
from qstar_jax.decoding.hypotheses import Hypotheses
from qstar_jax.models import CausalLM
from qstar_jax.models.causal_lm import Params


def restrict(logits: Float[Array, "*B V"], *, top_k: int = 0, top_p: float = 1.0) -> Float[Array, "*B V"]:
    """Sets logits outside the nucleus to -inf.

    Args:
        logits: Logits at the sampling temperature. Shape [..., V].
        top_k: Keep the so many likeliest tokens; 0 keeps all. Ties go to the lower id.
        top_p: Of these, keep the fewest whose probabilities reach this sum; 1 keeps all (arXiv 1904.09751).

    Returns:
        Logits. Shape [..., V].
    """
    vocabulary = logits.shape[-1]
    if top_k in (0, vocabulary) and top_p >= 1.0:
        return logits
    order = jnp.argsort(-logits, axis=-1, stable=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    ranked = jnp.where(jnp.arange(vocabulary) < (top_k or vocabulary), ranked, -jnp.inf)
    probs = jax.nn.softmax(ranked, axis=-1)
    likelier = jnp.cumsum(probs, axis=-1) - probs  # probability of all tokens before this one
    ranked = jnp.where((likelier < top_p) | (jnp.arange(vocabulary) == 0), ranked, -jnp.inf)
    return jnp.take_along_axis(ranked, jnp.argsort(order, axis=-1), axis=-1)


@partial(
    jax.jit, static_argnames=("model", "num_samples", "max_new_tokens", "eos_ids", "temperature", "top_k", "top_p")
)
def sample(
    model: CausalLM,
    params: Params,
    prompts: Int[Array, "B P"],
    prompt_lengths: Int[Array, " B"],
    key: jax.Array,
    *,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    num_samples: int = 1,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Hypotheses:
    """Decodes answers token by token; the prompt is computed once for all samples of it.

    Args:
        model: The model.
        params: Its parameters.
        prompts: Right-padded token ids. Shape [B, P].
        prompt_lengths: Tokens of each prompt, at least 1. Shape [B].
        key: A `jax.random.key`; consumed. Not used where `temperature` is 0.
        max_new_tokens: Longest answer T, EOS included.
        eos_ids: Tokens that end an answer.
        num_samples: Answers a prompt, N.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: See `restrict`.
        top_p: See `restrict`.

    Returns:
        Answers, in the order in which they were drawn.
    """
    state = prefill(model, params, prompts, prompt_lengths, max_new_tokens)
    state = state.take(jnp.repeat(jnp.arange(prompts.shape[0]), num_samples))
    rows = state.logits.shape[0]
    eos = jnp.array(eos_ids, jnp.int32)

    def choose(logits, key):
        if temperature == 0:
            return jnp.argmax(logits, axis=-1)
        return jax.random.categorical(key, restrict(logits / temperature, top_k=top_k, top_p=top_p))

    def unfinished(carry):
        t, done, *_ = carry
        return (t < max_new_tokens) & ~done.all()

    def step(carry):
        t, done, tokens, lengths, logp, state, key = carry
        key, this_key = jax.random.split(key)
        token = choose(state.logits, this_key).astype(jnp.int32)
        token_logp = jnp.take_along_axis(jax.nn.log_softmax(state.logits), token[:, None], axis=-1)[:, 0]
        logp = jnp.where(done, logp, logp + token_logp)
        lengths = jnp.where(done, lengths, t + 1)
        tokens = tokens.at[:, t].set(token)
        done = done | (token[:, None] == eos).any(-1)
        return t + 1, done, tokens, lengths, logp, feed(model, params, state, token, t, max_new_tokens), key

    zeros = jnp.zeros(rows, jnp.int32)
    start = (0, zeros > 0, jnp.zeros((rows, max_new_tokens), jnp.int32), zeros, jnp.zeros(rows), state, key)
    _, done, tokens, lengths, logp, _, _ = jax.lax.while_loop(unfinished, step, start)
    tokens, lengths, logp, done = (
        rearrange(x, "(b n) ... -> b n ...", n=num_samples) for x in (tokens, lengths, logp, done)
    )
    return Hypotheses(tokens=tokens, lengths=lengths, logp=logp, finished=done)
