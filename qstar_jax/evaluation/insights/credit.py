"""Insight 1, credit assignment: do the lowest token rewards find the wrong tokens of a response?

The paper shows it with coloured pictures (Figure 1 and Appendix C). Here it is a number: the area under the ROC curve
of -reward as a detector of wrong tokens, beside detectors that know nothing of preferences.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool, Float

from qstar_jax.data.loading import read_records
from qstar_jax.evaluation.insights.record import Finding, Record
from qstar_jax.evaluation.intervals import Interval, auc, bootstrap
from qstar_jax.evaluation.marks import MarkedResponse, mark_responses
from qstar_jax.evaluation.score import KINDS, ScoredFile
from qstar_jax.store.identity import file_digest
from qstar_jax.tasks import Task, find

REWARD, REFERENCE, UNIFORM, CEILING = (
    "implicit reward",
    "reference log-probability",
    "uniform split",
    "true advantage",
)
GOOD_AUC = 0.9


@dataclass(frozen=True)
class Kind:
    """Detectors on one kind of mistake.

    Attributes:
        answers: How many responses have a mistake of this kind.
        detectors: Detector -> its area under the ROC curve.
    """

    answers: int
    detectors: dict[str, Interval]


@dataclass(frozen=True)
class Credit(Record):
    """credit.json: how well token rewards find mistakes, beside other detectors.

    Attributes:
        model: Name of the policy.
        reference: Name of its reference.
        beta: Temperature of the rewards: reward per nat.
        answers: How many responses were marked.
        mistakes: How many mistakes they have.
        tokens: How many tokens they have.
        wrong_tokens: How many of these are part of a mistake.
        detectors: Detector -> its area under the ROC curve over all responses.
        kinds: The same for each kind of mistake.
        differences: Control -> area of the implicit reward minus that of the control.
        by_token: `detectors`, if each wrong token counts by itself rather than each mistake once.
        scores: SHA-256 of the scores.jsonl that was measured.
    """

    NAME: ClassVar[str] = "credit"
    COMMAND: ClassVar[str] = "qstar score --wrong COLUMN"

    model: str
    reference: str
    beta: float
    answers: int
    mistakes: int
    tokens: int
    wrong_tokens: int
    detectors: dict[str, Interval]
    kinds: dict[str, Kind]
    differences: dict[str, Interval]
    by_token: dict[str, Interval]
    scores: str = ""

    def finding(self) -> Finding:
        """Reproduced where the reward finds mistakes well, and better than each control."""
        reward, gains = self.detectors[REWARD], self.differences.values()
        reproduced = None
        if reward.mean >= GOOD_AUC and all(gain.low > 0 for gain in gains):
            reproduced = True
        elif reward.high < GOOD_AUC or any(gain.high < 0 for gain in gains):
            reproduced = False
        controls = ", ".join(f"{name} {self.detectors[name]:.3f}" for name in self.differences)
        ceiling = self.detectors.get(CEILING)
        return Finding(
            insight="credit",
            title="Credit assignment",
            claim="Trained on labels of whole responses, the policy gives its lowest token rewards to the tokens that "
            f"are wrong: as a detector of them, the reward has an area under the ROC curve of at least {GOOD_AUC}, and "
            "more than detectors without preferences.",
            paper="Coloured by beta (log pi - log pi_ref), the wrong spans of hand-corrupted summaries stand out, and "
            "the rest hardly changes (Fig. 1, App. C; pictures, no number).",
            measured=f"AUC {reward:.3f} for {self.mistakes} mistakes among {self.tokens} tokens of {self.answers} "
            f"responses. Controls: {controls}." + (f" Ceiling, the true advantage: {ceiling:.3f}." if ceiling else ""),
            reproduced=reproduced,
            command=self.COMMAND,
        )


def measure_credit(scored: ScoredFile) -> tuple[Credit, ScoredFile]:
    """Measures how well low rewards find the tokens that a file marks as wrong, and writes credit.json.

    Args:
        scored: What `qstar score` has scored.

    Returns:
        The measurements, and the scores with the marks, which scores.jsonl now has too.

    Raises:
        InputError: If the marks do not fit the responses.
    """
    config, data = scored.config, scored.config.data
    rows, records, _ = read_records(data.eval, data.eval_split, KINDS[config.answers], data, data.max_eval_rows)
    marked = mark_responses(scored.responses, rows, records, wrong=config.wrong, kind=config.kind, source=data.eval)
    wrong = {m.scored.row: tuple(m.wrong.tolist()) for m in marked}
    responses = [r if r.role == "chosen" else replace(r, wrong=wrong[r.row]) for r in scored.responses]
    scored = replace(scored, responses=responses)
    scored.write()
    if (built_in := find(data.eval)) and built_in[0].advantages:
        marked = _with_true_advantages(marked, rows, built_in[0], scored.tokenizer)
    credit = compute_credit(marked, model=config.model, reference=scored.reference)
    credit = replace(credit, scores=file_digest(scored.path))
    credit.write(scored.out)
    return credit, scored


def _with_true_advantages(
    marked: Sequence[MarkedResponse], rows: Sequence[dict], task: Task, tokenizer: Any
) -> list[MarkedResponse]:
    """Adds the rewards that a perfect policy would give to each token: no detector can do better."""
    advantages = task.advantages(tokenizer, marked[0].scored.beta)
    return [replace(m, advantages=advantages(rows[m.scored.row]["prompt"], m.scored.token_ids)) for m in marked]


def compute_credit(marked: Sequence[MarkedResponse], *, model: str, reference: str, seed: int = 0) -> Credit:
    """Measures how well token rewards find mistakes, beside the controls.

    Each mistake counts once, however many tokens it has, and is scored by its lowest-reward token: which of them is
    blamed is the model's choice (after a wrong first name, the last name that goes with it costs nothing more). Each
    right token counts by itself. The same is done for each detector.

    Args:
        marked: Marked responses, at least one.
        model: Name of the policy, for the record.
        reference: Name of its reference.
        seed: Seed of the bootstrap over responses.

    Returns:
        The measurements, without the digest of the scores.
    """
    names = [name for name, scores in _DETECTORS.items() if all(scores(response) is not None for response in marked)]
    mistakes = [_by_mistake(response, names) for response in marked]
    tokens = [_by_token(response, names) for response in marked]
    controls = [name for name in names if name not in (REWARD, CEILING)]
    kinds = {}
    for kind in dict.fromkeys(response.kind for response in marked):
        units = [units for response, units in zip(marked, mistakes, strict=True) if response.kind == kind]
        kinds[kind] = Kind(len(units), {name: _area(units, name, seed) for name in names})
    return Credit(
        model=model,
        reference=reference,
        beta=marked[0].scored.beta,
        answers=len(marked),
        mistakes=sum(len(response.spans) for response in marked),
        tokens=sum(len(units.wrong) for units in tokens),
        wrong_tokens=int(sum(response.wrong.sum() for response in marked)),
        detectors={name: _area(mistakes, name, seed) for name in names},
        kinds=kinds,
        differences={name: _area(mistakes, REWARD, seed, minus=name) for name in controls},
        by_token={name: _area(tokens, name, seed) for name in names},
    )


# Detector -> the score that it gives to each token, the lowest being the most suspicious; None where it has none.
_DETECTORS: dict[str, Callable[[MarkedResponse], np.ndarray | None]] = {
    REWARD: lambda marked: np.array(marked.scored.reward),
    REFERENCE: lambda marked: np.array(marked.scored.ref_logp),
    UNIFORM: lambda marked: np.full(len(marked.scored.reward), np.mean(marked.scored.action_rewards)),
    CEILING: lambda marked: marked.advantages,
}


@dataclass(frozen=True)
class Units:
    """The units of one response that detectors classify: mistakes and right tokens, or all tokens.

    Attributes:
        scores: Detector -> score of each unit. Shape [U] each.
        wrong: Which units are wrong. Shape [U].
    """

    scores: dict[str, Float[np.ndarray, " U"]]
    wrong: Bool[np.ndarray, " U"]


def _by_mistake(marked: MarkedResponse, names: Sequence[str]) -> Units:
    """Each mistake, scored by its lowest action, and each right action."""
    right, scores = marked.right, {}
    for name in names:
        values = _DETECTORS[name](marked)
        scores[name] = np.concatenate([[values[span].min() for span in marked.spans], values[right]])
    return Units(scores, np.arange(len(marked.spans) + right.sum()) < len(marked.spans))


def _by_token(marked: MarkedResponse, names: Sequence[str]) -> Units:
    """Each action by itself."""
    actions = marked.wrong | marked.right
    return Units({name: _DETECTORS[name](marked)[actions] for name in names}, marked.wrong[actions])


def _area(responses: Sequence[Units], name: str, seed: int, minus: str | None = None) -> Interval:
    """Area under the ROC curve of a detector, perhaps minus that of another, with its bootstrap interval."""
    wrong = np.concatenate([units.wrong for units in responses])
    owner = np.repeat(np.arange(len(responses)), [len(units.wrong) for units in responses])

    def area(detector: str) -> Callable[[np.ndarray], np.ndarray]:
        return auc(-np.concatenate([units.scores[detector] for units in responses]), wrong, owner)

    area_of_name = area(name)
    if minus is None:
        return bootstrap(area_of_name, len(responses), seed=seed)
    area_of_other = area(minus)
    return bootstrap(lambda weights: area_of_name(weights) - area_of_other(weights), len(responses), seed=seed)
