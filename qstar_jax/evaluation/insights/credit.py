"""Insight 1, credit assignment: do the lowest token rewards find the wrong tokens of an answer?

The paper shows it with coloured pictures (Figure 1 and Appendix C). Here it is a number: the area under the ROC curve
of -reward as a detector of wrong tokens, beside detectors that know nothing of preferences.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from qstar_jax.data.dialogues import text_of
from qstar_jax.data.loading import read_records
from qstar_jax.data.records import Record
from qstar_jax.errors import InputError
from qstar_jax.evaluation.intervals import auc, bootstrap
from qstar_jax.evaluation.marks import marked_tokens, read_marks
from qstar_jax.evaluation.score import KINDS, ScoredFile
from qstar_jax.evaluation.scored import ScoredResponse
from qstar_jax.store.files import write_json
from qstar_jax.store.identity import file_digest
from qstar_jax.tasks import Task, find

REWARD, REFERENCE, UNIFORM, CEILING = (
    "implicit reward",
    "reference log-probability",
    "uniform split",
    "true advantage",
)
UNMARKED = "all"


@dataclass(frozen=True)
class MarkedAnswer:
    """An answer some of whose tokens are known to be wrong.

    Attributes:
        scored: The answer and its rewards.
        spans: For each mistake which tokens make it. Shape [T] each.
        kind: Kind of the mistake.
        advantages: True advantage of each token, where the task knows it. Shape [T].
    """

    scored: ScoredResponse
    spans: tuple[Bool[np.ndarray, " T"], ...]
    kind: str
    advantages: Float[np.ndarray, " T"] | None = None

    @property
    def wrong(self) -> Bool[np.ndarray, " T"]:
        """Which tokens are wrong."""
        return np.any(self.spans, axis=0)


def measure_credit(scored: ScoredFile) -> dict:
    """Measures how well low rewards find the tokens that a file marks as wrong, and writes credit.json.

    Args:
        scored: What `qstar score` has scored.

    Returns:
        What credit.json holds.

    Raises:
        InputError: If the marks do not fit the answers.
    """
    config, data = scored.config, scored.config.data
    rows, records, _ = read_records(data.eval, data.eval_split, KINDS[config.answers], data, data.max_eval_rows)
    marked = mark_answers(scored.responses, rows, records, wrong=config.wrong, kind=config.kind, source=data.eval)
    if built_in := find(data.eval):
        marked = _with_true_advantages(marked, rows, built_in[0], scored.tokenizer)
    record = credit_report(marked, model=config.model, reference=scored.reference)
    record |= {"scores": file_digest(scored.path)}
    write_json(scored.out / "credit.json", record)
    return record


def _with_true_advantages(
    marked: Sequence[MarkedAnswer], rows: Sequence[dict], task: Task, tokenizer: Any
) -> list[MarkedAnswer]:
    """Adds the rewards that a perfect policy would give to each token: no detector can do better."""
    advantages = task.advantages(tokenizer, marked[0].scored.beta)
    return [replace(m, advantages=advantages(rows[m.scored.row]["prompt"], m.scored.token_ids)) for m in marked]


def mark_answers(
    scored: Sequence[ScoredResponse],
    rows: Sequence[dict],
    records: Sequence[Record],
    *,
    wrong: str,
    kind: str,
    source: str,
) -> list[MarkedAnswer]:
    """Brings scored answers and the marks of their rows together.

    Args:
        scored: Answers; those of the role "chosen" are left aside.
        rows: All rows of the file.
        records: What was made of them; the last answer of each is marked.
        wrong: Column of the marks, see `marks.read_marks`.
        kind: Column that names the kind of mistake; rows without it are of the kind "all".
        source: The file, for errors.

    Returns:
        One record for each answer.

    Raises:
        InputError: If a row has no such column, or marks that do not fit its answer.
    """
    read = {record.row: record for record in records}
    found = []
    for answer in scored:
        if answer.role == "chosen":
            continue
        row, record, where = rows[answer.row], read[answer.row], f"{source} row {answer.row + 1}"
        if wrong not in row:
            raise InputError(
                f"{where}: no column {wrong!r} (found: {', '.join(map(repr, row))}); name the one that marks what is "
                "wrong with --wrong"
            )
        text = text_of(record.responses[-1])
        ranges = read_marks(row[wrong], text, where)
        if record.repeats == "removed" and not all(isinstance(mark, str) for mark in row[wrong]):
            raise InputError(
                f"{where}: marks are ranges of characters, but the prompt was taken off the answer; mark texts, or set "
                "--data.repeated_prompt keep"
            )
        spans = tuple(marked_tokens(answer.pieces, text, ranges, where))
        found.append(MarkedAnswer(answer, spans, str(row.get(kind, UNMARKED))))
    return found


def credit_report(answers: Sequence[MarkedAnswer], *, model: str, reference: str, seed: int = 0) -> dict:
    """Measures how well token rewards find mistakes, beside the controls.

    A mistake is one thing to be found, however many tokens it has, and its lowest token speaks for it: which of them is
    blamed is the model's choice (after a wrong first name the last name that goes with it is no further loss). What
    else the answers say is to be told from it token by token. The same is done for each detector.

    Args:
        answers: Marked answers, at least one.
        model: Name of the policy, for the record.
        reference: Name of its reference.
        seed: Of the bootstrap over answers.

    Returns:
        The record that credit.json holds: for each detector the area under the ROC curve with its interval, over all
        answers and for each kind of mistake; what the implicit reward has more than each control; and, as `by_token`,
        the areas where each wrong token is a thing to be found of its own.
    """
    kinds = list(dict.fromkeys(answer.kind for answer in answers))
    spans = [_spans(answer) for answer in answers]
    known = [name for name in _DETECTORS if all(_values(answer, name) is not None for answer in answers)]

    def areas(own: Sequence[Units], names: Sequence[str], minus: str | None = None) -> dict[str, dict[str, float]]:
        return {name: _interval(own, name, seed, minus) for name in names}

    return {
        "model": model,
        "reference": reference,
        "beta": answers[0].scored.beta,
        "answers": len(answers),
        "mistakes": sum(len(answer.spans) for answer in answers),
        "tokens": sum(len(answer.wrong) for answer in answers),
        "wrong_tokens": int(sum(answer.wrong.sum() for answer in answers)),
        "detectors": areas(spans, known),
        "kinds": {
            kind: {"answers": len(own), "detectors": areas(own, known)}
            for kind in kinds
            if (own := [units for answer, units in zip(answers, spans, strict=True) if answer.kind == kind])
        },
        "differences": areas(spans, [name for name in known if name not in (REWARD, CEILING)], REWARD),
        "by_token": areas([_tokens(answer) for answer in answers], known),
    }


@dataclass(frozen=True)
class Units:
    """What is to be told apart in one answer.

    Attributes:
        worth: For each detector the worth of each unit; the lowest are its suspects.
        wrong: Which units are mistakes.
    """

    worth: dict[str, Float[np.ndarray, " U"]]
    wrong: Bool[np.ndarray, " U"]


# What each detector takes for the worth of a token.
_DETECTORS: dict[str, Callable[[MarkedAnswer], np.ndarray | None]] = {
    REWARD: lambda answer: np.array(answer.scored.reward),
    REFERENCE: lambda answer: np.array(answer.scored.ref_logp),
    UNIFORM: lambda answer: np.full(len(answer.scored.reward), answer.scored.total_reward / len(answer.scored.reward)),
    CEILING: lambda answer: answer.advantages,
}


def _values(answer: MarkedAnswer, name: str) -> np.ndarray | None:
    return _DETECTORS[name](answer)


def _spans(answer: MarkedAnswer) -> Units:
    """Each mistake by its lowest token, and each token that is right."""
    right = ~answer.wrong
    worth = {
        name: np.concatenate([[values[span].min() for span in answer.spans], values[right]])
        for name in _DETECTORS
        if (values := _values(answer, name)) is not None
    }
    return Units(worth, np.arange(len(answer.spans) + right.sum()) < len(answer.spans))


def _tokens(answer: MarkedAnswer) -> Units:
    worth = {name: values for name in _DETECTORS if (values := _values(answer, name)) is not None}
    return Units(worth, answer.wrong)


def _interval(answers: Sequence[Units], name: str, seed: int, minus: str | None) -> dict[str, float]:
    """Interval of a detector's area, or of what another one has more than it."""
    wrong = np.concatenate([units.wrong for units in answers])
    owner = np.repeat(np.arange(len(answers)), [len(units.wrong) for units in answers])

    def area(detector: str) -> Callable[[np.ndarray], np.ndarray]:
        return auc(-np.concatenate([units.worth[detector] for units in answers]), wrong, owner)

    own, other = area(name), None if minus is None else area(minus)

    def difference(weights: np.ndarray) -> np.ndarray:
        return other(weights) - own(weights)

    return asdict(bootstrap(own if minus is None else difference, len(answers), seed=seed))
