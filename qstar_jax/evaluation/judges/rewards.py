"""A judge made of any scalar reward: the larger one wins."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qstar_jax.evaluation.judges.base import Comparison, Verdict

Reward = Callable[[Sequence[tuple[str, str]]], Sequence[float | None]]  # (prompt, response) pairs -> one reward each


@dataclass(frozen=True)
class RewardJudge:
    """Compares the rewards of both responses; each distinct (prompt, response) is scored once.

    Args:
        name: Name of the judge, for reports.
        reward: Rewards of (prompt, response) pairs, all given at once; None or NaN where one has none.
        tolerance: Rewards that differ by no more than this tie, in units of the reward.
    """

    name: str
    reward: Reward
    tolerance: float = 1e-6

    def __call__(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """See `base.Judge`.

        Raises:
            ValueError: If `reward` does not return one number per pair.
        """
        pairs = list(dict.fromkeys((c.prompt, text) for c in comparisons for text in (c.answer, c.baseline)))
        values = list(self.reward(pairs)) if pairs else []
        if len(values) != len(pairs):
            raise ValueError(f"{self.name}: {len(values)} rewards for {len(pairs)} responses; expected one each")
        rewards = {pair: math.nan if value is None else float(value) for pair, value in zip(pairs, values, strict=True)}
        return [self._verdict(c, rewards[c.prompt, c.answer], rewards[c.prompt, c.baseline]) for c in comparisons]

    def _verdict(self, comparison: Comparison, answer: float, baseline: float) -> Verdict:
        scores = [None if math.isnan(score) else score for score in (answer, baseline)]
        if comparison.answer == comparison.baseline:
            return Verdict(0.5, *scores, note="identical answers")
        if None in scores:
            which = " and ".join(name for name, s in zip(("answer", "baseline"), scores, strict=True) if s is None)
            return Verdict(None, *scores, note=f"no reward of the {which}")
        if answer == baseline or abs(answer - baseline) <= self.tolerance:  # infinite rewards have no difference
            return Verdict(0.5, *scores)
        return Verdict(float(answer > baseline), *scores)
