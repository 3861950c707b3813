"""The record of the insight: reasoning.json."""

from dataclasses import dataclass
from typing import ClassVar

from qstar_jax.evaluation.insights.record import Finding, Record
from qstar_jax.evaluation.intervals import Interval
from qstar_jax.evaluation.votes import MAJORITY, best_by, vote_by

PRM, DPO = "implicit PRM", "DPO"
REFERENCE, ENTROPY, OUTCOME, RANDOM, CEILING = "log pi_ref", "entropy", "outcome reward", "random", "exact advantage"
F1, AUC = "F1 of first errors", "AUC of false steps"


@dataclass(frozen=True)
class StepScore:
    """How well a score of steps finds the false ones, on held-out solutions.

    Attributes:
        score: Whose step rewards, or which control.
        f1: F1 of first errors; the threshold comes from other solutions.
        on_false: Accuracy on solutions with an error.
        on_right: Accuracy on solutions without.
        auc: Area under the ROC curve of low scores as a detector of first errors among the steps up to them.
        rank_correlation: Spearman's, of the running sum at the ends of steps with the exact value; None without one.
    """

    score: str
    f1: Interval
    on_false: Interval
    on_right: Interval
    auc: Interval
    rank_correlation: Interval | None


@dataclass(frozen=True)
class Searched:
    """One way to find an answer with the same number of generated tokens.

    Attributes:
        method: Its name.
        accuracy: Share of right answers.
    """

    method: str
    accuracy: Interval


@dataclass(frozen=True)
class Reasoning(Record):
    """reasoning.json: what labels of outcomes taught about steps.

    Attributes:
        seed: Seed of the sums, the solutions and the samples.
        betas: Temperature of each trained policy: reward of the labels per nat.
        trained_on: Labelled solutions, or pairs of them, of each trained policy.
        solutions: Held-out solutions that are measured, beside as many for thresholds.
        success: Exact probability that the solver comes out right.
        scores: How well scores of steps find the false ones.
        sizes: Numbers of samples N to select among.
        selection: Method -> accuracy at each N, on held-out sums; samples are the reference's.
        search: Beams over steps and best-of-N, at equal tokens.
        differences: Measure -> comparison -> difference, paired by solution or by sum.
    """

    NAME: ClassVar[str] = "reasoning"
    COMMAND: ClassVar[str] = "qstar demo --insight reasoning"

    seed: int
    betas: dict[str, float]
    trained_on: dict[str, int]
    solutions: int
    success: float
    scores: tuple[StepScore, ...]
    sizes: tuple[int, ...]
    selection: dict[str, tuple[Interval, ...]]
    search: tuple[Searched, ...]
    differences: dict[str, dict[str, Interval]]

    def of(self, score: str) -> StepScore:
        """How well a score finds false steps."""
        return next(one for one in self.scores if one.score == score)

    def finding(self) -> Finding:
        """Reproduced where the step rewards of both policies beat every control, in F1 and in AUC."""
        gains = [gain for measure in (F1, AUC) for gain in self.differences[measure].values()]
        reproduced = None
        if all(gain.low > 0 for gain in gains):
            reproduced = True
        elif any(gain.high < 0 for gain in gains):
            reproduced = False
        prm, dpo, reference, ceiling = map(self.of, (PRM, DPO, REFERENCE, CEILING))
        last = {name: values[-1] for name, values in self.selection.items()}
        return Finding(
            insight="reasoning",
            title="False steps",
            claim="Trained on outcomes alone, a policy's rewards find the first false step of a solution, also where "
            "the slip is as likely as the right step.",
            paper="DPO may learn credit of intermediate steps from outcomes (discussion; nothing was run).",
            measured=f"{F1}: {prm.f1:.2f} from labelled solutions, {dpo.f1:.2f} from pairs; log pi_ref "
            f"{reference.f1:.2f}, exact advantages {ceiling.f1:.2f}. {AUC}: {prm.auc:.3f} and {dpo.auc:.3f}; log "
            f"pi_ref {reference.auc:.3f}. Rank correlation with exact values: {prm.rank_correlation:.2f} and "
            f"{dpo.rank_correlation:.2f}. Of {self.sizes[-1]} samples, the best by DPO's reward is right in "
            f"{last[best(DPO, 'sum')].mean:.0%} of the sums, the majority in {last[MAJORITY].mean:.0%}.",
            reproduced=reproduced,
            command=self.COMMAND,
        )


def best(policy: str, total: str) -> str:
    """Name of the selection by a total of a policy's step rewards."""
    return best_by(f"{policy}, {total}")


def vote(policy: str, total: str) -> str:
    """Name of the vote that a total of a policy's step rewards weights."""
    return vote_by(f"{policy}, {total}")
