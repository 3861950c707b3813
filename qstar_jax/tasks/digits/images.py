"""The images: scikit-learn's digits, one half for whoever judges, all of them for who draws."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from qstar_jax.errors import InputError

SIDE, CLASSES = 8, 10
PIXELS = SIDE * SIDE


@dataclass(frozen=True)
class Digits:
    """Images and what they show.

    Attributes:
        images: From -1, paper, to 1, full ink. Shape [N, 64], float32.
        digits: 0 to 9. Shape [N].
    """

    images: Float[np.ndarray, "N 64"]
    digits: Int[np.ndarray, " N"]

    def half(self, number: int) -> "Digits":
        """Every second image, from the first (0) or from the second (1)."""
        return Digits(self.images[number::2], self.digits[number::2])


@contextmanager
def from_scikit_learn() -> Iterator[None]:
    """Says what to install where an import inside fails."""
    try:
        yield
    except ImportError as error:
        raise InputError(
            f"images of digits and their readers come from scikit-learn ({error}): pip install 'qstar_jax[diffusion]'"
        ) from error


def load_images() -> Digits:
    """Loads the 1,797 images, in an order that mixes writers.

    Raises:
        InputError: scikit-learn is not installed.
    """
    with from_scikit_learn():
        from sklearn.datasets import load_digits
    bundle = load_digits()
    order = np.random.default_rng(0).permutation(len(bundle.target))
    return Digits((bundle.data / 8 - 1).astype(np.float32)[order], bundle.target[order])
