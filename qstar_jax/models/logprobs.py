"""The one way from hidden states to log-probabilities: chunked over tokens, so the [B, T, V] logits never exist.

Losses, scoring, evaluation and references all pass through `token_logprobs`. Logits of one chunk are computed in the
forward pass and again in the backward pass; what is kept between the two is one log-normaliser a token.
"""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qstar_jax.models.head import Head


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenStatistics:
    """What people like to log of each position's distribution; no gradient flows through it.

    Attributes:
        entropy: -sum_a pi log pi, in nats. Shape [B, T].
        mean_logit: Mean of the logits over the vocabulary. Shape [B, T].
        log_sum_sq: log sum_a pi(a)^2, in nats, which aligns WPO's weights. Shape [B, T].
    """

    entropy: Float[Array, "B T"]
    mean_logit: Float[Array, "B T"]
    log_sum_sq: Float[Array, "B T"]


def token_logprobs(
    hidden: Float[Array, "B T D"],
    head: Head,
    targets: Int[Array, "B T"],
    *,
    chunk_size: int = 128,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-probability of each target and the log-normaliser of its position.

    Memory grows with `B * chunk_size * V` instead of `B * T * V`, in the forward and the backward pass. Products of
    bfloat16 inputs accumulate in float32, and everything from the logits on is float32. The vocabulary may be cut over
    devices.

    Args:
        hidden: Last hidden states; position t predicts `targets[:, t]`. Shape [B, T, D].
        head: Makes logits z of them; V tokens.
        targets: Token ids. Shape [B, T].
        chunk_size: Positions of a row whose logits exist at one time.

    Returns:
        (logp, logz), both float32 in nats, shape [B, T]: log softmax(z)[target], and logsumexp(z).
    """
    return _token_logprobs(chunk_size, hidden, head, targets)


def top_logprobs(
    hidden: Float[Array, "B T D"],
    head: Head,
    ref_hidden: Float[Array, "B T E"],
    ref_head: Head,
    count: int,
    *,
    chunk_size: int = 128,
) -> tuple[Int[Array, "B T K"], Float[Array, "B T K"], Float[Array, "B T K"]]:
    """The likeliest tokens of each position, and what a reference thinks of the same tokens.

    Args:
        hidden: Last hidden states of the policy. Shape [B, T, D].
        head: The policy's head; V tokens.
        ref_hidden: Last hidden states of the reference. Shape [B, T, E].
        ref_head: The reference's head, of the same V tokens.
        count: Tokens a position, K; at most V.
        chunk_size: Positions of a row whose logits exist at one time.

    Returns:
        (ids, logp, ref_logp), likeliest first; the last two float32 in nats. Shape [B, T, K] each.
    """

    def one_chunk(chunk):
        hidden, ref_hidden = chunk
        logp, ids = jax.lax.top_k(jax.nn.log_softmax(head.logits(hidden)), count)
        ref_logp = jax.nn.log_softmax(ref_head.logits(ref_hidden))
        return ids, logp, jnp.take_along_axis(ref_logp, ids, axis=-1)

    batch, length, _ = hidden.shape
    found = jax.lax.map(one_chunk, (_cut(hidden, chunk_size), _cut(ref_hidden, chunk_size)))
    return tuple(_join(x, batch, length) for x in found)


def token_statistics(hidden: Float[Array, "B T D"], head: Head, *, chunk_size: int = 128) -> TokenStatistics:
    """Entropy, mean logit and collision probability of each position, with the memory of `token_logprobs`.

    Args:
        hidden: Last hidden states. Shape [B, T, D].
        head: Makes logits of them.
        chunk_size: Positions of a row whose logits exist at one time.

    Returns:
        Float32 statistics. Shape [B, T] each.
    """
    hidden, head = jax.lax.stop_gradient((hidden, head))

    def one_chunk(hidden):
        logits = head.logits(hidden)
        logz = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        logp = logits - logz
        entropy = -jnp.where(logp > -jnp.inf, jnp.exp(logp) * logp, 0.0).sum(-1)
        return entropy, logits.mean(-1), jax.nn.logsumexp(2 * logp, axis=-1)

    batch, length, _ = hidden.shape
    found = jax.lax.map(one_chunk, _cut(hidden, chunk_size))
    return TokenStatistics(*(_join(x, batch, length) for x in found))


def _cut(x: Array, chunk_size: int) -> Array:
    """[B, T, ...] -> [chunks, B * C, ...]: along time, because the batch axis is the one that is cut over devices."""
    batch, length = x.shape[:2]
    chunk_size = min(chunk_size, length)
    chunks = -(-length // chunk_size)
    x = jnp.pad(x, ((0, 0), (0, chunks * chunk_size - length)) + ((0, 0),) * (x.ndim - 2))
    # One row a token, as `Head.logits` wants them.
    x = x.reshape(batch, chunks, chunk_size, *x.shape[2:]).swapaxes(0, 1)
    return x.reshape(chunks, batch * chunk_size, *x.shape[3:])


def _join(x: Array, batch: int, length: int) -> Array:
    """The inverse of `_cut`, without its padding."""
    chunks = x.shape[0]
    return x.reshape(chunks, batch, -1, *x.shape[2:]).swapaxes(0, 1).reshape(batch, -1, *x.shape[2:])[:, :length]


def _is_target(targets: Array, vocabulary: int) -> Array:
    # A comparison, not a gather: it stays local to each device where the vocabulary is cut.
    return targets[:, None] == jnp.arange(vocabulary)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_logprobs(chunk_size, hidden, head, targets):
    return _forward(chunk_size, hidden, head, targets)[0]


def _forward(chunk_size, hidden, head, targets):
    def one_chunk(chunk):
        hidden, targets = chunk
        logits = head.logits(hidden)
        logz = jax.nn.logsumexp(logits, axis=-1)
        target = jnp.where(_is_target(targets, logits.shape[-1]), logits, 0.0).sum(-1)
        return target - logz, logz

    found = jax.lax.map(one_chunk, (_cut(hidden, chunk_size), _cut(targets, chunk_size)))
    logp, logz = (_join(x, *targets.shape) for x in found)
    return (logp, logz), (hidden, head, targets, logz)


def _backward(chunk_size, residuals, cotangents):
    hidden, head, targets, logz = residuals

    def one_chunk(sums, chunk):
        hidden, targets, logz, logp_bar, logz_bar = chunk
        logits = head.logits(hidden)
        softmax = jnp.exp(logits - logz[:, None])
        # d logp / d z = onehot - softmax, and d logz / d z = softmax.
        one_hot = _is_target(targets, logits.shape[-1])
        logits_bar = jnp.where(one_hot, logp_bar[:, None], 0.0) + (logz_bar - logp_bar)[:, None] * softmax
        if head.softcap is not None:
            logits_bar *= 1.0 - (logits / head.softcap) ** 2
        product_bar = (head.scale * logits_bar).astype(hidden.dtype)
        hidden_bar = jnp.einsum("nv,vd->nd", product_bar, head.table, preferred_element_type=jnp.float32)
        table_bar = jnp.einsum("nv,nd->vd", product_bar, hidden, preferred_element_type=jnp.float32)
        bias_bar = None if head.bias is None else logits_bar.sum(0)
        sums = jax.tree.map(jnp.add, sums, replace(head, table=table_bar, bias=bias_bar))
        return sums, hidden_bar.astype(hidden.dtype)

    sums = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), head)
    chunks = tuple(_cut(x, chunk_size) for x in (hidden, targets, logz, *cotangents))
    sums, hidden_bar = jax.lax.scan(one_chunk, sums, chunks)
    head_bar = jax.tree.map(lambda x, of: x.astype(of.dtype), sums, head)
    return _join(hidden_bar, *targets.shape), head_bar, None


_token_logprobs.defvjp(_forward, _backward)
