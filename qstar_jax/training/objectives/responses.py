"""Metrics that every objective on responses has: their lengths, and the sizes that throughput is computed from."""

import jax.numpy as jnp

from qstar_jax.data.batches import Batch
from qstar_jax.training.metrics import Metrics


def response_metrics(batch: Batch, names: tuple[str, ...]) -> Metrics:
    """Mean length in actions, EOS included, and share truncated, of each response: sums over the batch, by weight.

    Places of rankings that are empty do not count.
    """
    values = {"lengths": batch.num_actions, "truncated": batch.truncated}
    weights = batch.weights[:, None] * (batch.response_lengths > 0)
    return {
        f"{metric}/{name}": ((value[:, r] * weights[:, r]).sum(), weights[:, r].sum())
        for metric, value in values.items()
        for r, name in enumerate(names)
    }


def token_counts(batch: Batch) -> Metrics:
    """Sizes of a batch, or of stacked micro-batches; a denominator of 1 makes them sums."""
    one = jnp.ones(())
    return {
        "count/tokens": ((batch.blocks >= 0).sum().astype(jnp.float32), one),
        "count/slots": (jnp.float32(batch.blocks.size), one),
        "count/scored_tokens": (batch.num_actions.sum().astype(jnp.float32), one),
    }
