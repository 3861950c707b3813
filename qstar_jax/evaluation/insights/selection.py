"""Selection: does the implicit reward, trained on outcomes, find the right response among N?

The paper expects outcome labels to give credit to steps (discussion), and runs nothing; the measurements to compare
with are those of Yuan et al. (arXiv 2412.01981): best of N by implicit rewards, beside majority and weighted votes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float

from qstar_jax.errors import InputError
from qstar_jax.evaluation.insights.record import Finding, Record
from qstar_jax.evaluation.intervals import Interval, auc, bootstrap, mean_interval
from qstar_jax.evaluation.step_search import StepSearch
from qstar_jax.evaluation.votes import CHANCE, MAJORITY, ORACLE, SUBSETS, Candidates, Weight, accuracies, best_by

SUM = "sum"  # of all token rewards: the outcome reward
_MOST = 0.9  # share of the questions that have the largest N


@dataclass(frozen=True)
class Separation:
    """How well a score tells right responses from wrong ones, as areas under the ROC curve.

    Attributes:
        overall: Over all responses, of whatever question; None where all are right, or all wrong.
        by_question: Within a question, averaged over questions with right and wrong responses; None without any.
    """

    overall: Interval | None
    by_question: Interval | None


@dataclass(frozen=True)
class Selection(Record):
    """selection.json: how often each way to select among N responses finds a right one.

    Attributes:
        model: Whose rewards score the responses; None without.
        reference: Name of its reference; None without.
        beta: Temperature of the rewards: reward per nat; None without.
        questions: How many questions have enough responses.
        left_out: How many have not.
        responses: How many responses these questions have.
        right: Share of their responses that are right.
        unanswered: How many responses have no final answer.
        disagreements: How many labels of the file differ from what the final answers say; None without labels.
        sizes: Numbers of responses N.
        weight: How scores weight votes.
        methods: Method -> accuracy at each N, averaged over questions.
        gains: "majority" or "chance" -> method -> its gain over that at the largest N, paired by question.
        separation: Score -> how well it tells right from wrong.
        search: Beam searches over steps, beside samples of as many tokens.
    """

    NAME: ClassVar[str] = "selection"
    COMMAND: ClassVar[str] = "qstar select"

    model: str | None
    reference: str | None
    beta: float | None
    questions: int
    left_out: int
    responses: int
    right: float
    unanswered: int
    disagreements: int | None
    sizes: tuple[int, ...]
    weight: str
    methods: dict[str, tuple[Interval, ...]]
    gains: dict[str, dict[str, Interval]]
    separation: dict[str, Separation]
    search: tuple[StepSearch, ...] = ()

    def finding(self) -> Finding:
        """Reproduced where best of N by the summed reward beats the majority at the largest N."""
        gain = self.gains[MAJORITY].get(best_by(SUM))
        reproduced = None
        if gain is not None and gain.low > 0:
            reproduced = True
        elif gain is not None and gain.high < 0:
            reproduced = False
        last = {name: values[-1] for name, values in self.methods.items()}
        words = "; ".join(f"{name} {last[name]:.3f}" for name in last)
        areas = "; ".join(
            f"{name} {area.overall:.3f}" for name, area in self.separation.items() if area.overall is not None
        )
        return Finding(
            insight="selection",
            title="Selection",
            claim="Rewards that were trained on outcomes alone select among N responses: best of N by the summed "
            "implicit reward is right more often than the majority.",
            paper="Outcome labels should give credit to intermediate steps (discussion; nothing was run). Yuan et al. "
            "(arXiv 2412.01981) find implicit rewards above majority votes with weak generators.",
            measured=f"Among {self.sizes[-1]} responses to {self.questions} questions: {words}."
            + (f" AUC of right against wrong: {areas}." if areas else "")
            + "".join(f" {search.in_words()}" for search in self.search),
            reproduced=reproduced,
            command=self.COMMAND,
        )


def choose_sizes(questions: Sequence[Candidates], given: Sequence[int] | None) -> tuple[int, ...]:
    """The numbers of responses N: those given, or powers of two that nine questions in ten have.

    Raises:
        InputError: If they are no different numbers from 1 on, no question has so many, or all have a single response.
    """
    counts = np.sort([len(question.correct) for question in questions])
    most = int(counts[-1])
    if given is None:
        usual = int(counts[int((1 - _MOST) * (len(counts) - 1))])
        given = [2**i for i in range(usual.bit_length())]
        if most == 1:
            raise InputError(
                "every question has a single response: nothing can be selected; expected several rows with the same "
                "prompt, or several responses per prompt (--samples)"
            )
    sizes = tuple(sorted(given))
    if not sizes or sizes[0] < 1 or len(set(sizes)) < len(sizes) or sizes[-1] > most:
        raise InputError(f"--sizes {list(given)}: expected different numbers from 1 to {most}, the most responses")
    return sizes


def compute_selection(
    questions: Sequence[Candidates],
    *,
    sizes: Sequence[int] | None = None,
    weight: Weight = "sigmoid",
    subsets: int = SUBSETS,
    seed: int = 0,
    model: str | None = None,
    reference: str | None = None,
    beta: float | None = None,
    disagreements: int | None = None,
    search: Sequence[StepSearch] = (),
) -> Selection:
    """Measures every way to select, with 95 % intervals by bootstrap over questions.

    Args:
        questions: The responses to each question, all with the same scores.
        sizes: See `choose_sizes`.
        weight: How scores weight votes, see `votes.vote_weights`.
        subsets: See `votes.draw_subsets`.
        seed: Seed of random subsets, and of the bootstrap.
        model: For the record.
        reference: For the record.
        beta: For the record.
        disagreements: For the record.
        search: For the record.

    Raises:
        InputError: See `choose_sizes`.
    """
    sizes = choose_sizes(questions, sizes)
    used = [question for question in questions if len(question.correct) >= sizes[-1]]
    values = accuracies(used, sizes, weight=weight, limit=subsets, seed=seed)
    selecting = [name for name in values if name not in (CHANCE, MAJORITY, ORACLE)]
    gains = {
        base: {name: mean_interval(values[name][:, -1] - values[base][:, -1], seed=seed) for name in names}
        for base, names in ((MAJORITY, selecting), (CHANCE, [MAJORITY, *selecting]))
    }
    correct = np.concatenate([question.correct for question in used])
    return Selection(
        model=model,
        reference=reference,
        beta=beta,
        questions=len(used),
        left_out=len(questions) - len(used),
        responses=len(correct),
        right=float(correct.mean()),
        unanswered=sum(answer is None for question in used for answer in question.answers),
        disagreements=disagreements,
        sizes=sizes,
        weight=weight,
        methods={
            name: tuple(mean_interval(column, seed=seed) for column in columns.T) for name, columns in values.items()
        },
        gains=gains,
        separation=separations(used, seed=seed),
        search=tuple(search),
    )


def separations(questions: Sequence[Candidates], *, seed: int = 0) -> dict[str, Separation]:
    """How well each score tells right responses from wrong ones; see `Separation`."""
    correct = np.concatenate([question.correct for question in questions])
    owner = np.repeat(np.arange(len(questions)), [len(question.correct) for question in questions])
    found = {}
    for name in questions[0].scores:
        scores = np.concatenate([question.scores[name] for question in questions])
        within = np.array([_area(question.scores[name], question.correct) for question in questions])
        overall = None
        if 0 < correct.sum() < len(correct):
            overall = bootstrap(auc(scores, correct, owner), len(questions), seed=seed)
        by_question = mean_interval(within, seed=seed) if np.isfinite(within).any() else None
        found[name] = Separation(overall, by_question)
    return found


def _area(scores: Float[np.ndarray, " K"], correct: np.ndarray) -> float:
    """How often a right response scores above a wrong one, ties counted half; NaN without both."""
    right, wrong = scores[correct][:, None], scores[~correct]
    return float(((right > wrong) + (right == wrong) / 2).mean()) if len(right) and len(wrong) else np.nan
