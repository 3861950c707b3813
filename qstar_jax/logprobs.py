"""The one way from hidden states to log-probabilities: chunked over tokens, so the [B, T, V] logits never exist."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def token_logprobs(
    hidden: Float[Array, "B T D"],
    unembedding: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    *,
    chunk_size: int = 128,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-probability of each target and the log-normaliser of its position.

    Logits are computed for `chunk_size` positions of every row at a time and again in the backward pass, so that memory
    grows with `B * chunk_size * V` instead of `B * T * V`. Products of bfloat16 inputs accumulate in float32.

    Args:
        hidden: Last hidden states; position t predicts `targets[:, t]`. Shape [B, T, D].
        unembedding: Rows are the output vectors of the vocabulary. Shape [V, D].
        targets: Token ids. Shape [B, T].
        chunk_size: Positions of a row whose logits exist at one time.

    Returns:
        (logp, logz), both float32 in nats, shape [B, T]: log softmax(z)[target], and logsumexp(z).
    """
    batch, length, width = hidden.shape
    chunks = -(-length // chunk_size)
    padding = chunks * chunk_size - length
    # Chunks run along the time axis, because the batch axis is the one that is cut over devices.
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0))).reshape(batch, chunks, chunk_size, width)
    targets = jnp.pad(targets, ((0, 0), (0, padding))).reshape(batch, chunks, chunk_size)

    @jax.checkpoint
    def one_chunk(hidden: Float[Array, "B C D"], targets: Int[Array, "B C"]):
        flat = hidden.reshape(-1, width)  # a product of matrices; with three dimensions XLA transposes on a CPU
        logits = jnp.einsum("nd,vd->nv", flat, unembedding, preferred_element_type=jnp.float32)
        logz = jax.nn.logsumexp(logits, axis=-1)
        logp = jnp.take_along_axis(logits, targets.reshape(-1, 1), axis=-1)[:, 0] - logz
        return logp.reshape(targets.shape), logz.reshape(targets.shape)

    _, (logp, logz) = jax.lax.scan(
        lambda carry, chunk: (carry, one_chunk(*chunk)), None, (hidden.swapaxes(0, 1), targets.swapaxes(0, 1))
    )
    logp, logz = (x.swapaxes(0, 1).reshape(batch, -1)[:, :length] for x in (logp, logz))
    return logp, logz
