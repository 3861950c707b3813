"""Selection among N responses to a question: best of N, votes, and what chance and an oracle would select.

From K stored responses, the expected accuracy of selecting among N of them is averaged over subsets of size N: in
closed form where there is one, else over all subsets, or over many random ones. All of it is arrays in, numbers out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import combinations
from math import comb
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float
from scipy.special import expit

from qstar_jax.errors import InputError

CHANCE, MAJORITY, ORACLE = "chance", "majority", "oracle"
SUBSETS = 1024
Weight = Literal["sigmoid", "softmax", "identity"]


def best_by(score: str) -> str:
    """Name of the method that selects the response of the highest score."""
    return f"best by {score}"


def vote_by(score: str) -> str:
    """Name of the vote that a score weights."""
    return f"vote by {score}"


@dataclass(frozen=True)
class Candidates:
    """The K responses to one question.

    Attributes:
        correct: Whether each is right. Shape [K].
        answers: Final answer of each, normalized; None: it gives none, and has no vote.
        scores: Name -> score of each response, higher for better ones. Shape [K] each.
    """

    correct: Bool[np.ndarray, " K"]
    answers: Sequence[str | None]
    scores: dict[str, Float[np.ndarray, " K"]] = field(default_factory=dict)

    def __post_init__(self):
        """Checks that every response has everything."""
        lengths = {"correct": len(self.correct), "answers": len(self.answers)}
        lengths |= {name: len(values) for name, values in self.scores.items()}
        if len(set(lengths.values())) > 1 or not len(self.correct):
            raise ValueError(f"expected one entry per response in each field, and at least one; found {lengths}")
        for name, values in self.scores.items():
            if not np.isfinite(values).all():
                bad = int(np.argmin(np.isfinite(values)))
                raise InputError(f"score {name!r} of response {bad + 1} of a question is not finite ({values[bad]})")


def oracle(correct: Bool[np.ndarray, " K"], n: int) -> float:
    """Probability that one of n responses, drawn without replacement, is right (pass@n).

    References:
        Chen et al., arXiv 2107.03374, Eq. 1.
    """
    count, wrong = len(correct), int(np.sum(~np.asarray(correct, bool)))
    return 1 - comb(wrong, n) / comb(_checked(count, n), n)


def best_of_n(correct: Bool[np.ndarray, " K"], scores: Float[np.ndarray, " K"], n: int) -> float:
    """Probability that the best-scored of n responses, drawn without replacement, is right; ties are split evenly.

    The response of rank i (from 0) is the best of C(K - 1 - i, n - 1) of the C(K, n) subsets.

    Args:
        correct: Whether each response is right. Shape [K].
        scores: Score of each. Shape [K].
        n: Size of the subsets, 1 .. K.
    """
    chances = _chances_of_ranks(_checked(len(correct), n), n)
    _, level = np.unique(-np.asarray(scores), return_inverse=True)
    # By symmetry, all responses of one score are equally likely to be selected.
    share = np.bincount(level, correct) / np.bincount(level)
    return float(chances @ share[np.sort(level)])


def vote(
    correct: Bool[np.ndarray, " K"],
    answers: Sequence[str | None],
    weights: Float[np.ndarray, " K"],
    subsets: Bool[np.ndarray, "S K"],
) -> float:
    """Probability that the answer with the most weight in a subset is right, over some subsets.

    Answers with equal weight share the vote evenly. If responses with the same answer are not all right or all wrong,
    their answer is right to the share of those that are. A subset in which no response gives an answer elects nothing.

    Args:
        correct: Whether each response is right. Shape [K].
        answers: Final answer of each; None: none. Shape [K].
        weights: Weight of each vote; ones: the majority. Shape [K].
        subsets: Which responses each subset has, see `draw_subsets`. Shape [S, K].
    """
    voters = np.array([answer is not None for answer in answers])
    if not voters.any():
        return 0.0
    _, group = np.unique([answer for answer in answers if answer is not None], return_inverse=True)
    member = np.zeros((len(answers), group.max() + 1))
    member[voters, group] = 1.0
    drawn = subsets.astype(float)
    count, right, total = (drawn @ (member * np.asarray(x)[:, None]) for x in (np.ones(len(answers)), correct, weights))
    total = np.where(count > 0, total, -np.inf)
    highest = total.max(1, keepdims=True)
    # Sums of equal weights in another order may differ in their last digits.
    tolerance = 1e-9 * (drawn @ np.abs(weights))[:, None]
    elected = (count > 0) & (total >= highest - tolerance)
    share = right / np.maximum(count, 1)
    return float((np.sum(share * elected, 1) / np.maximum(elected.sum(1), 1)).mean())


def vote_weights(scores: Float[np.ndarray, " K"], weight: Weight) -> Float[np.ndarray, " K"]:
    """Weights of votes from the scores of the responses to one question.

    Args:
        scores: Scores, for example implicit rewards. Shape [K].
        weight: `sigmoid`: sigma(score), the probability of being right where the score was fitted to labels as a logit
            (implicit_prm); `softmax`: exp(score) up to a factor, which does not change if a constant is added to all
            scores of a question, as DPO's rewards are known up to one; `identity`: the score itself.

    Returns:
        Weights. Shape [K].
    """
    scores = np.asarray(scores, float)
    if weight == "identity":
        return scores
    return expit(scores) if weight == "sigmoid" else np.exp(scores - scores.max())


def draw_subsets(count: int, n: int, *, limit: int = SUBSETS, seed: int = 0) -> Bool[np.ndarray, "S K"]:
    """All subsets of n among `count` responses if they are at most `limit`, else that many random ones.

    Returns:
        Which responses each subset has. Shape [S, count].
    """
    rows, columns = comb(_checked(count, n), n), count
    if rows <= limit:
        chosen = np.array(list(combinations(range(count), n)))
    else:
        rows = limit
        chosen = np.random.default_rng(seed).random((rows, columns)).argsort(1)[:, :n]
    subsets = np.zeros((rows, columns), bool)
    np.put_along_axis(subsets, chosen, True, axis=1)
    return subsets


def accuracies(
    questions: Sequence[Candidates],
    sizes: Sequence[int],
    *,
    weight: Weight = "sigmoid",
    limit: int = SUBSETS,
    seed: int = 0,
) -> dict[str, Float[np.ndarray, "Q M"]]:
    """Accuracy of every way to select among N responses, for each question and each N.

    Args:
        questions: Q questions that have the same scores, each with at least max(sizes) responses.
        sizes: M numbers of responses N to select among.
        weight: How scores weight votes, see `vote_weights`.
        limit: Subsets over which a vote is averaged, see `draw_subsets`.
        seed: Seed of random subsets.

    Returns:
        Method -> accuracies: "chance", "majority", then "best by NAME" and "vote by NAME" of each score, and "oracle".
        Shape [Q, M] each; `intervals.mean_interval` of a column gives its mean with an interval, and of the difference
        of two columns that of a gain.

    Raises:
        ValueError: If a question has fewer responses, or other scores than the first.
    """
    names = list(questions[0].scores) if questions else []
    generator = np.random.default_rng(seed)
    drawn = cache(lambda count, n: draw_subsets(count, n, limit=limit, seed=seed))
    rows: list[dict[str, list[float]]] = []
    for question in questions:
        if list(question.scores) != names:
            raise ValueError(f"questions have different scores: {names} and {list(question.scores)}")
        # Questions share the subsets, but not which response is which, so that their errors are independent.
        order = generator.permutation(len(question.correct))
        correct = np.asarray(question.correct, bool)[order]
        answers = [question.answers[i] for i in order]
        scores = {name: np.asarray(values, float)[order] for name, values in question.scores.items()}
        votes = {MAJORITY: np.ones(len(order))}
        votes |= {vote_by(name): vote_weights(values, weight) for name, values in scores.items()}
        row: dict[str, list[float]] = {CHANCE: [float(correct.mean())] * len(sizes), MAJORITY: []}
        row |= {best_by(name): [best_of_n(correct, values, n) for n in sizes] for name, values in scores.items()}
        for n in sizes:
            subsets = drawn(len(order), n)
            for name, weights in votes.items():
                row.setdefault(name, []).append(vote(correct, answers, weights, subsets))
        rows.append(row | {ORACLE: [oracle(correct, n) for n in sizes]})
    return {name: np.array([row[name] for row in rows]) for name in (rows[0] if rows else ())}


@cache
def _chances_of_ranks(count: int, n: int) -> Float[np.ndarray, " K"]:
    """Probability that the response of each rank is the best of a subset of n."""
    return np.array([comb(count - 1 - i, n - 1) / comb(count, n) for i in range(count)])


def _checked(count: int, n: int) -> int:
    if not 1 <= n <= count:
        raise ValueError(f"n is {n}; expected 1 to {count}, the number of responses")
    return count
