"""95 % intervals by bootstrap over prompts: a prompt is resampled with all its responses and tokens."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import rankdata

RESAMPLES = 1000
LEVEL = 0.95
_BLOCK = 2**22  # prompts drawn at once, in several resamples together

# From how often each of P prompts was drawn, [K, P], to the statistic of each resample, [K].
Statistic = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Interval:
    """A statistic and its 95 % confidence interval.

    Attributes:
        mean: The statistic, over all prompts.
        low: Lower end (percentile bootstrap).
        high: Upper end.
    """

    mean: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 or -1 where all of it lies above or below zero, 0 where it holds zero."""
        return int(self.low > 0) - int(self.high < 0)

    def compare(self, other: "Interval") -> int:
        """1 or -1 where all of it lies above or below all of the other, 0 where they overlap."""
        return int(self.low > other.high) - int(self.high < other.low)

    def __format__(self, spec: str) -> str:
        """Formats all three numbers: with ".2f", for example "0.84 [0.81, 0.87]"."""
        return f"{self.mean:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"

    def __str__(self) -> str:
        """For example "0.84 [0.81, 0.87]"."""
        return f"{self:.3g}"


def bootstrap(statistic: Statistic, count: int, *, seed: int = 0) -> Interval:
    """Resamples prompts with replacement.

    Args:
        statistic: From how often each prompt was drawn, [K, count], to the statistic of each resample, [K]; NaN where
            a resample has none.
        count: How many prompts there are.
        seed: Seed of the resamples: the same for all statistics that are compared.

    Returns:
        The statistic over the prompts as they are, and the range of 95 % of the resamples.
    """
    rng, size, resampled = np.random.default_rng(seed), max(1, _BLOCK // count), []
    for first in range(0, RESAMPLES, size):
        draws = rng.integers(0, count, (min(size, RESAMPLES - first), count))
        resampled.append(statistic(np.apply_along_axis(np.bincount, 1, draws, minlength=count)))
    low, high = np.nanpercentile(np.concatenate(resampled), [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return Interval(float(statistic(np.ones((1, count), int))[0]), float(low), float(high))


def mean_interval(values: Float[np.ndarray, " N"], *, seed: int = 0) -> Interval:
    """Interval of a mean over prompts.

    Args:
        values: One value per prompt; NaN where a prompt has none. Paired differences give the interval of a difference.
        seed: See `bootstrap`.
    """
    finite = np.isfinite(values)
    filled = np.where(finite, values, 0.0)

    def mean(weights: np.ndarray) -> np.ndarray:
        drawn = weights @ finite.astype(float)
        return weights @ filled / np.where(drawn > 0, drawn, np.nan)

    return bootstrap(mean, len(values), seed=seed)


def auc(scores: Float[np.ndarray, " N"], positive: Bool[np.ndarray, " N"], owner: Int[np.ndarray, " N"]) -> Statistic:
    """Area under the ROC curve: how often a positive scores above a negative, ties counted half (Mann and Whitney).

    Args:
        scores: Scores, higher for positives.
        positive: Which are positives.
        owner: Which prompt each belongs to, counted from 0.

    Returns:
        A statistic for `bootstrap`: from how often each of P prompts was drawn, [K, P], to the areas, [K]; NaN without
        positives or without negatives.
    """
    order = np.flatnonzero(~positive)[np.argsort(scores[~positive])]
    negatives, negative_owner, positive_owner = scores[order], owner[order], owner[positive]
    # Each positive wins against the negatives before `lower`, and half against those up to `upper`.
    lower, upper = (np.searchsorted(negatives, scores[positive], side) for side in ("left", "right"))

    def area(weights: np.ndarray) -> float:
        drawn = weights[positive_owner]
        before = np.concatenate([[0], np.cumsum(weights[negative_owner])])
        pairs = drawn.sum() * before[-1]
        return drawn @ (before[lower] + before[upper]) / (2 * pairs) if pairs else np.nan

    def areas(weights: np.ndarray) -> np.ndarray:
        return np.array([area(one) for one in weights])

    return areas


def correlation(
    one: Float[np.ndarray, " N"], other: Float[np.ndarray, " N"], owner: Int[np.ndarray, " N"]
) -> Statistic:
    """Pearson's correlation of two values.

    Args:
        one: Values.
        other: Values of the same items.
        owner: Which prompt each item belongs to, counted from 0.

    Returns:
        A statistic for `bootstrap`, see `auc`.
    """
    count = owner.max() + 1
    products = (np.ones_like(one), one, other, one * one, other * other, one * other)
    sums = np.stack([np.bincount(owner, values, count) for values in products], axis=1)

    def correlations(weights: np.ndarray) -> np.ndarray:
        total, *moments = (weights @ sums).T
        x, y, xx, yy, xy = (moment / total for moment in moments)
        spread = (xx - x * x) * (yy - y * y)
        return (xy - x * y) / np.sqrt(np.where(spread > 0, spread, np.nan))

    return correlations


def rank_correlation(
    one: Float[np.ndarray, " N"], other: Float[np.ndarray, " N"], owner: Int[np.ndarray, " N"]
) -> Statistic:
    """Spearman's rank correlation: that of the ranks among all items; see `correlation`."""
    return correlation(rankdata(one), rankdata(other), owner)
