"""The known reward of an image, and somebody else who reads it."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from qstar_jax.tasks.digits.images import Digits, from_scikit_learn

INK = 20.0  # reward of a black image over a white one
LEAST = -8.0  # lowest reward of legibility: nothing is less legible than illegible


def ink(images: Float[np.ndarray, "N 64"]) -> Float[np.ndarray, " N"]:
    """Share of ink, 0 to 1; what is beyond paper or full ink does not count."""
    return (np.clip(images, -1, 1).mean(-1) + 1) / 2


@dataclass(frozen=True)
class Readers:
    """Two readers who learned from different images.

    Attributes:
        rewarding: A logistic classifier, which is part of the reward.
        judging: The five nearest neighbours among the other half of the images, which no reward knows.
    """

    rewarding: object
    judging: object

    @classmethod
    def fit(cls, digits: Digits) -> "Readers":
        """Fits both, one on each half of the images.

        Raises:
            InputError: scikit-learn is not installed.
        """
        with from_scikit_learn():
            from sklearn.linear_model import LogisticRegression
            from sklearn.neighbors import KNeighborsClassifier
        first, second = digits.half(0), digits.half(1)
        return cls(
            LogisticRegression(C=0.1, max_iter=500).fit(first.images, first.digits),
            KNeighborsClassifier(5).fit(second.images, second.digits),
        )

    def reads(self, images: Float[np.ndarray, "N 64"], digits: Int[np.ndarray, " N"]) -> Bool[np.ndarray, " N"]:
        """Whether the judging reader sees the digit that was asked for."""
        return self.judging.predict(np.clip(images, -1, 1)) == digits


def true_reward(
    readers: Readers, images: Float[np.ndarray, "N 64"], digits: Int[np.ndarray, " N"]
) -> Float[np.ndarray, " N"]:
    """20 times the ink, and the log-probability of the digit that was asked for, at least -8.

    Args:
        readers: Their rewarding one says how probable a digit is.
        images: Images; what is beyond paper or full ink counts as these.
        digits: What was asked for.

    Returns:
        Rewards. Shape [N].
    """
    logp = readers.rewarding.predict_log_proba(np.clip(images, -1, 1))[np.arange(len(digits)), digits]
    return INK * ink(images) + np.maximum(logp, LEAST)
