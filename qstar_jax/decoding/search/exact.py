"""Exact search: the answers of highest score, with proof, or as good as a budget allows.

Scores of monotone objectives only fall, so a prefix is worth no less than anything it can become, and the best prefixes
are looked at first (A* with a bound of 0). It costs a pass over the whole text for every prefix, and their number grows
exponentially where the policy is undecided: it is for short answers, and for judging other searches.

References:
    Stahlberg & Byrne, arXiv 1908.10090; Meister, Vieira & Cotterell, arXiv 2007.03909.
"""

import heapq
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int

from qstar_jax.decoding.objectives import Likelihood, Objective, StepScores
from qstar_jax.decoding.policies import Policy
from qstar_jax.decoding.responses import Finish, Responses

WIDTH = 64  # rows are padded to multiples of so many tokens, so that prompts of many lengths share a program


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ExactResponses(Responses):
    """The answers found to one prompt (B = 1), numpy arrays; `certified` is about the first of them.

    Attributes:
        proven: Whether these are the best of all, every one of them; False where the budget was used up before.
        expansions: Prefixes that were looked at.
    """

    proven: bool = field(default=False, metadata={"static": True})
    expansions: int = field(default=0, metadata={"static": True})


@dataclass(frozen=True, order=True)
class _Answer:
    """Ordered by score, and among equals by tokens; the best is the smallest."""

    loss: float
    tokens: tuple[int, ...]
    logp: float = field(compare=False)
    ref_logp: float = field(compare=False)


@dataclass(frozen=True)
class _Children:
    """What may follow a prefix and is not complete: the best first, of which the first `rank` have been taken."""

    prefix: tuple[int, ...]
    tokens: np.ndarray
    losses: np.ndarray
    logp: np.ndarray
    ref_logp: np.ndarray

    def entry(self, rank: int) -> tuple[float, tuple[int, ...], int, "_Children"]:
        """For the heap: the best come first, and among equals those whose tokens do."""
        return float(self.losses[rank]), (*self.prefix, int(self.tokens[rank])), rank, self


def exact_search(
    model: Policy,
    params: Any,
    prompt: Int[Array, " P"],
    *,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    objective: Objective = Likelihood(),
    n_best: int = 1,
    max_expansions: int = 10000,
    batch_size: int = 8,
) -> ExactResponses:
    """Finds the answers of highest score; those of `max_new_tokens` tokens are answers too.

    Args:
        model: A policy; an `Ensemble` where the objective reads several.
        params: Its parameters.
        prompt: Token ids of one prompt. Shape [P].
        max_new_tokens: Longest answer T, EOS included.
        eos_ids: Tokens that end an answer.
        objective: What is added up; a monotone one.
        n_best: How many answers, N.
        max_expansions: Prefixes that are looked at before it gives up; the best answers seen are returned then.
        batch_size: Prefixes that are looked at together; a few too many may be.

    Returns:
        The best answers, best first, B = 1. Void ones where there are not so many, or where none were seen in time.

    Raises:
        ValueError: If a token can raise the sum, so that nothing can be proven; or a number is below 1.
    """
    _check(objective, max_new_tokens, n_best, max_expansions, batch_size)
    prompt = np.asarray(prompt, np.int32)
    width = -(-(len(prompt) + max_new_tokens - 1) // WIDTH) * WIDTH
    rows = np.zeros((batch_size, width), np.int32)
    rows[:, : len(prompt)] = prompt
    eos = np.array(sorted(set(eos_ids)), np.int64)
    best: list[_Answer] = []  # at most N
    frontier: list[tuple[float, tuple[int, ...], int, _Children]] = []
    batch = [_Answer(0.0, (), 0.0, 0.0)]  # the empty prefix
    expansions, has_reference = 0, False

    def threshold() -> float:
        """What a prefix must be better than."""
        return best[-1].loss if len(best) == n_best else np.inf

    while batch:
        lengths = np.full(batch_size, len(prompt), np.int32)
        for i, prefix in enumerate(batch):
            rows[i, len(prompt) : len(prompt) + len(prefix.tokens)] = prefix.tokens
            lengths[i] += len(prefix.tokens)
        step = jax.device_get(_evaluate(model, params, rows, lengths, objective))
        has_reference = step.ref_logp is not None
        expansions += len(batch)
        for i, prefix in enumerate(batch):
            complete, others = _expand(prefix, jax.tree.map(lambda x, i=i: x[i], step), eos, max_new_tokens)
            best = sorted([*best, *complete])[:n_best]
            # Of one prefix the budget allows so many more and no further; one is kept to say that something is left.
            count = min(int((others.losses < threshold()).sum()), max(max_expansions - expansions, 0) + 1)
            if count:
                heapq.heappush(frontier, _cut(others, count).entry(0))
        batch = []
        while frontier and frontier[0][0] < threshold() and len(batch) < min(batch_size, max_expansions - expansions):
            loss, tokens, rank, siblings = heapq.heappop(frontier)
            batch.append(_Answer(loss, tokens, float(siblings.logp[rank]), float(siblings.ref_logp[rank])))
            if rank + 1 < len(siblings.tokens):
                heapq.heappush(frontier, siblings.entry(rank + 1))
    left = frontier[0][0] if frontier else np.inf
    return _result(best, n_best, max_new_tokens, eos, left, expansions, has_reference)


@partial(jax.jit, static_argnames=("model", "objective"))
def _evaluate(model: Policy, params: Any, rows: Array, lengths: Array, objective: Objective) -> StepScores:
    logits, _ = model.prefill(params, rows, lengths, 1)
    step = objective(logits)
    if step.value is not None:
        raise ValueError(
            f"{type(objective).__name__} gives values, which are no bounds of what a prefix can become; exact search "
            "needs an objective without"
        )
    return step


def _expand(prefix: _Answer, step: StepScores, eos: np.ndarray, room: int) -> tuple[list[_Answer], _Children]:
    """The answers that are one token longer than a prefix, and its other children, the best first."""
    losses = prefix.loss - step.score.astype(np.float64)
    logp = prefix.logp + step.logp.astype(np.float64)
    ref_logp = np.zeros_like(logp) if step.ref_logp is None else prefix.ref_logp + step.ref_logp.astype(np.float64)
    ends = np.full(losses.shape, len(prefix.tokens) + 1 == room)
    ends[eos[eos < len(ends)]] = True
    possible = losses < np.inf
    complete = [
        _Answer(float(losses[token]), (*prefix.tokens, int(token)), float(logp[token]), float(ref_logp[token]))
        for token in np.flatnonzero(ends & possible)
    ]
    others = np.flatnonzero(~ends & possible)
    others = others[np.argsort(losses[others], kind="stable")]
    return complete, _Children(prefix.tokens, others, losses[others], logp[others], ref_logp[others])


def _cut(children: _Children, count: int) -> _Children:
    """The first few of them, without the memory of the rest."""
    arrays = (children.tokens, children.losses, children.logp, children.ref_logp)
    return _Children(children.prefix, *(x[:count].copy() for x in arrays))


def _check(objective: Objective, max_new_tokens: int, n_best: int, max_expansions: int, batch_size: int):
    if not objective.monotone:
        raise ValueError(
            f"exact search with {type(objective).__name__}: its sum can rise again, so no prefix can be ruled out and "
            "nothing proven; use a monotone objective (Likelihood, RegularisedReward, LogitArithmetic), or beam_search"
        )
    if min(max_new_tokens, n_best, max_expansions, batch_size) < 1:
        raise ValueError(
            f"max_new_tokens {max_new_tokens}, n_best {n_best}, max_expansions {max_expansions} and batch_size "
            f"{batch_size} are at least 1"
        )


def _result(
    best: list[_Answer],
    count: int,
    room: int,
    eos: np.ndarray,
    left: float,
    expansions: int,
    has_reference: bool,
) -> ExactResponses:
    """Arrays of B = 1; `left` is what the best prefix has lost that was not looked at."""
    tokens, lengths = np.zeros((1, count, room), np.int32), np.zeros((1, count), np.int32)
    score, logp, ref_logp = np.full((3, 1, count), -np.inf)
    finish = np.full((1, count), Finish.INVALID, np.int32)
    for n, answer in enumerate(best):
        lengths[0, n] = len(answer.tokens)
        tokens[0, n, : len(answer.tokens)] = answer.tokens
        score[0, n], logp[0, n], ref_logp[0, n] = -answer.loss, answer.logp, answer.ref_logp
        finish[0, n] = Finish.EOS if answer.tokens[-1] in eos else Finish.LENGTH
    return ExactResponses(
        tokens=tokens,
        lengths=lengths,
        logp=logp,
        ref_logp=ref_logp if has_reference else None,
        score=score,
        finish=finish,
        certified=np.array([bool(best) and best[0].loss <= left]),
        proven=left == np.inf or (len(best) == count and best[-1].loss <= left),
        expansions=expansions,
    )
