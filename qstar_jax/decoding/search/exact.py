"""Exact search: the responses of highest score, with proof, or the best that a budget allows.

Scores of monotone objectives only fall, so no continuation of a prefix has a higher score, and the best prefixes are
expanded first (A* with a bound of 0). Each expansion is a pass over the whole text, and their number grows
exponentially where the policy is undecided: exact search is for short responses, and for judging other searches.

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

from qstar_jax.decoding.arguments import check_eos_ids, token_id_tuple
from qstar_jax.decoding.objectives import Likelihood, Objective, StepScores
from qstar_jax.decoding.policies import Policy
from qstar_jax.decoding.responses import Finish, Responses
from qstar_jax.errors import InputError
from qstar_jax.models.function import check_model
from qstar_jax.shapes import show_shape

WIDTH = 64  # texts are padded to multiples of this many tokens, so that prompts of many lengths share a program


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ExactResponses(Responses):
    """Responses to one prompt (B = 1), numpy arrays; `certified` is about the first of them.

    Attributes:
        proven: Whether all of them are proven to be the best; False where the budget was used up before.
        expansions: Number of prefixes that were expanded.
    """

    proven: bool = field(default=False, metadata={"static": True})
    expansions: int = field(default=0, metadata={"static": True})


@dataclass(frozen=True, order=True)
class _Prefix:
    """A prefix or a whole response; ordered by score, ties by tokens; the best is the smallest."""

    loss: float
    tokens: tuple[int, ...]
    logp: float = field(compare=False)
    ref_logp: float = field(compare=False)


@dataclass(frozen=True)
class _Children:
    """The tokens that may follow a prefix without ending it, best first."""

    prefix: tuple[int, ...]
    tokens: np.ndarray
    losses: np.ndarray
    logp: np.ndarray
    ref_logp: np.ndarray

    def entry(self, rank: int) -> tuple[float, tuple[int, ...], int, "_Children"]:
        """The child of a rank as an entry of the heap: the best come first, ties in the order of their tokens."""
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
    """Finds the responses of highest score; a prefix of `max_new_tokens` tokens is a response too.

    Args:
        model: A policy; an `Ensemble` where the objective reads several.
        params: Its parameters.
        prompt: Token ids of one prompt. Shape [P].
        max_new_tokens: Longest response T, EOS included.
        eos_ids: Tokens that end a response.
        objective: What is added up; it must be monotone.
        n_best: Number of responses, N.
        max_expansions: Most prefixes to expand; after these, the best responses seen so far are returned.
        batch_size: Prefixes expanded together; a few of them may not be needed.

    Returns:
        The best responses, best first, B = 1; INVALID where there are fewer, or the budget was used up before.

    Raises:
        InputError: The model is none, `prompt` is no list of token ids, or `eos_ids` are not of its vocabulary.
        ValueError: If a token can raise the sum, so that nothing can be proven; or if a number is below 1.
    """
    check_model(model, "prefill")
    _check(objective, max_new_tokens, n_best, max_expansions, batch_size)
    prompt = np.asarray(prompt)
    if prompt.ndim != 1 or not prompt.size or not np.issubdtype(prompt.dtype, np.integer) or prompt.min() < 0:
        raise InputError(f"prompt {show_shape(prompt.shape)}, {prompt.dtype}: expected the token ids of one prompt")
    eos_ids = token_id_tuple("eos_ids", eos_ids)
    width = -(-(len(prompt) + max_new_tokens - 1) // WIDTH) * WIDTH
    rows = np.zeros((batch_size, width), np.int32)
    rows[:, : len(prompt)] = prompt
    eos = np.array(sorted(set(eos_ids)), np.int64)
    best: list[_Prefix] = []  # at most N
    frontier: list[tuple[float, tuple[int, ...], int, _Children]] = []
    batch = [_Prefix(0.0, (), 0.0, 0.0)]  # the empty prefix
    expansions, has_reference = 0, False

    def threshold() -> float:
        """The loss that a prefix must be below."""
        return best[-1].loss if len(best) == n_best else np.inf

    while batch:
        # Score all children of a batch of prefixes.
        lengths = np.full(batch_size, len(prompt), np.int32)
        for i, prefix in enumerate(batch):
            rows[i, len(prompt) : len(prompt) + len(prefix.tokens)] = prefix.tokens
            lengths[i] += len(prefix.tokens)
        step = jax.device_get(_evaluate(model, params, rows, lengths, objective))
        check_eos_ids(eos_ids, step.score.shape[-1])
        has_reference = step.ref_logp is not None
        expansions += len(batch)
        # Those that end a response compete for N places; the others wait in the frontier.
        for i, prefix in enumerate(batch):
            complete, others = _expand(prefix, jax.tree.map(lambda x, i=i: x[i], step), eos, max_new_tokens)
            best = sorted([*best, *complete])[:n_best]
            # More children of one prefix than the budget allows are never expanded; one more shows that some are left.
            count = min(int((others.losses < threshold()).sum()), max(max_expansions - expansions, 0) + 1)
            if count:
                heapq.heappush(frontier, _first(others, count).entry(0))
        # The best prefixes of the frontier come next, while they can still become better than the responses found.
        batch = []
        while frontier and frontier[0][0] < threshold() and len(batch) < min(batch_size, max_expansions - expansions):
            loss, tokens, rank, siblings = heapq.heappop(frontier)
            batch.append(_Prefix(loss, tokens, float(siblings.logp[rank]), float(siblings.ref_logp[rank])))
            if rank + 1 < len(siblings.tokens):
                heapq.heappush(frontier, siblings.entry(rank + 1))
    bound = frontier[0][0] if frontier else np.inf
    return _responses(best, n_best, max_new_tokens, eos, bound, expansions, has_reference)


@partial(jax.jit, static_argnames=("model", "objective"))
def _evaluate(model: Policy, params: Any, rows: Array, lengths: Array, objective: Objective) -> StepScores:
    logits, _ = model.prefill(params, rows, lengths, 1)
    step = objective(logits)
    if step.value is not None:
        raise ValueError(
            f"{type(objective).__name__} has values, which do not bound what a prefix can become; exact search needs "
            "an objective without values"
        )
    return step


def _expand(prefix: _Prefix, step: StepScores, eos: np.ndarray, max_new_tokens: int) -> tuple[list[_Prefix], _Children]:
    """The responses that are one token longer than a prefix, and its other children, best first."""
    losses = prefix.loss - step.score.astype(np.float64)
    logp = prefix.logp + step.logp.astype(np.float64)
    ref_logp = np.zeros_like(logp) if step.ref_logp is None else prefix.ref_logp + step.ref_logp.astype(np.float64)
    ends = np.full(losses.shape, len(prefix.tokens) + 1 == max_new_tokens)
    ends[eos[eos < len(ends)]] = True
    possible = losses < np.inf
    complete = [
        _Prefix(float(losses[token]), (*prefix.tokens, int(token)), float(logp[token]), float(ref_logp[token]))
        for token in np.flatnonzero(ends & possible)
    ]
    others = np.flatnonzero(~ends & possible)
    others = others[np.argsort(losses[others], kind="stable")]
    return complete, _Children(prefix.tokens, others, losses[others], logp[others], ref_logp[others])


def _first(children: _Children, count: int) -> _Children:
    """The first few children, as copies that free the memory of the others."""
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
            f"{batch_size} must be at least 1"
        )


def _responses(
    best: list[_Prefix],
    count: int,
    max_new_tokens: int,
    eos: np.ndarray,
    bound: float,
    expansions: int,
    has_reference: bool,
) -> ExactResponses:
    """Arrays of B = 1; `bound` is the loss of the best prefix that was not expanded."""
    tokens, lengths = np.zeros((1, count, max_new_tokens), np.int32), np.zeros((1, count), np.int32)
    score, logp, ref_logp = np.full((3, 1, count), -np.inf)
    finish = np.full((1, count), Finish.INVALID, np.int32)
    for n, response in enumerate(best):
        lengths[0, n] = len(response.tokens)
        tokens[0, n, : len(response.tokens)] = response.tokens
        score[0, n], logp[0, n], ref_logp[0, n] = -response.loss, response.logp, response.ref_logp
        finish[0, n] = Finish.EOS if response.tokens[-1] in eos else Finish.LENGTH
    return ExactResponses(
        tokens=tokens,
        lengths=lengths,
        logp=logp,
        ref_logp=ref_logp if has_reference else None,
        score=score,
        finish=finish,
        certified=np.array([bool(best) and best[0].loss <= bound]),
        proven=bound == np.inf or (len(best) == count and best[-1].loss <= bound),
        expansions=expansions,
    )
