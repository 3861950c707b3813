"""Do step rewards, learned from outcomes alone, find the first wrong step of a response?

Measured by the protocol of ProcessBench (see `evaluation.steps`), and as the area under the ROC curve of wrong steps,
beside detectors that know nothing of steps (the outcome reward) or nothing of preferences.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Int

from qstar_jax.errors import InputError
from qstar_jax.evaluation.insights.record import Finding, Record
from qstar_jax.evaluation.intervals import Interval, Statistic, auc, bootstrap
from qstar_jax.evaluation.step_marks import ENDOGENOUS, REWARD, RIGHT, UNKNOWN, VALUE, WRONG, JudgedSteps
from qstar_jax.evaluation.steps import ALL_RIGHT, calibrate_threshold, first_error, first_error_accuracy

_PROCESS = (REWARD, VALUE, ENDOGENOUS)  # what the trained policy says of each step; all others are controls


@dataclass(frozen=True)
class StepDetector:
    """How well one detector finds errors.

    Attributes:
        f1: Harmonic mean of the two accuracies.
        erroneous: Accuracy on responses with an error: the share whose first wrong step is predicted.
        correct: Accuracy on responses without: the share in which no step is suspected.
        auc: Area under the ROC curve of wrong steps among those known to be right or wrong.
        threshold: Steps that score below it are suspected.
    """

    f1: Interval
    erroneous: Interval
    correct: Interval
    auc: Interval
    threshold: float


@dataclass(frozen=True)
class Gain:
    """What the step reward gains over a control.

    Attributes:
        f1: Difference of F1.
        auc: Difference of the areas.
    """

    f1: Interval
    auc: Interval


@dataclass(frozen=True)
class StepErrors(Record):
    """steps.json: how well step rewards find first errors, beside other detectors.

    Attributes:
        model: Name of the policy.
        reference: Name of its reference.
        beta: Temperature of the rewards: reward per nat.
        questions: How many prompts were measured.
        calibration_questions: How many other prompts calibrated the thresholds.
        responses: How many responses were measured.
        erroneous: How many of them have an error.
        steps: How many steps they have.
        wrong_steps: How many of these are known to be wrong.
        right_steps: How many are known to be right.
        detectors: Detector -> what it finds.
        gains: Control -> what the step reward gains over it.
        given_threshold: Whether the threshold of the step reward was given, not calibrated.
        scores: SHA-256 of the scores.jsonl that was measured.
    """

    NAME: ClassVar[str] = "steps"
    COMMAND: ClassVar[str] = "qstar score --steps --wrong_step COLUMN"

    model: str
    reference: str
    beta: float
    questions: int
    calibration_questions: int
    responses: int
    erroneous: int
    steps: int
    wrong_steps: int
    right_steps: int
    detectors: dict[str, StepDetector]
    gains: dict[str, Gain]
    given_threshold: bool = False
    scores: str = ""

    def finding(self) -> Finding:
        """Reproduced where the step reward finds first errors better than every control."""
        gains = [gain.f1 for gain in self.gains.values()]
        reproduced = None
        if all(gain.low > 0 for gain in gains):
            reproduced = True
        elif any(gain.high < 0 for gain in gains):
            reproduced = False
        reward = self.detectors[REWARD]
        controls = ", ".join(f"{name} {self.detectors[name].f1:.2f}" for name in self.gains)
        return Finding(
            insight="steps",
            title="First errors",
            claim="Trained on outcomes of whole responses, the rewards of steps find the first wrong step more often "
            "than detectors that know nothing of steps, or nothing of preferences.",
            paper="Outcomes alone may teach credit for intermediate steps (discussion; no number). Yuan et al. (arXiv "
            "2412.01981) measure it for larger models.",
            measured=f"F1 of first errors {reward.f1:.2f}, AUC of wrong steps {reward.auc:.2f}, for {self.responses} "
            f"responses to {self.questions} prompts, {self.erroneous} of them with an error. Controls, F1: {controls}.",
            reproduced=reproduced,
            command=self.COMMAND,
        )


def compute_step_errors(
    judged: Sequence[JudgedSteps],
    *,
    model: str,
    reference: str,
    beta: float,
    calibration: float = 0.5,
    threshold: float | None = None,
    seed: int = 0,
) -> StepErrors:
    """Measures how well step rewards find first errors, beside the controls.

    Args:
        judged: Responses whose steps were scored by the same detectors, `REWARD` among them.
        model: Name of the policy, for the record.
        reference: Name of its reference.
        beta: Temperature of the rewards: reward per nat.
        calibration: Share of the prompts that calibrate thresholds, in (0, 1); the others are measured.
        threshold: Threshold of the step reward; None: calibrated, as those of the controls are.
        seed: Seed of the split and of the bootstrap over prompts.

    Returns:
        The measurements, without the digest of the scores.

    Raises:
        InputError: If one of the two splits has no response with an error, or none without.
    """
    calibrating, measured = split_questions(judged, calibration, seed)
    names = list(measured[0].scores)
    thresholds = calibrated_thresholds(calibrating)
    if threshold is not None:
        thresholds[REWARD] = threshold
    questions = np.unique([response.question for response in measured], return_inverse=True)[1]
    count = int(questions.max()) + 1
    statistics = {name: detector_statistics(measured, questions, name, thresholds[name]) for name in names}

    def interval(statistic: Statistic) -> Interval:
        return bootstrap(statistic, count, seed=seed)

    def gain(control: str, kind: str) -> Interval:
        one, other = statistics[REWARD][kind], statistics[control][kind]
        return interval(lambda weights: one(weights) - other(weights))

    wrong = np.concatenate([response.wrong for response in measured])
    return StepErrors(
        model=model,
        reference=reference,
        beta=beta,
        questions=count,
        calibration_questions=len({response.question for response in calibrating}),
        responses=len(measured),
        erroneous=sum(response.first_error != ALL_RIGHT for response in measured),
        steps=len(wrong),
        wrong_steps=int((wrong == WRONG).sum()),
        right_steps=int((wrong == RIGHT).sum()),
        detectors={
            name: StepDetector(**{kind: interval(s) for kind, s in found.items()}, threshold=thresholds[name])
            for name, found in statistics.items()
        },
        gains={name: Gain(gain(name, "f1"), gain(name, "auc")) for name in names if name not in _PROCESS},
        given_threshold=threshold is not None,
    )


def split_questions(
    judged: Sequence[JudgedSteps], share: float, seed: int = 0
) -> tuple[list[JudgedSteps], list[JudgedSteps]]:
    """Splits responses into those to calibrate with and those to measure; those to a prompt are on the same side.

    Raises:
        InputError: If one side has no response with an error, or none without.
    """
    questions = sorted({response.question for response in judged})
    order = np.random.default_rng(seed).permutation(questions)
    chosen = set(order[: round(share * len(order))].tolist())
    sides = [[r for r in judged if (r.question in chosen) is calibrates] for calibrates in (True, False)]
    for side, name in zip(sides, ("calibration", "measured"), strict=True):
        with_error = sum(response.first_error != ALL_RIGHT for response in side)
        if with_error in (0, len(side)):
            raise InputError(
                f"the {name} split has {with_error} responses with an error and {len(side) - with_error} without; "
                f"expected both: score more rows, or change --calibration {share:g}"
            )
    return sides[0], sides[1]


def calibrated_thresholds(calibrating: Sequence[JudgedSteps]) -> dict[str, float]:
    """Finds the threshold of each detector with the highest F1 of first errors on some responses."""
    truth = [response.first_error for response in calibrating]
    return {
        name: calibrate_threshold([response.scores[name] for response in calibrating], truth)
        for name in calibrating[0].scores
    }


def detector_statistics(
    measured: Sequence[JudgedSteps], questions: Int[np.ndarray, " R"], name: str, threshold: float
) -> dict[str, Statistic]:
    """Measures what a detector finds, as statistics for the bootstrap over prompts.

    Args:
        measured: Responses that were not calibrated with. R of them.
        questions: Which prompt each responds to, counted from 0. Shape [R].
        name: The detector.
        threshold: Steps that score below it are suspected.

    Returns:
        `f1`, `erroneous`, `correct` and `auc` (see `StepDetector`).
    """
    scores = [response.scores[name] for response in measured]
    predicted = [first_error(s, threshold) for s in scores]
    erroneous, correct, f1 = first_error_accuracy(predicted, [r.first_error for r in measured], questions)
    wrong, owner = np.concatenate([r.wrong for r in measured]), np.repeat(questions, list(map(len, scores)))
    known = wrong != UNKNOWN
    area = auc(-np.concatenate(scores)[known], wrong[known] == WRONG, owner[known])
    return {"f1": f1, "erroneous": erroneous, "correct": correct, "auc": area}
