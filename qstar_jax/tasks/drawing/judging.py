"""The known reward of an image for a prompt, somebody else who looks at it, and whose fault a bad image is."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from qstar_jax.tasks.digits.images import Digits
from qstar_jax.tasks.digits.reward import Readers, ink
from qstar_jax.tasks.drawing import words
from qstar_jax.tasks.drawing.painter import inked

MIDDLE = 0.31  # ink between thin and bold, as a share of the image
SHARPNESS = 40.0  # of the ink's log-odds
LEAST = -4.0  # lowest log-probability of the kind


@dataclass(frozen=True)
class Judges:
    """Who sees images: one reader is part of the reward, another one judges.

    Attributes:
        readers: Readers of digits who learned from thin and bold ones, each from half of the images.
    """

    readers: Readers

    @classmethod
    def fit(cls, data: Digits) -> "Judges":
        """Fits both readers.

        Raises:
            InputError: scikit-learn is not installed.
        """
        return cls(Readers.fit(inked(data)[0]))

    def true_reward(
        self, prompts: Int[np.ndarray, "N 4"], images: Float[np.ndarray, "N 64"]
    ) -> Float[np.ndarray, " N"]:
        """Log-probability that an image is what the prompt asks for: of its kind, and of its ink.

        It knows the image and the prompt, and not what the refiner requested.

        Args:
            prompts: Prompts.
            images: Images; what is beyond paper or full ink counts as these.

        Returns:
            Rewards: the log-probability of the kind under a classifier, at least -4, and that of the ink, a logistic
            function of the share of ink.
        """
        shown = self.readers.rewarding.predict_proba(np.clip(images, -1, 1))
        kind = np.log(np.maximum((shown * words.kinds(prompts)).sum(-1), np.exp(LEAST)))
        sign = np.where(words.wants_bold(prompts), 1.0, -1.0)
        return kind - np.logaddexp(0, -sign * SHARPNESS * (ink(images) - MIDDLE))

    def look(self, images: Float[np.ndarray, "N 64"]) -> tuple[Int[np.ndarray, " N"], Bool[np.ndarray, " N"]]:
        """Digit and boldness that the judging reader sees, whom no reward knows."""
        return self.readers.judging.predict(np.clip(images, -1, 1)), ink(images) > MIDDLE

    def faults(
        self, prompts: Int[np.ndarray, "N 4"], requests: Int[np.ndarray, "N 2"], images: Float[np.ndarray, "N 64"]
    ) -> Bool[np.ndarray, "N 2"]:
        """Whose fault it is: the refiner requested the wrong thing, the painter did not draw what was requested."""
        digit, bold = self.look(images)
        asked_digit, asked_ink = words.requested(requests)
        return np.stack([~words.fits(prompts, requests), (digit != asked_digit) | (bold != asked_ink)], axis=-1)
