"""Log-probabilities from hidden states, chunked over tokens: the [B, T, V] logits are never materialized.

Each device of a mesh works through the tokens of its own shard of the batch.

Losses, scoring, evaluation and references all call `token_logprobs`. The logits of a chunk are computed in the forward
pass and recomputed in the backward pass; only one log-normalizer per token is saved in between.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qstar_jax.mdp import entropy, kl_divergence
from qstar_jax.models.head import Head
from qstar_jax.sharding import map_batch

# Tokens per chunk. Fewer would save memory, but each chunk reads and writes the gradient of the whole table.
CHUNK = 1024


def token_logprobs(
    hidden: Float[Array, "B T D"],
    head: Head,
    targets: Int[Array, "B T"],
    *,
    chunk_size: int = CHUNK,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Computes the log-probability of each target and the log-normalizer of its position.

    Memory grows with `chunk_size * V` instead of `B * T * V` in both passes. bfloat16 inputs accumulate in float32, and
    everything from the logits on is float32. The vocabulary may be sharded.

    Args:
        hidden: Last hidden states; position t predicts `targets[:, t]`. Shape [B, T, D].
        head: Maps them to logits z over V tokens.
        targets: Token ids. Shape [B, T].
        chunk_size: Tokens per chunk of logits, on each device.

    Returns:
        (logp, logz), both float32 in nats, shape [B, T]: log softmax(z)[target], NaN where that is none of the V
        tokens, and logsumexp(z).
    """

    def kernel(head: Head, hidden: Array, targets: Array) -> tuple[Array, Array]:
        if head.table is None:  # nothing to recompute
            return _forward(chunk_size, hidden, head, targets)[0]
        return _token_logprobs(chunk_size, hidden, head, targets)

    return map_batch(kernel, head, hidden, targets)


def top_logprobs(
    hidden: Float[Array, "B T D"],
    head: Head,
    ref_hidden: Float[Array, "B T E"],
    ref_head: Head,
    count: int,
    *,
    chunk_size: int = CHUNK,
) -> tuple[Int[Array, "B T K"], Float[Array, "B T K"], Float[Array, "B T K"]]:
    """Finds the most likely tokens at each position, and their log-probabilities under a reference.

    Args:
        hidden: Last hidden states of the policy. Shape [B, T, D].
        head: The policy's head; V tokens.
        ref_hidden: Last hidden states of the reference. Shape [B, T, E].
        ref_head: The reference's head, over the same V tokens.
        count: Tokens per position, K; at most V.
        chunk_size: Tokens per chunk of logits, on each device.

    Returns:
        (ids, logp, ref_logp), most likely first; the last two float32 in nats. Shape [B, T, K] each.
    """

    def top(heads: tuple[Head, Head], hidden: Array, ref_hidden: Array) -> tuple[Array, Array, Array]:
        head, ref_head = heads

        def one_chunk(chunk):
            hidden, ref_hidden = chunk
            logp, ids = jax.lax.top_k(jax.nn.log_softmax(head.logits(hidden)), count)
            ref_logp = jax.nn.log_softmax(ref_head.logits(ref_hidden))
            return ids, logp, jnp.take_along_axis(ref_logp, ids, axis=-1)

        chunks = jax.lax.map(one_chunk, (_to_chunks(hidden, chunk_size), _to_chunks(ref_hidden, chunk_size)))
        return tuple(_from_chunks(x, *hidden.shape[:2]) for x in chunks)

    return map_batch(top, (head, ref_head), hidden, ref_hidden)


def reference_kl(
    hidden: Float[Array, "B T D"],
    head: Head,
    ref_hidden: Float[Array, "B T E"],
    ref_head: Head,
    *,
    chunk_size: int = CHUNK,
) -> Float[Array, "B T"]:
    """Computes KL(pi_ref || pi) at each position; no gradient flows into the reference.

    Args:
        hidden: Last hidden states of the policy. Shape [B, T, D].
        head: The policy's head; V tokens.
        ref_hidden: Last hidden states of the reference. Shape [B, T, E].
        ref_head: The reference's head, over the same V tokens.
        chunk_size: Tokens per chunk of logits, on each device; those of a chunk are computed again in the backward
            pass.

    Returns:
        Divergences in nats, float32. Shape [B, T].
    """

    def kernel(heads: tuple[Head, Head], hidden: Array, ref_hidden: Array) -> Array:
        head, ref_head = heads

        @jax.checkpoint
        def one_chunk(chunk):
            hidden, ref_hidden = chunk
            ref_logits = jax.lax.stop_gradient(ref_head.logits(ref_hidden))
            return kl_divergence(ref_logits, head.logits(hidden), jnp.ones(hidden.shape[:-1], bool))

        chunks = jax.lax.map(one_chunk, (_to_chunks(hidden, chunk_size), _to_chunks(ref_hidden, chunk_size)))
        return _from_chunks(chunks, *hidden.shape[:2])

    return map_batch(kernel, (head, ref_head), hidden, ref_hidden)


def token_entropies(hidden: Float[Array, "B T D"], head: Head, *, chunk_size: int = CHUNK) -> Float[Array, "B T"]:
    """Computes the entropy of the next token at each position.

    Args:
        hidden: Last hidden states. Shape [B, T, D].
        head: Maps them to logits over V tokens.
        chunk_size: Tokens per chunk of logits, on each device.

    Returns:
        Entropies in nats, float32. Shape [B, T].
    """

    def kernel(head: Head, hidden: Array) -> Array:
        def one_chunk(hidden):
            return entropy(head.logits(hidden), jnp.ones(hidden.shape[:-1], bool))

        return _from_chunks(jax.lax.map(one_chunk, _to_chunks(hidden, chunk_size)), *hidden.shape[:2])

    return map_batch(kernel, head, hidden)


def _to_chunks(x: Array, chunk_size: int) -> Array:
    """[B, T, ...] -> [chunks, C, ...], C at most `chunk_size`; flat, for plain matrix products."""
    x = x.reshape(-1, *x.shape[2:])
    chunks = -(-len(x) // chunk_size)
    length = -(-len(x) // chunks)
    return jnp.pad(x, ((0, chunks * length - len(x)),) + ((0, 0),) * (x.ndim - 1)).reshape(chunks, length, *x.shape[1:])


def _from_chunks(x: Array, batch: int, length: int) -> Array:
    """Inverts `_to_chunks`, dropping its padding."""
    return x.reshape(-1, *x.shape[2:])[: batch * length].reshape(batch, length, *x.shape[2:])


def _one_hot(targets: Array, vocabulary: int) -> Array:
    # A comparison, not a gather: it stays local to each device when the vocabulary is sharded.
    return targets[:, None] == jnp.arange(vocabulary)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_logprobs(chunk_size, hidden, head, targets):
    return _forward(chunk_size, hidden, head, targets)[0]


def _forward(chunk_size, hidden, head, targets):
    def one_chunk(chunk):
        hidden, targets = chunk
        logits = head.logits(hidden)
        logz = jax.nn.logsumexp(logits, axis=-1)
        vocabulary = logits.shape[-1]
        target_logit = jnp.where(_one_hot(targets, vocabulary), logits, 0.0).sum(-1)
        is_token = (targets >= 0) & (targets < vocabulary)
        return jnp.where(is_token, target_logit - logz, jnp.nan), logz

    chunks = jax.lax.map(one_chunk, (_to_chunks(hidden, chunk_size), _to_chunks(targets, chunk_size)))
    logp, logz = (_from_chunks(x, *targets.shape) for x in chunks)
    # Save logz, one number per token, so that the backward pass gets its softmax without another reduction.
    return (logp, logz), (hidden, head, targets, logz)


def _backward(chunk_size, residuals, cotangents):
    hidden, head, targets, logz = residuals

    # `x_bar` is the cotangent of x: the gradient of the loss with respect to x.
    def one_chunk(head_bar, chunk):
        hidden, targets, logz, logp_bar, logz_bar = chunk
        # Recompute the logits and the softmax of this chunk.
        logits = head.logits(hidden)
        softmax = jnp.exp(logits - logz[:, None])
        # Through the log-softmax: d logp / d z = one_hot - softmax, and d logz / d z = softmax.
        one_hot = _one_hot(targets, logits.shape[-1])
        logits_bar = jnp.where(one_hot, logp_bar[:, None], 0.0) + (logz_bar - logp_bar)[:, None] * softmax
        # Through the temperature, and through the cap: the derivative of c * tanh(z / c) is 1 - tanh(z / c)^2.
        if head.temperature != 1.0:
            logits_bar /= head.temperature
        if head.softcap is not None:
            logits_bar *= 1.0 - (logits * head.temperature / head.softcap) ** 2
        # Through the product, accumulating the gradient of the head over chunks in float32.
        product_bar = (head.scale * logits_bar).astype(hidden.dtype)
        hidden_bar = jnp.einsum("nv,vd->nd", product_bar, head.table, preferred_element_type=jnp.float32)
        table_bar = jnp.einsum("nv,nd->vd", product_bar, hidden, preferred_element_type=jnp.float32)
        bias_bar = None if head.bias is None else logits_bar.sum(0)
        head_bar = jax.tree.map(jnp.add, head_bar, replace(head, table=table_bar, bias=bias_bar))
        return head_bar, hidden_bar.astype(hidden.dtype)

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), head)
    chunks = tuple(_to_chunks(x, chunk_size) for x in (hidden, targets, logz, *cotangents))
    head_bar, hidden_bar = jax.lax.scan(one_chunk, zeros, chunks)
    head_bar = jax.tree.map(lambda x_bar, x: x_bar.astype(x.dtype), head_bar, head)
    return _from_chunks(hidden_bar, *targets.shape), head_bar, None


_token_logprobs.defvjp(_forward, _backward)
