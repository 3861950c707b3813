"""The exact advantage of every token of a summary: the token reward of an optimal DPO policy.

Writers draw summaries from a known distribution mu, and readers judge them by a known reward r. The optimal policy is
therefore known, pi*(y) proportional to mu(y) exp(r(y) / beta), and so is beta log(pi* / mu) of every token, the optimal
advantage (Eq. 10 of the paper). It takes sums over all summaries with a common prefix. Facts are filled in
independently, so the sums factorize and no summary is enumerated.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import product

import numpy as np

from qstar_jax.tasks.tiny_tldr import words
from qstar_jax.tasks.tiny_tldr.posts import FACTS, FILLERS, Post
from qstar_jax.tasks.tiny_tldr.rewards import END, LATE_WORD, WORD, WRONG, split_words
from qstar_jax.tasks.tiny_tldr.rewards import RIGHT as RIGHT_REWARD
from qstar_jax.tasks.tiny_tldr.summaries import EMPTY, EXTRAS, FORMS, FROM_POST, RIGHT, RUN_ON

Tokens = tuple[int, ...]
Weights = np.ndarray  # of part of a summary: its probability under mu, and that times exp(reward / beta)


@dataclass(frozen=True)
class _Slot:
    """A place of a summary that takes one of several phrases: the values of a fact, or optional filler words.

    Attributes:
        counts: Number of values that begin with given tokens.
        values: All values.
        listed: Weights of the values with individual weights: those that the post mentions, right or wrong.
        other: Weights of each other value.
        empty: Weights of leaving the place empty.
    """

    counts: dict[Tokens, int]
    values: frozenset[Tokens]
    listed: dict[Tokens, Weights]
    other: Weights
    empty: Weights

    @cached_property
    def total(self) -> Weights:
        """Total weights of everything that may fill the place, or leave it empty."""
        return self.begun(()) + self.empty

    def whole(self, tokens: Tokens) -> Weights | None:
        """Weights of the value with exactly these tokens; None if there is none."""
        return self.listed.get(tokens, self.other) if tokens in self.values else None

    def begun(self, tokens: Tokens) -> Weights | None:
        """Total weights of the values that begin with these tokens; None if there is none."""
        if tokens not in self.counts:
            return None
        listed = [weights for value, weights in self.listed.items() if value[: len(tokens)] == tokens]
        return sum(listed, (self.counts[tokens] - len(listed)) * self.other)


@dataclass(frozen=True)
class _Thread:
    """One derivation of the tokens so far.

    Attributes:
        parts: Remaining parts: tokens and facts.
        value: Tokens so far of the value that is being stated.
        weights: Weights of everything before that value.
    """

    parts: tuple[int | str, ...]
    value: Tokens
    weights: Weights


class Oracle:
    """Computes true advantages.

    Args:
        tokenize: Text -> token ids, without special tokens.
        eos: Token that ends a summary.
        beta: Temperature of the optimal policy: reward per nat.
    """

    def __init__(self, tokenize: Callable[[str], Sequence[int]], eos: int, beta: float):
        self._ids = cache(lambda text: tuple(tokenize(text)))
        self._eos, self._beta = eos, beta
        phrases = {fact: [" " + value for value in _all_values(fact)] for fact in FACTS} | EXTRAS
        self._values = {place: frozenset(map(self._ids, texts)) for place, texts in phrases.items()}
        self._counts = {
            fact: Counter(value[:end] for value in values for end in range(len(value) + 1))
            for fact, values in self._values.items()
        }
        self._extras = {place: self._extra(place) for place in EXTRAS}
        self._starts = [
            _Thread(parts, (), np.array([weight, weight * self._tilt(reward)]))
            for parts, weight, reward in self._plans()
        ]

    def advantages(self, post: Post, ids: Sequence[int]) -> np.ndarray:
        """Computes beta log(pi* / mu) of every token of a summary.

        Returns:
            Advantage of each token, in reward; NaN from the first token that no writer would write. Shape [T].
        """
        slots = self._extras | {fact: self._slot(post, fact) for fact in FACTS}
        threads, before = self._starts, self._total(self._starts, slots)
        advantages = np.full(len(ids), np.nan)
        for t, token in enumerate(ids):
            # Follow every derivation of the prefix, and sum the weights of all its completions.
            threads = [after for thread in threads for after in _step(thread, int(token), slots)]
            now = self._total(threads, slots)
            if not now[0] > 0:
                break
            # The ratios are pi*(token | prefix) and mu(token | prefix).
            advantages[t] = self._beta * (np.log(now[1] / before[1]) - np.log(now[0] / before[0]))
            before = now
        return advantages

    def _tilt(self, reward: float) -> float:
        return float(np.exp(reward / self._beta))

    def _slot(self, post: Post, fact: str) -> _Slot:
        confusing = fact in post.distractors
        chance = RIGHT[fact][not confusing]
        length = WORD * len(post.facts[fact].split())  # all values of a fact have the same number of words

        def weights(probability: float, reward: float) -> Weights:
            return np.array([probability, probability * self._tilt(length + reward)])

        # The right value and the distractor have probabilities of their own; all other values share the rest equally.
        listed = {self._ids(" " + post.facts[fact]): weights(chance, RIGHT_REWARD[fact])}
        rest = 1 - chance
        if confusing:
            listed[self._ids(" " + post.distractors[fact])] = weights(rest * FROM_POST, WRONG)
            rest *= 1 - FROM_POST
        values = self._values[fact]
        other = weights(rest / (len(values) - len(listed)), WRONG)
        return _Slot(self._counts[fact], values, listed, other, np.zeros(2))

    def _extra(self, place: str) -> _Slot:
        """Optional words that only change the length, which may differ between phrases of one place."""
        each = (1 - EMPTY) / len(EXTRAS[place])
        listed = {
            self._ids(phrase): np.array([each, each * self._tilt(WORD * _count(phrase))]) for phrase in EXTRAS[place]
        }
        return _Slot(self._counts[place], self._values[place], listed, np.zeros(2), np.array([EMPTY, EMPTY]))

    def _plans(self) -> Iterator[tuple[tuple[int | str, ...], float, float]]:
        """Yields (parts, probability, reward) of every form, ending there or running on with a filler sentence."""
        tails = [(*self._ids(" " + sentence), self._eos) for sentence in FILLERS]
        late = [LATE_WORD * _count(sentence) for sentence in FILLERS]
        for form in FORMS:
            parts: list[int | str] = []
            for i, text in enumerate(re.split(r" ?\{(\w+)\}", form.text)):
                parts += [text] if i % 2 else self._ids(text)
            reward = WORD * _count(re.sub(r"\{\w+\}", "", form.text))
            yield (*parts, self._eos), form.weight * (1 - RUN_ON), reward + END
            for tail, cost in zip(tails, late, strict=True):
                yield (*parts, *tail), form.weight * RUN_ON / len(tails), reward + cost

    @staticmethod
    def _total(threads: list[_Thread], slots: dict[str, _Slot]) -> Weights:
        total = np.zeros(2)
        for thread in threads:
            # Sum over the completions of a value that has begun; complete values are threads of their own.
            facts = [part for part in thread.parts if isinstance(part, str)]
            weights = thread.weights
            if thread.value:
                slot = slots[facts.pop(0)]
                ended = slot.whole(thread.value)
                weights = weights * (slot.begun(thread.value) - (0.0 if ended is None else ended))
            # The remaining facts are independent: their sums multiply.
            for fact in facts:
                weights = weights * slots[fact].total
            total += weights
        return total


def _step(thread: _Thread, token: int, slots: dict[str, _Slot]) -> Iterator[_Thread]:
    """Yields the threads that extend a thread by a token."""
    if not thread.parts:
        return
    # Fixed text must match.
    part, *rest = thread.parts
    if isinstance(part, int):
        if part == token:
            yield _Thread(tuple(rest), (), thread.weights)
        return
    # A place may be left empty, or its value may go on, or end with this token.
    slot, value = slots[part], (*thread.value, token)
    if not thread.value and slot.empty[0] > 0:
        yield from _step(_Thread(tuple(rest), (), thread.weights * slot.empty), token, slots)
    if slot.begun(value) is not None:
        yield _Thread(thread.parts, value, thread.weights)
    if (ended := slot.whole(value)) is not None:
        yield _Thread(tuple(rest), (), thread.weights * ended)


def _count(text: str) -> int:
    return sum(word[0].isalnum() for word in split_words(text))


def _all_values(fact: str) -> list[str]:
    things = [words.COLOURS, words.THINGS]
    lists = {
        "who": [words.WOMEN + words.MEN, words.LAST_NAMES],
        "what": [words.VERBS, ["a"], *things],
        "much": [[str(amount) for amount in words.AMOUNTS]],
        "where": [words.AREAS, words.SPOTS],
        "when": [words.MONTHS, [str(day) for day in words.DAYS]],
    }
    return [" ".join(parts) for parts in product(*lists[fact])]
