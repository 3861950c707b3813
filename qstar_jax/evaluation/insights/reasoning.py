"""Reasoning: do labels of outcomes alone tell which step of a solution is false?

The paper's discussion supposes so, and runs nothing: summed over a prefix, Eq. 10 makes the log-ratio of a trained
policy the value of the prefix. In tiny-sums every step, and the exact value of every prefix, is known.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from jaxtyping import Float, Int

from qstar_jax.evaluation.insights.record import Finding, Record
from qstar_jax.evaluation.intervals import Interval, Statistic, auc, bootstrap, mean_interval, rank_correlation
from qstar_jax.evaluation.scored import ScoredResponse
from qstar_jax.evaluation.steps import calibrate_threshold, first_error, first_error_accuracy, step_totals
from qstar_jax.evaluation.votes import Candidates, accuracies, best_by, vote_by
from qstar_jax.tasks.tiny_sums.oracle import prefix_success, soft_value
from qstar_jax.tasks.tiny_sums.sums import DELIMITER, read_answer, read_sum, true_reward

PRM, DPO = "implicit PRM", "DPO"
REFERENCE, ENTROPY, OUTCOME, RANDOM, CEILING = "log pi_ref", "entropy", "outcome reward", "random", "exact advantage"
F1, AUC = "F1 of first errors", "AUC of false steps"
SIZES = (1, 2, 4, 8, 16, 32, 64)
_WEIGHTS = {PRM: "sigmoid", DPO: "softmax"}  # of votes: a logit, and a reward that is known up to a constant


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
            f"{dpo.rank_correlation:.2f}. Of {self.sizes[-1]} samples, the best by reward is right in "
            f"{last[best(DPO, 'sum')].mean:.0%} of the sums, the majority in {last['majority'].mean:.0%}.",
            reproduced=reproduced,
            command=self.COMMAND,
        )


def best(policy: str, total: str) -> str:
    """Name of the selection by a total of a policy's step rewards."""
    return best_by(f"{policy}, {total}")


def vote(policy: str, total: str) -> str:
    """Name of the vote that a total of a policy's step rewards weights."""
    return vote_by(f"{policy}, {total}")


@dataclass(frozen=True)
class HeldOut:
    """Held-out solutions, scored.

    Attributes:
        rows: Rows of the split `steps`.
        scored: Trained policy -> its scores of all rows.
        entropy: Entropy of the reference before each token, in nats; of each row. Shape [T] each.
    """

    rows: Sequence[dict]
    scored: Mapping[str, Sequence[ScoredResponse]]
    entropy: Sequence[Float[np.ndarray, " T"]]


@dataclass(frozen=True)
class Sampled:
    """Samples of the reference for held-out sums, scored, and what searches found for the same sums.

    Attributes:
        prompts: The sums.
        scored: Trained policy -> for each sum, its scores of the samples, as many as the largest of `SIZES`.
        searched: Method -> the response to each sum.
        budget: Samples whose tokens each search generated.
    """

    prompts: Sequence[str]
    scored: Mapping[str, Sequence[Sequence[ScoredResponse]]]
    searched: Mapping[str, Sequence[str]]
    budget: int


def measure_reasoning(
    held_out: HeldOut,
    sampled: Sampled,
    *,
    seed: int,
    trained_on: Mapping[str, int],
    out: Path,
) -> Reasoning:
    """Compares step rewards with the truth, selects and searches, and writes reasoning.json.

    Args:
        held_out: Scored solutions; thresholds come from the first half of them, everything else from the second.
        sampled: Scored samples, and what was searched.
        seed: Seed of everything that was drawn.
        trained_on: See `Reasoning`.
        out: Folder for the record.
    """
    betas = {name: scored[0].beta for name, scored in held_out.scored.items()}
    half = len(held_out.rows) // 2
    calibration, measured = (_Steps(held_out, part, betas, seed) for part in (slice(half), slice(half, None)))
    selection, choice = _select(sampled)
    record = Reasoning(
        seed=seed,
        betas=betas,
        trained_on=dict(trained_on),
        solutions=len(measured.rows),
        success=float(np.mean([prefix_success(read_sum(row["prompt"]), "") for row in held_out.rows])),
        scores=tuple(measured.score(name, calibration) for name in measured.scores),
        sizes=SIZES,
        selection={name: tuple(map(mean_interval, values.T)) for name, values in selection.items()},
        search=tuple(Searched(name, mean_interval(values)) for name, values in choice.items()),
        differences=measured.gains(calibration) | _selection_gains(selection) | _search_gains(choice),
    )
    record.write(out)
    return record


class _Steps:
    """The steps of some held-out solutions, and every score of them, low where an error is suspected."""

    def __init__(self, held_out: HeldOut, part: slice, betas: Mapping[str, float], seed: int):
        self.rows = held_out.rows[part]
        scored = {name: responses[part] for name, responses in held_out.scored.items()}
        entropy = held_out.entropy[part]
        reference = next(iter(scored.values()))
        counts = [len(row["slips"]) for row in self.rows]
        random = np.random.default_rng(seed)
        rewards = {
            name: [step_sums(one.reward, one)[:n] for one, n in zip(responses, counts, strict=True)]
            for name, responses in scored.items()
        }
        totals = [np.full(n, one.total_reward) for one, n in zip(scored[PRM], counts, strict=True)]
        self.scores: dict[str, list[np.ndarray]] = rewards | {
            REFERENCE: [_step_minima(one.ref_logp, one)[:n] for one, n in zip(reference, counts, strict=True)],
            ENTROPY: [_step_minima(-e, one)[:n] for e, one, n in zip(entropy, reference, counts, strict=True)],
            OUTCOME: totals,
            RANDOM: [random.random(n) for n in counts],
        }
        # Values are compared at the temperature of each policy; ceilings at that of the first.
        values = {name: [_values(row, beta) for row in self.rows] for name, beta in betas.items()}
        self.scores[CEILING] = [np.diff(one) for one in values[PRM]]
        references = [step_sums(one.ref_logp, one)[:n] for one, n in zip(reference, counts, strict=True)]
        self._running = {name: (rewards[name], values[name]) for name in rewards}
        self._running[REFERENCE] = (references, values[PRM])
        self.truth = np.array([row["first_error"] for row in self.rows])
        self._owner = np.arange(len(self.rows))
        # Steps after the first error go on from a wrong number: no label of first errors speaks of them.
        self._seen = [n if k < 0 else k + 1 for n, k in zip(counts, self.truth, strict=True)]
        self._false = np.concatenate([np.arange(n) == k for n, k in zip(self._seen, self.truth, strict=True)])

    def score(self, name: str, calibration: "_Steps") -> StepScore:
        """Measures one score."""
        on_false, on_right, f1 = (self._bootstrap(one) for one in self._first_errors(name, calibration))
        correlation = self._correlation(name)
        return StepScore(
            score=name,
            f1=f1,
            on_false=on_false,
            on_right=on_right,
            auc=self._bootstrap(self._area(name)),
            rank_correlation=None if correlation is None else self._bootstrap(correlation),
        )

    def gains(self, calibration: "_Steps") -> dict[str, dict[str, Interval]]:
        """What the step rewards gain over every control."""
        statistics = {
            F1: {name: self._first_errors(name, calibration)[2] for name in self.scores},
            AUC: {name: self._area(name) for name in self.scores},
        }
        return {
            measure: {
                f"{policy} - {control}": self._bootstrap(_difference(by_score[policy], by_score[control]))
                for policy in (PRM, DPO)
                for control in (REFERENCE, ENTROPY, OUTCOME, RANDOM)
            }
            for measure, by_score in statistics.items()
        }

    def _bootstrap(self, statistic: Statistic) -> Interval:
        return bootstrap(statistic, len(self.rows))

    def _first_errors(self, name: str, calibration: "_Steps") -> tuple[Statistic, Statistic, Statistic]:
        threshold = calibrate_threshold(calibration.scores[name], calibration.truth)
        predicted = [first_error(scores, threshold) for scores in self.scores[name]]
        return first_error_accuracy(predicted, self.truth, self._owner)

    def _area(self, name: str) -> Statistic:
        scores = np.concatenate([scores[:n] for scores, n in zip(self.scores[name], self._seen, strict=True)])
        return auc(-scores, self._false, np.repeat(self._owner, self._seen))

    def _correlation(self, name: str) -> Statistic | None:
        """Of the running sum with the exact value less that of the start, which a policy's rewards leave out."""
        if name not in self._running:
            return None
        steps, values = self._running[name]
        running = np.concatenate([np.cumsum(one) for one in steps])
        exact = np.concatenate([one[1:] - one[0] for one in values])
        return rank_correlation(running, exact, np.repeat(self._owner, list(map(len, steps))))


def _difference(one: Statistic, other: Statistic) -> Statistic:
    return lambda weights: one(weights) - other(weights)


def _values(row: dict, beta: float) -> Float[np.ndarray, " steps+1"]:
    """Exact value before the first and after each step."""
    asked, text = read_sum(row["prompt"]), row["completion"]
    ends = [0] + [place + 1 for place, character in enumerate(text) if character == DELIMITER]
    return soft_value(np.array([prefix_success(asked, text[:end]) for end in ends]), beta)


def _step_of_token(scored: ScoredResponse) -> Int[np.ndarray, " T"]:
    ends = np.array([DELIMITER in piece for piece in scored.pieces])
    return np.cumsum(ends) - ends


def step_sums(values: Sequence[float], scored: ScoredResponse) -> Float[np.ndarray, " steps"]:
    """Sums the numbers of the tokens of each step; the last one holds the answer and the end of the response."""
    return np.bincount(_step_of_token(scored), values)


def _step_minima(values: Sequence[float], scored: ScoredResponse) -> Float[np.ndarray, " steps"]:
    steps = _step_of_token(scored)
    return np.array([np.asarray(values)[steps == step].min() for step in range(steps.max() + 1)])


def _select(sampled: Sampled) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Accuracy of every selection, [questions, SIZES], and of every search and its equals, [questions]."""
    shown: dict[str, np.ndarray] = {}
    for policy, questions in sampled.scored.items():
        candidates = [_candidates(*question, policy) for question in zip(sampled.prompts, questions, strict=True)]
        shown |= accuracies(candidates, SIZES, weight=_WEIGHTS[policy])
    # In the order of the table: what is between chance and the oracle.
    shown["oracle"] = shown.pop("oracle")
    choice = {
        name: np.array([true_reward(*pair) for pair in zip(sampled.prompts, found, strict=True)])
        for name, found in sampled.searched.items()
    }
    place = SIZES.index(sampled.budget)
    equal = {name: shown[name][:, place] for name in ("chance", "majority", best(DPO, "sum"), best(DPO, "min"))}
    return shown, choice | {f"{name} of {sampled.budget}": values for name, values in equal.items()}


def _candidates(prompt: str, samples: Sequence[ScoredResponse], policy: str) -> Candidates:
    texts = ["".join(one.pieces).removesuffix("<eos>") for one in samples]
    answers = [read_answer(text) for text in texts]
    totals = [step_totals(step_sums(one.reward, one)) for one in samples]
    return Candidates(
        correct=np.array([true_reward(prompt, text) == 1.0 for text in texts]),
        answers=[None if answer is None else str(answer) for answer in answers],
        scores={
            f"{policy}, sum": np.array([total.sum for total in totals]),
            f"{policy}, min": np.array([total.min for total in totals]),
        },
    )


def _selection_gains(selection: Mapping[str, np.ndarray]) -> dict[str, dict[str, Interval]]:
    last, majority = SIZES[-1], selection["majority"][:, -1]
    names = [name for name in selection if name not in ("chance", "majority", "oracle")]
    gains = {f"{name} - majority": mean_interval(selection[name][:, -1] - majority) for name in names}
    return {f"accuracy of {last}": gains}


def _search_gains(choice: Mapping[str, np.ndarray]) -> dict[str, dict[str, Interval]]:
    beams = [name for name in choice if "beams" in name]
    equal = next(name for name in choice if name.startswith(best(DPO, "sum")))
    return {"accuracy at equal tokens": {f"{b} - {equal}": mean_interval(choice[b] - choice[equal]) for b in beams}}
