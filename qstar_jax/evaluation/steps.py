"""Steps of reasoning: totals of their rewards, and the first error by the protocol of ProcessBench.

A detector scores every step, low where it suspects an error. The first step whose score is below a threshold is the
predicted first error; a response without one is predicted to be all right. F1 is the harmonic mean of two accuracies:
on responses with an error (the predicted step must be the first wrong one) and on responses without. The threshold
comes from a calibration split, never from the responses that are measured.

References:
    Zheng et al., "ProcessBench: Identifying Process Errors in Mathematical Reasoning", arXiv 2412.06559.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from qstar_jax.evaluation.intervals import Statistic

ALL_RIGHT = -1


@dataclass(frozen=True)
class StepTotals:
    """The rewards of a response's steps as one number.

    Attributes:
        sum: Sum: the return of the response, so ranking by it is ranking by the *outcome* reward, not by the process.
        min: The worst step.
        mean: Mean over the steps.
        last: The last step.
    """

    sum: float
    min: float
    mean: float
    last: float


def step_totals(rewards: Sequence[float] | Float[np.ndarray, " N"]) -> StepTotals:
    """Combines the rewards of steps, at least one, in the usual ways."""
    values = np.asarray(rewards, float)
    return StepTotals(*map(float, (values.sum(), values.min(), values.mean(), values[-1])))


def first_error(scores: Sequence[float] | Float[np.ndarray, " N"], threshold: float) -> int:
    """Finds the first step whose score is below a threshold; `ALL_RIGHT` if there is none."""
    suspects = np.flatnonzero(np.asarray(scores, float) < threshold)
    return int(suspects[0]) if len(suspects) else ALL_RIGHT


def calibrate_threshold(
    scores: Sequence[Float[np.ndarray, " N"]], truth: Sequence[int] | Int[np.ndarray, " R"]
) -> float:
    """Finds the threshold of the highest F1 of first errors, exactly: each response is right on one interval of them.

    Args:
        scores: Score of each step of each response, low where an error is suspected. R arrays.
        truth: First wrong step of each response; `ALL_RIGHT` for none. Shape [R].

    Returns:
        The middle of the best interval; of several, that of the lowest.

    Raises:
        ValueError: If all responses have an error, or none has, so that F1 is not defined.
    """
    truth = np.asarray(truth)
    erroneous = truth != ALL_RIGHT
    if erroneous.all() or not erroneous.any():
        raise ValueError(
            f"{erroneous.sum()} of {len(truth)} responses have an error; expected some with and some without"
        )
    bounds = np.array([_right_thresholds(np.asarray(s, float), k) for s, k in zip(scores, truth, strict=True)])
    edges = np.unique(bounds[np.isfinite(bounds)])
    # Between two edges no prediction changes; outside of them, every step is suspected, or none.
    candidates = np.concatenate([edges[:1] - 1, (edges[1:] + edges[:-1]) / 2, edges[-1:] + 1])
    accuracies = []
    for group in (bounds[erroneous], bounds[~erroneous]):
        above_low = np.searchsorted(np.sort(group[:, 0]), candidates, "left")
        above_high = np.searchsorted(np.sort(group[:, 1]), candidates, "left")
        accuracies.append((above_low - above_high) / len(group))
    return float(candidates[np.argmax(harmonic_mean(*accuracies))])


def _right_thresholds(scores: Float[np.ndarray, " N"], truth: int) -> tuple[float, float]:
    """(low, high]: the thresholds at which a response is predicted right; empty where low >= high."""
    if truth == ALL_RIGHT:
        return -np.inf, scores.min()
    low, high = scores[truth], scores[:truth].min(initial=np.inf)
    return (low, high) if low < high else (np.inf, np.inf)


def first_error_accuracy(
    predicted: Sequence[int] | Int[np.ndarray, " R"],
    truth: Sequence[int] | Int[np.ndarray, " R"],
    owner: Int[np.ndarray, " R"],
) -> tuple[Statistic, Statistic, Statistic]:
    """Accuracy of predicted first errors.

    Args:
        predicted: Predicted first wrong step of each response; `ALL_RIGHT` for none. Shape [R].
        truth: The true one. Shape [R].
        owner: Which question each response belongs to, counted from 0. Shape [R].

    Returns:
        Three statistics for `bootstrap`: accuracy on responses with an error, accuracy on those without, and F1, their
        harmonic mean; NaN where a resample has no such responses.
    """
    truth, count = np.asarray(truth), owner.max() + 1
    right = np.asarray(predicted) == truth

    def accuracy(group: Bool[np.ndarray, " R"]) -> Statistic:
        hits = np.bincount(owner[group & right], minlength=count)
        sizes = np.bincount(owner[group], minlength=count)

        def accuracies(weights: np.ndarray) -> np.ndarray:
            drawn = weights @ sizes
            return weights @ hits / np.where(drawn > 0, drawn, np.nan)

        return accuracies

    erroneous, correct = accuracy(truth != ALL_RIGHT), accuracy(truth == ALL_RIGHT)
    return erroneous, correct, lambda weights: harmonic_mean(erroneous(weights), correct(weights))


def harmonic_mean(one: Float[np.ndarray, " K"], other: Float[np.ndarray, " K"]) -> Float[np.ndarray, " K"]:
    """Harmonic mean of two shares: 0 if either is."""
    total = one + other
    return 2 * one * other / np.where(total == 0, 1.0, total)
