"""Beam search over steps, guided by q, beside samples of as many tokens.

The search draws several continuations of every beam up to the end of a step, keeps those of the highest running sum of
implicit rewards, which is q up to what all responses of a question share (Eq. 10, summed along a prefix), and throws
the others away. Their tokens count: equal widths would compare unequal work.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from qstar_jax.evaluation.intervals import Interval, mean_interval
from qstar_jax.evaluation.votes import CHANCE, ORACLE, SUBSETS, Candidates, Weight, accuracies


@dataclass(frozen=True)
class StepSearch:
    """One width of beam search over steps, and what samples of as many tokens would have achieved.

    Attributes:
        beams: Beams.
        samples: Continuations per beam and step.
        tokens: Tokens drawn per question, those of prefixes that were dropped included.
        equal_samples: How many samples have as many tokens on average.
        accuracy: How often the best response that was found is right.
        sampled: Method -> its accuracy among that many samples; empty if there are fewer samples.
        gains: Method -> accuracy of the search minus that of the method, paired by question; empty likewise.
    """

    beams: int
    samples: int
    tokens: float
    equal_samples: float
    accuracy: Interval
    sampled: dict[str, Interval]
    gains: dict[str, Interval]

    @property
    def name(self) -> str:
        """For example "4 beams of 2"."""
        return f"{self.beams} beam{'s' * (self.beams > 1)} of {self.samples}"

    def in_words(self) -> str:
        """One sentence on the search beside samples."""
        words = "; ".join(f"{gain:+.3f} against {name}" for name, gain in self.gains.items() if name != ORACLE)
        words = words or "too few samples to compare with"
        tokens = f"the tokens of {self.equal_samples:.1f} samples"
        return f"Step search, {self.name}: {self.accuracy:.3f} with {tokens}: {words}."


def compare_at_equal_tokens(
    correct: Bool[np.ndarray, " Q"],
    tokens: Int[np.ndarray, " Q"],
    questions: Sequence[Candidates],
    lengths: Sequence[Int[np.ndarray, " K"]],
    *,
    beams: int,
    samples: int,
    weight: Weight = "sigmoid",
    subsets: int = SUBSETS,
    seed: int = 0,
) -> StepSearch:
    """Compares a search with selection among as many sampled tokens.

    N samples per question have, over all questions, as many tokens as the search drew. Between two whole numbers,
    accuracies are interpolated: choosing one of the two at random, with the right probability, achieves that with
    exactly these tokens on average.

    Args:
        correct: Whether the search's best response to each question is right. Shape [Q].
        tokens: Tokens that the search drew for each question. Shape [Q].
        questions: The samples of the same questions.
        lengths: Tokens of each sample of each question.
        beams: For the record.
        samples: For the record.
        weight: See `votes.accuracies`.
        subsets: See `votes.accuracies`.
        seed: See `votes.accuracies`.

    Returns:
        The comparison; without `sampled` and `gains` if a question has fewer samples than N. N is at least 1: one
        sample is the least that can be compared with.
    """
    per_sample = float(sum(np.mean(several) for several in lengths))
    equal = float(np.sum(tokens)) / per_sample
    number = max(equal, 1.0)
    below, above = math.floor(number), math.ceil(number)
    found = correct.astype(float)
    sampled: dict[str, Float[np.ndarray, " Q"]] = {}
    if above <= min(len(question.correct) for question in questions):
        values = accuracies(questions, sorted({below, above}), weight=weight, limit=subsets, seed=seed)
        share = number - below
        sampled = {
            name: (1 - share) * both[:, 0] + share * both[:, -1] for name, both in values.items() if name != CHANCE
        }
    return StepSearch(
        beams=beams,
        samples=samples,
        tokens=float(np.mean(tokens)),
        equal_samples=equal,
        accuracy=mean_interval(found, seed=seed),
        sampled={name: mean_interval(values, seed=seed) for name, values in sampled.items()},
        gains={name: mean_interval(found - values, seed=seed) for name, values in sampled.items()},
    )
