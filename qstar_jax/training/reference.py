"""The reference of a run: its mode, and its log-probabilities if they are computed once."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from qstar_jax.config import ReferenceOptions
from qstar_jax.data.batches import Batch
from qstar_jax.data.feeder import Feeder, Track
from qstar_jax.errors import InputError
from qstar_jax.models import CausalLM
from qstar_jax.models.causal_lm import Params
from qstar_jax.scoring import score_policy
from qstar_jax.store.reference_cache import ReferenceCache, fingerprint
from qstar_jax.training.objectives import Objective

# Largest difference between cached and fresh log-probabilities of a token, in nats: two programs round differently.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}


def resolve_reference(options: ReferenceOptions, objective: Objective, lora_rank: int) -> ReferenceOptions:
    """Turns `auto` into the mode that fits the objective and the adapter, and refuses one that does not.

    A `lora_rank` of 0 means that the policy has no adapter.

    Returns:
        Options whose mode is one of the others.

    Raises:
        InputError: If the mode and the loss, the adapter or the moving reference do not go together.
    """
    loss, mode, has_adapter = objective.description, options.mode, lora_rank > 0
    if mode == "auto":
        mode = "none" if not objective.uses_reference else "adapter" if has_adapter else "live"
    if mode != "none" and not objective.uses_reference:
        raise InputError(f"reference.mode is {mode}, and {loss} has no reference; leave it out")
    if mode == "none" and objective.uses_reference:
        raise InputError(f"reference.mode is none, and {loss} compares the policy with one; choose live or cached")
    if mode == "cached" and objective.reads_logits:
        raise InputError(
            f"reference.mode is cached, and {loss} compares whole distributions with the reference's, of which log-"
            "probabilities of responses are not enough; choose live, or adapter with lora.rank"
        )
    if objective.guided != (options.guide is not None):
        needs = "needs the folder of a DPO run whose token rewards guide it; set reference.guide"
        unread = f"does not read reference.guide {options.guide} (tgdpo and weighted_sigmoid do); leave it out"
        raise InputError(f"loss.name {loss} {needs if objective.guided else unread}")
    if mode == "adapter" and not has_adapter:
        raise InputError("reference.mode adapter takes the policy without its adapter, and it has none; set lora.rank")
    if options.sync_every and (mode != "live" or has_adapter):
        raise InputError(
            f"reference.sync_every {options.sync_every} moves the parameters of a live reference "
            f"(found: mode {mode}, lora.rank {lora_rank}); set reference.mode live and lora.rank 0"
        )
    if options.sync_every < 0 or not 0 < options.sync_mix <= 1:
        raise InputError(
            f"reference.sync_every must be at least 0, and reference.sync_mix above 0 and at most 1 "
            f"(found: {options.sync_every} and {options.sync_mix})"
        )
    if options.sync_mix != 1 and not options.sync_every:
        raise InputError("reference.sync_mix has no effect without reference.sync_every; set it, for instance to 512")
    return replace(options, mode=mode)


def cached_logprobs(
    feeder: Feeder,
    model: CausalLM,
    params: Params | None,
    identity: str,
    folder: Path,
    track: Track = lambda batches, description, total: batches,
) -> list[list[np.ndarray]]:
    """Reads a reference's log-probabilities of all responses from the cache, after computing what is missing there.

    Args:
        feeder: The dataset, in batches.
        model: The model.
        params: The reference's parameters; None if they are not loaded, and the cache must be complete.
        identity: Identity of the reference.
        folder: Folder of all caches.
        track: `(batches, description, total)` wraps batches, for a progress bar.

    Returns:
        log pi_ref of each token of each response of each example, in nats.

    Raises:
        InputError: If the cache is damaged, does not fit the reference, or is incomplete and `params` is None.
    """
    examples = feeder.dataset.examples
    key = fingerprint(examples, identity, model.compute.dtype)
    cache = ReferenceCache.open(folder, key, examples)
    done, complete = cache.done, cache.complete
    multihost_utils.sync_global_devices("reference cache opened")  # before any process writes
    score = make_scorer(model, feeder)
    # A complete cache is compared with one fresh batch.
    if complete and params is not None:
        first, logps = next(iter(score(params, feeder.in_order(), 0)))
        cache.verify(range(first, first + len(logps)), logps, TOLERANCE[model.compute.dtype])
    # An incomplete one is continued where it ends.
    if not complete:
        if params is None:
            raise InputError(
                f"{cache.path} holds the reference's log-probabilities of {done:,} of {len(examples):,} examples of "
                f"{feeder.dataset.source}, and a resumed run has no reference to compute the others; "
                "begin a new run, or put the cache back"
            )
        batches = track(feeder.in_order(done), "reference", feeder.batches - done // feeder.batch_size)
        for start, logps in score(params, batches, done):
            if jax.process_index() == 0:
                cache.write(start, logps)
    multihost_utils.sync_global_devices("reference cache complete")
    return ReferenceCache.open(folder, key, examples).read()


def make_scorer(model: CausalLM, feeder: Feeder) -> Callable[[Params, Iterable[Batch], int], Iterator]:
    """Compiles the log-probabilities of a dataset's responses, gathered onto every host.

    Returns:
        `score(params, batches, start)` on the feeder's batches from example `start` on: yields the index of a batch's
        first example, and for each of its examples log pi of each response's tokens in nats, shape [T].
    """
    logprobs = jax.jit(lambda params, batch: score_policy(model, params, batch).logp)
    examples = feeder.dataset.examples

    def score(params: Params, batches: Iterable[Batch], start: int):
        for batch in batches:
            values = multihost_utils.process_allgather(logprobs(params, batch), tiled=True)
            in_batch = examples[start : start + feeder.batch_size]
            yield (
                start,
                [
                    [np.asarray(values[b, r, : len(response.ids)]) for r, response in enumerate(example.responses)]
                    for b, example in enumerate(in_batch)
                ],
            )
            start += feeder.batch_size

    return score
