"""The frozen reference of a run: who it is, and its log-probabilities where they are computed once for all runs."""

from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from qstar_jax.data.batches import Batch
from qstar_jax.errors import InputError
from qstar_jax.models import CausalLM
from qstar_jax.models.causal_lm import Params
from qstar_jax.reference_cache import ReferenceCache, fingerprint, params_identity
from qstar_jax.scoring import response_logprobs
from qstar_jax.training.feeding import Feeder, Track

# Largest difference between cached and fresh log-probabilities of a token, in nats: two programs round differently.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}


def reference_identity(model: CausalLM, params: Params) -> str:
    """Says who a reference is: its parameters, bit by bit, and the shape of its model.

    Args:
        model: The model.
        params: Its parameters; in a job of several processes all must call this together.

    Returns:
        A line of text.
    """
    return f"{params_identity(params)} {model.model_type} {model.config}"


def cached_logprobs(
    feeder: Feeder,
    model: CausalLM,
    params: Params | None,
    identity: str,
    folder: Path,
    track: Track = lambda batches, description, total: batches,
) -> list[list[np.ndarray]]:
    """Reads a reference's log-probabilities of all answers from the cache, after writing what is not there yet.

    Args:
        feeder: The data set, and how it comes in batches.
        model: The model.
        params: The reference's parameters; None where they are not at hand, and the cache must be complete.
        identity: Who the reference is.
        folder: Folder of all caches.
        track: `(batches, description, total)` wraps batches, for a progress bar.

    Returns:
        log pi_ref of each token of each answer of each example, in nats.

    Raises:
        InputError: If the cache is damaged, does not fit the reference, or is not complete and `params` is None.
    """
    examples = feeder.dataset.examples
    key = fingerprint(examples, identity, model.compute.dtype)
    cache = ReferenceCache.open(folder, key, examples)
    done, complete = cache.done, cache.complete
    multihost_utils.sync_global_devices("reference cache opened")  # before anybody writes
    compute = _computer(model, params, feeder)
    if complete and params is not None:
        sample, logps = next(iter(compute(feeder.in_order(), 0)))
        cache.verify(range(sample, sample + len(logps)), logps, TOLERANCE[model.compute.dtype])
    if not complete:
        if params is None:
            raise InputError(
                f"{cache.path} holds the reference's log-probabilities of {done:,} of {len(examples):,} examples of "
                f"{feeder.dataset.source}, and a run that goes on has no reference to compute the others; "
                "begin a new run, or put the cache back"
            )
        batches = track(feeder.in_order(done), "reference", feeder.batches - done // feeder.batch_size)
        for start, logps in compute(batches, done):
            if jax.process_index() == 0:
                cache.write(start, logps)
    multihost_utils.sync_global_devices("reference cache complete")
    return ReferenceCache.open(folder, key, examples).read()


def _computer(model: CausalLM, params: Params | None, feeder: Feeder) -> Callable:
    logprobs = jax.jit(lambda params, batch: response_logprobs(model, params, batch)[0])
    examples = feeder.dataset.examples

    def compute(batches: Iterable[Batch], start: int):
        for batch in batches:
            values = multihost_utils.process_allgather(logprobs(params, batch), tiled=True)
            own = examples[start : start + feeder.batch_size]
            yield (
                start,
                [
                    [np.asarray(values[b, r, : len(response.ids)]) for r, response in enumerate(example.responses)]
                    for b, example in enumerate(own)
                ],
            )
            start += feeder.batch_size

    return compute
