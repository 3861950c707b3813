"""95 % intervals by bootstrap over prompts: which of them were drawn varies, and the tokens of one belong together."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

RESAMPLES = 1000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A figure and the range that holds it with 95 % confidence.

    Attributes:
        mean: The figure, from all prompts.
        low: Lower end (percentile bootstrap).
        high: Upper end.
    """

    mean: float
    low: float
    high: float

    @property
    def above_zero(self) -> bool:
        """Whether all of it is above 0."""
        return self.low > 0

    def __str__(self) -> str:
        """For example "0.84 [0.81, 0.87]"."""
        return f"{self.mean:.3g} [{self.low:.3g}, {self.high:.3g}]"


def bootstrap(figure: Callable[[np.ndarray], np.ndarray], count: int, *, seed: int = 0) -> Interval:
    """Resamples prompts with replacement.

    Args:
        figure: From how often each prompt was drawn, [K, count], to the figure of each resample, [K]; NaN where a
            resample has none.
        count: How many prompts there are.
        seed: Of the resamples: the same for all figures that are compared.

    Returns:
        The figure of the prompts as they are, and the range of 95 % of the resamples.
    """
    draws = np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))
    weights = np.apply_along_axis(np.bincount, 1, draws, minlength=count)
    tails = [50 * (1 - LEVEL), 50 * (1 + LEVEL)]
    low, high = np.nanpercentile(figure(weights), tails)
    return Interval(float(figure(np.ones((1, count), int))[0]), float(low), float(high))


def mean_interval(values: Float[np.ndarray, " N"], *, seed: int = 0) -> Interval:
    """Interval of a mean over prompts.

    Args:
        values: One value a prompt; NaN where a prompt has none. Paired differences give the interval of a difference.
        seed: See `bootstrap`.

    Returns:
        The mean and its range.
    """
    there = np.isfinite(values)
    filled = np.where(there, values, 0.0)

    def mean(weights: np.ndarray) -> np.ndarray:
        drawn = weights @ there.astype(float)
        return weights @ filled / np.where(drawn > 0, drawn, np.nan)

    return bootstrap(mean, len(values), seed=seed)


def auc(
    scores: Float[np.ndarray, " N"], positive: Bool[np.ndarray, " N"], weights: Float[np.ndarray, "K N"]
) -> Float[np.ndarray, " K"]:
    """Area under the ROC curve: how often a positive scores above a negative, ties counted half (Mann and Whitney).

    Args:
        scores: What should be high for positives.
        positive: Which are positives.
        weights: How often each counts, one row for each area.

    Returns:
        Areas; NaN where there are no positives or no negatives.
    """
    _, place = np.unique(scores, return_inverse=True)  # equal scores share a place
    ups, downs = (
        np.stack([np.bincount(place, row, place.max() + 1) for row in weights * part]) for part in (positive, ~positive)
    )
    below = np.cumsum(downs, axis=1) - downs / 2
    with np.errstate(invalid="ignore"):
        return (ups * below).sum(1) / (ups.sum(1) * downs.sum(1))
