"""95 % intervals by bootstrap over prompts: which of them were drawn varies, and the tokens of one belong together."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

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

    def __format__(self, spec: str) -> str:
        """Formats all three numbers: with ".2f", for example "0.84 [0.81, 0.87]"."""
        return f"{self.mean:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"

    def __str__(self) -> str:
        """For example "0.84 [0.81, 0.87]"."""
        return f"{self:.3g}"


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
    scores: Float[np.ndarray, " N"], positive: Bool[np.ndarray, " N"], owner: Int[np.ndarray, " N"]
) -> Callable[[np.ndarray], np.ndarray]:
    """Area under the ROC curve: how often a positive scores above a negative, ties counted half (Mann and Whitney).

    Args:
        scores: What should be high for positives.
        positive: Which are positives.
        owner: Which prompt each belongs to, counted from 0.

    Returns:
        A figure for `bootstrap`: from how often each of P prompts was drawn, [K, P], to the areas, [K]; NaN where there
        are no positives or no negatives.
    """
    ups, of_ups, count = scores[positive], owner[positive], owner.max() + 1
    downs = [np.sort(scores[~positive & (owner == prompt)]) for prompt in range(count)]
    # [p, q]: how many pairs the positives of prompt p win against the negatives of q.
    won = np.zeros((count, count))
    for q, own in enumerate(downs):
        below = (np.searchsorted(own, ups, "left") + np.searchsorted(own, ups, "right")) / 2
        won[:, q] = np.bincount(of_ups, below, count)
    up_count, down_count = np.bincount(of_ups, minlength=count), np.array([len(own) for own in downs])

    def areas(weights: np.ndarray) -> np.ndarray:
        pairs = (weights @ up_count) * (weights @ down_count)
        return (weights @ won * weights).sum(1) / np.where(pairs > 0, pairs, np.nan)

    return areas
