"""Token rewards of another DPO run, which guide a loss; its log-probabilities are cached like a reference's."""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from qstar_jax.console import say, track
from qstar_jax.data.batches import Batch
from qstar_jax.data.feeder import Feeder
from qstar_jax.errors import InputError
from qstar_jax.store.identity import weights_identity
from qstar_jax.store.open import LoadedModel, load_model
from qstar_jax.store.references import find_beta, open_reference
from qstar_jax.store.user_cache import user_cache
from qstar_jax.training.plan import RunPlan
from qstar_jax.training.reference import cached_logprobs
from qstar_jax.training.setup import Start


def with_guide(
    plan: RunPlan, start: Start, feeders: list[Feeder], mesh: Mesh, console: Console
) -> tuple[list[Feeder], str]:
    """Adds the token rewards of `reference.guide` to every batch.

    Guide and its reference are in memory one after the other, and only for as long as they score.

    Returns:
        The feeders, and the identity of the guide.

    Raises:
        InputError: If the guide is no run with a reference, or has other tokens.
    """
    name, config = plan.reference.guide, plan.config
    load = partial(load_model, compute=config.compute, mesh=mesh, mesh_options=config.mesh)
    folder = Path(plan.reference.cache) if plan.reference.cache else user_cache("reference")

    def score(loaded: LoadedModel, identity: str) -> list[list[list[np.ndarray]]]:
        def scored(feeder: Feeder) -> list[list[np.ndarray]]:
            def show(batches: Iterable[Batch], description: str, total: int) -> Iterable[Batch]:
                return track(console, batches, f"guide: {feeder.dataset.source}", total)

            return cached_logprobs(feeder, loaded.model, loaded.params, identity, folder, show)

        return list(map(scored, feeders))

    guide = load(name)
    check_guide(guide, start, name, "reference.guide")
    beta, identity = find_beta(guide, None, name, "reference.guide to a run that does"), _identity(guide)
    what = f"token rewards of {name}, beta {beta:g}"
    if plan.objective.guide_beta is not None:
        beta, what = plan.objective.guide_beta, f"log-ratios of {name} at each token, in nats"
    logps = score(guide, identity)
    guide = replace(guide, params=None)  # frees them before others are loaded
    reference = open_reference(guide, None, name, load)
    ref_logps = score(reference, _identity(reference))
    say(console, f"guide: {what}")
    rewards = [_differences(beta, *both) for both in zip(logps, ref_logps, strict=True)]
    return [feeder.with_guide(values) for feeder, values in zip(feeders, rewards, strict=True)], identity


def _identity(loaded: LoadedModel) -> str:
    return weights_identity(loaded.model, loaded.params)


def check_guide(guide: LoadedModel, start: Start, name: str, option: str):
    """Refuses a guide that is no run with a reference, or has other tokens than the model; `option` names it."""
    if guide.reference is None:
        raise InputError(
            f"{option} {name} has no reference, so it gives no token rewards; expected a run of qstar dpo whose "
            "loss has one"
        )
    own, other = (loaded.tokenizer.get_vocab() for loaded in (start, guide))
    if own != other:
        raise InputError(
            f"{option} {name}: its tokenizer differs from that of the model, so its rewards are those of other "
            "tokens; expected a run from a model with the same tokenizer"
        )


def _differences(
    beta: float, logps: list[list[np.ndarray]], ref_logps: list[list[np.ndarray]]
) -> list[list[np.ndarray]]:
    """Beta (log pi - log pi_ref) of each token of each response of each example."""
    return [
        [beta * (own - ref) for own, ref in zip(responses, ref_responses, strict=True)]
        for responses, ref_responses in zip(logps, ref_logps, strict=True)
    ]
