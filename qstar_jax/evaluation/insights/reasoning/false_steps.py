"""How well step rewards find the false steps of held-out solutions, beside the controls and the exact values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float

from qstar_jax.evaluation import step_marks
from qstar_jax.evaluation.insights.reasoning.record import (
    AUC,
    CEILING,
    DPO,
    ENTROPY,
    F1,
    OUTCOME,
    PRM,
    RANDOM,
    REFERENCE,
    StepScore,
)
from qstar_jax.evaluation.insights.steps import calibrated_thresholds, detector_statistics
from qstar_jax.evaluation.intervals import Interval, Statistic, bootstrap, rank_correlation
from qstar_jax.evaluation.scored import ScoredResponse
from qstar_jax.evaluation.step_marks import JudgedSteps, after_first_error, step_scores
from qstar_jax.tasks.tiny_sums.oracle import prefix_success, soft_value
from qstar_jax.tasks.tiny_sums.sums import DELIMITER, read_sum


@dataclass(frozen=True)
class HeldOut:
    """Held-out solutions, scored.

    Attributes:
        rows: Rows of the split `steps`.
        scored: Trained policy -> its scores of all rows, with their steps and the entropies of the reference.
    """

    rows: Sequence[dict]
    scored: Mapping[str, Sequence[ScoredResponse]]

    @property
    def betas(self) -> dict[str, float]:
        """Temperature of each trained policy."""
        return {name: scored[0].beta for name, scored in self.scored.items()}

    @cached_property
    def values(self) -> dict[str, list[Float[np.ndarray, " steps+1"]]]:
        """Exact values before the first and after each step of each solution, at the temperature of each policy."""
        success = [_success(row) for row in self.rows]
        return {name: [soft_value(one, beta) for one in success] for name, beta in self.betas.items()}

    def part(self, rows: slice) -> "HeldOut":
        """Some of the solutions."""
        return HeldOut(self.rows[rows], {name: scored[rows] for name, scored in self.scored.items()})

    def judge(self, seed: int) -> list[JudgedSteps]:
        """Scores the steps of each solution, without the answer after them, by each policy, control and ceiling."""
        random, judged = np.random.default_rng(seed), []
        for number, row in enumerate(self.rows):
            count = len(row["slips"])
            found = {name: step_scores(scored[number]) for name, scored in self.scored.items()}
            scores = {name: detectors[step_marks.REWARD] for name, detectors in found.items()}
            scores |= {name: found[PRM][detector] for name, detector in _CONTROLS.items()}
            # Policies are compared with one ceiling, at the temperature of the first.
            scores |= {RANDOM: random.random(count), CEILING: np.diff(self.values[PRM][number])}
            scores = {name: values[:count] for name, values in scores.items()}
            judged.append(JudgedSteps(scores, after_first_error(row["first_error"], count), number))
        return judged


_CONTROLS = {
    REFERENCE: step_marks.REFERENCE,
    ENTROPY: step_marks.ENTROPY,
    OUTCOME: step_marks.OUTCOME,
}  # the name of each in the record -> the detector


class FalseSteps:
    """The false steps of some solutions, and what every score of steps finds of them.

    Args:
        calibration: Solutions that set thresholds.
        measured: Solutions that are measured.
        seed: Seed of the random control.
    """

    def __init__(self, calibration: HeldOut, measured: HeldOut, seed: int):
        thresholds, judged = calibrated_thresholds(calibration.judge(seed)), measured.judge(seed)
        self._owner, self._names = np.arange(len(judged)), list(judged[0].scores)
        self._statistics = {
            name: detector_statistics(judged, self._owner, name, thresholds[name]) for name in self._names
        }
        running = {name: [one.scores[name] for one in judged] for name in measured.scored}
        running[REFERENCE] = [
            np.bincount(one.step, one.ref_logp)[: len(row["slips"])]
            for one, row in zip(measured.scored[PRM], measured.rows, strict=True)
        ]
        values = measured.values
        self._correlations = {
            name: _correlation(steps, values.get(name, values[PRM]), self._owner) for name, steps in running.items()
        }

    def scores(self) -> tuple[StepScore, ...]:
        """Measures every score."""
        return tuple(
            StepScore(
                score=name,
                f1=self._interval(self._statistics[name]["f1"]),
                on_false=self._interval(self._statistics[name]["erroneous"]),
                on_right=self._interval(self._statistics[name]["correct"]),
                auc=self._interval(self._statistics[name]["auc"]),
                rank_correlation=self._interval(self._correlations[name]) if name in self._correlations else None,
            )
            for name in self._names
        )

    def gains(self) -> dict[str, dict[str, Interval]]:
        """Measures what the step rewards gain over every control."""
        return {
            measure: {
                f"{policy} - {control}": self._gain(policy, control, kind)
                for policy in (PRM, DPO)
                for control in (*_CONTROLS, RANDOM)
            }
            for measure, kind in ((F1, "f1"), (AUC, "auc"))
        }

    def _gain(self, policy: str, control: str, kind: str) -> Interval:
        one, other = self._statistics[policy][kind], self._statistics[control][kind]
        return self._interval(lambda weights: one(weights) - other(weights))

    def _interval(self, statistic: Statistic) -> Interval:
        return bootstrap(statistic, len(self._owner))


def _success(row: dict) -> Float[np.ndarray, " steps+1"]:
    """Exact probability of the right answer before the first and after each step."""
    asked, text = read_sum(row["prompt"]), row["completion"]
    ends = [0] + [place + 1 for place, character in enumerate(text) if character == DELIMITER]
    return np.array([prefix_success(asked, text[:end]) for end in ends])


def _correlation(steps: Sequence[np.ndarray], values: Sequence[np.ndarray], owner: np.ndarray) -> Statistic:
    """Of the running sum with the exact value less that of the start, which a policy's rewards leave out."""
    running = np.concatenate([np.cumsum(one) for one in steps])
    exact = np.concatenate([one[1:] - one[0] for one in values])
    return rank_correlation(running, exact, np.repeat(owner, list(map(len, steps))))
