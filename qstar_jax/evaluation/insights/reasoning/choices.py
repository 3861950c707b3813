"""What step rewards are worth in choosing: among samples of the reference, and among steps while they are found."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qstar_jax.evaluation.insights.reasoning.record import DPO, PRM, best
from qstar_jax.evaluation.intervals import Interval, mean_interval
from qstar_jax.evaluation.scored import ScoredResponse
from qstar_jax.evaluation.votes import CHANCE, MAJORITY, ORACLE, Candidates, accuracies
from qstar_jax.tasks.tiny_sums.sums import read_answer, true_reward

SIZES = (1, 2, 4, 8, 16, 32, 64)
_WEIGHTS = {PRM: "sigmoid", DPO: "softmax"}  # of votes: a logit, and a reward that is known up to a constant


@dataclass(frozen=True)
class Sampled:
    """Samples of the reference for held-out sums, scored, and what searches found for the same sums.

    Attributes:
        prompts: The sums.
        scored: Trained policy -> for each sum, its scores of the samples, with their steps, as many as the largest of
            `SIZES`.
        searched: Method -> the response to each sum.
        budget: Samples whose tokens each search generated.
    """

    prompts: Sequence[str]
    scored: Mapping[str, Sequence[Sequence[ScoredResponse]]]
    searched: Mapping[str, Sequence[str]]
    budget: int


def choose(sampled: Sampled) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Selects among the samples of each sum in every way.

    Returns:
        Accuracy of every selection, [questions, SIZES], and of every search and its equals, [questions].
    """
    shown: dict[str, np.ndarray] = {}
    for policy, questions in sampled.scored.items():
        candidates = [_candidates(*question, policy) for question in zip(sampled.prompts, questions, strict=True)]
        shown |= accuracies(candidates, SIZES, weight=_WEIGHTS[policy])
    # In the order of the table: what is between chance and the oracle.
    shown[ORACLE] = shown.pop(ORACLE)
    choice = {
        name: np.array([true_reward(*pair) for pair in zip(sampled.prompts, found, strict=True)])
        for name, found in sampled.searched.items()
    }
    place = SIZES.index(sampled.budget)
    equal = {name: shown[name][:, place] for name in (CHANCE, MAJORITY, best(DPO, "sum"), best(DPO, "min"))}
    return shown, choice | {f"{name} of {sampled.budget}": values for name, values in equal.items()}


def _candidates(prompt: str, samples: Sequence[ScoredResponse], policy: str) -> Candidates:
    texts = ["".join(one.pieces).removesuffix("<eos>") for one in samples]
    answers = [read_answer(text) for text in texts]
    totals = [one.step_totals for one in samples]
    return Candidates(
        correct=np.array([true_reward(prompt, text) == 1.0 for text in texts]),
        answers=[None if answer is None else str(answer) for answer in answers],
        scores={
            f"{policy}, sum": np.array([total.sum for total in totals]),
            f"{policy}, min": np.array([total.min for total in totals]),
        },
    )


def selection_gains(selection: Mapping[str, np.ndarray]) -> dict[str, dict[str, Interval]]:
    """Measures what each selection gains over the majority, of all samples."""
    last, majority = SIZES[-1], selection[MAJORITY][:, -1]
    names = [name for name in selection if name not in (CHANCE, MAJORITY, ORACLE)]
    gains = {f"{name} - {MAJORITY}": mean_interval(selection[name][:, -1] - majority) for name in names}
    return {f"accuracy of {last}": gains}


def search_gains(choice: Mapping[str, np.ndarray]) -> dict[str, dict[str, Interval]]:
    """Measures what each search over steps gains over the best of samples of as many tokens."""
    beams = [name for name in choice if "beams" in name]
    equal = next(name for name in choice if name.startswith(best(DPO, "sum")))
    return {"accuracy at equal tokens": {f"{b} - {equal}": mean_interval(choice[b] - choice[equal]) for b in beams}}
