"""Pipelines of several models: which of them is to blame, and what arms of training earn at equal KL."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Float, Int

from qstar_jax.errors import InputError
from qstar_jax.evaluation.intervals import Interval, auc, bootstrap
from qstar_jax.pipeline import Point


@dataclass(frozen=True)
class Blame:
    """How well scores of stages, such as implicit rewards, tell which stage is at fault.

    Attributes:
        runs: Runs that were looked at.
        faulty: Runs in which each stage is at fault, by name.
        single: Runs in which exactly one is.
        finds: Area under the ROC curve of low scores of a stage as a detector of its own faults, among all runs; None
            where a stage is never, or always, at fault.
        tells: The same among runs with exactly one fault, of low scores of a stage beside those of the others: is it
            this one? With two stages it is one number.
    """

    runs: int
    faulty: dict[str, int]
    single: int
    finds: dict[str, Interval | None]
    tells: dict[str, Interval | None]


def measure_blame(
    names: Sequence[str],
    scores: Float[np.ndarray, "N S"],
    faults: Bool[np.ndarray, "N S"],
    prompts: Int[np.ndarray, " N"] | None = None,
) -> Blame:
    """Compares scores of stages with their known faults.

    Args:
        names: Names of the S stages.
        scores: A score of each stage in each of N runs, in one unit for all; low where it did badly.
        faults: Which stages did badly.
        prompts: Prompt of each run, from 0, for the bootstrap; each run has one of its own by default.

    Returns:
        Areas under ROC curves, with 95 % intervals by bootstrap over prompts.

    Raises:
        InputError: If the shapes differ, or there are fewer than two stages.
    """
    scores, faults = np.asarray(scores, float), np.asarray(faults, bool)
    if scores.shape != faults.shape or scores.shape[1:] != (len(names),) or len(names) < 2:
        raise InputError(
            f"scores {scores.shape} and faults {faults.shape} of {len(names)} stages: expected [runs, stages], and "
            "at least two stages"
        )
    prompts = np.arange(len(scores)) if prompts is None else np.asarray(prompts)
    one = faults.sum(1) == 1
    others = (scores.sum(1, keepdims=True) - scores) / (len(names) - 1)
    return Blame(
        runs=len(scores),
        faulty=dict(zip(names, faults.sum(0).tolist(), strict=True)),
        single=int(one.sum()),
        finds={name: _area(-scores[:, i], faults[:, i], prompts) for i, name in enumerate(names)},
        tells={name: _area((others - scores)[one, i], faults[one, i], prompts[one]) for i, name in enumerate(names)},
    )


def _area(scores: np.ndarray, positive: np.ndarray, prompts: np.ndarray) -> Interval | None:
    if positive.all() or not positive.any():
        return None
    _, owner = np.unique(prompts, return_inverse=True)
    return bootstrap(auc(scores, positive, owner), owner.max() + 1)


def reward_at_kl(curve: Sequence[Point], kl: float) -> float:
    """Reads a curve of training where it first reaches a KL: linear between its points.

    Args:
        curve: Points in the order of training.
        kl: KL of the whole pipeline, in nats.

    Returns:
        The true reward there; NaN if it is never reached.
    """
    for before, after in pairwise(curve):
        if before.total_kl <= kl <= after.total_kl:
            share = (kl - before.total_kl) / max(after.total_kl - before.total_kl, 1e-12)
            return before.reward + share * (after.reward - before.reward)
    return float("nan")
