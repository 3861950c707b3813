"""95 % intervals by bootstrap over prompts: a prompt is resampled with all its responses and tokens."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import rankdata

RESAMPLES = 1000
LEVEL = 0.95

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
    draws = np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))
    weights = np.apply_along_axis(np.bincount, 1, draws, minlength=count)
    tails = [50 * (1 - LEVEL), 50 * (1 + LEVEL)]
    low, high = np.nanpercentile(statistic(weights), tails)
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
    positives, positive_owner, count = scores[positive], owner[positive], owner.max() + 1
    negatives = [np.sort(scores[~positive & (owner == prompt)]) for prompt in range(count)]
    # wins[p, q]: how many pairs the positives of prompt p win against the negatives of q.
    wins = np.zeros((count, count))
    for q, sorted_scores in enumerate(negatives):
        lower = np.searchsorted(sorted_scores, positives, "left")
        lower_or_equal = np.searchsorted(sorted_scores, positives, "right")
        below = (lower + lower_or_equal) / 2
        wins[:, q] = np.bincount(positive_owner, below, count)
    positive_count = np.bincount(positive_owner, minlength=count)
    negative_count = np.array([len(sorted_scores) for sorted_scores in negatives])

    def areas(weights: np.ndarray) -> np.ndarray:
        pairs = (weights @ positive_count) * (weights @ negative_count)
        return (weights @ wins * weights).sum(1) / np.where(pairs > 0, pairs, np.nan)

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
