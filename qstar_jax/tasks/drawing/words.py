"""The language of the task: prompts of four words, and what is to be drawn in two."""

import numpy as np
from jaxtyping import Bool, Int

from qstar_jax.tasks.digits.images import CLASSES

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
KINDS = {"odd": (1, 3, 5, 7, 9), "even": (0, 2, 4, 6, 8), "small": (0, 1, 2, 3, 4), "large": (5, 6, 7, 8, 9)}
INKS = ("thin", "bold")
VOCABULARY = ("draw", "something", *KINDS, *INKS, *NAMES)
PROMPT, REQUEST = 4, 2  # words of a prompt, and of what is to be drawn

_IDS = {word: number for number, word in enumerate(VOCABULARY)}
# Which digits are of each kind. Shape [4, 10].
MEMBERS = np.array([np.isin(np.arange(CLASSES), members) for members in KINDS.values()])
# What each word says of an image, one-hot: ten digits, two inks; other words say nothing. Shape [V, 12].
MEANINGS = np.concatenate(
    [np.zeros((2 + len(KINDS), CLASSES + 2)), np.eye(CLASSES + 2)[[10, 11]], np.eye(CLASSES + 2)[:CLASSES]]
).astype(np.float32)


def encode(text: str) -> tuple[int, ...]:
    """Returns the tokens of words."""
    return tuple(_IDS[word] for word in text.split())


def decode(tokens: Int[np.ndarray, " T"]) -> str:
    """Returns the words of tokens."""
    return " ".join(VOCABULARY[token] for token in tokens)


ALL_PROMPTS = np.array([encode(f"draw something {kind} {ink}") for kind in KINDS for ink in INKS])  # [8, 4]
ALL_REQUESTS = np.array([encode(f"{name} {ink}") for name in NAMES for ink in INKS])  # [20, 2]


def kinds(prompts: Int[np.ndarray, "N 4"]) -> Bool[np.ndarray, "N 10"]:
    """Which digits each prompt asks for."""
    return MEMBERS[np.asarray(prompts)[:, 2] - _IDS["odd"]]


def wants_bold(prompts: Int[np.ndarray, "N 4"]) -> Bool[np.ndarray, " N"]:
    """Whether each prompt asks for bold ink."""
    return np.asarray(prompts)[:, 3] == _IDS["bold"]


def requested(requests: Int[np.ndarray, "N 2"]) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"]]:
    """Digit and ink (0 thin, 1 bold) of requests; -1 where they are not a digit and then an ink."""
    digit, ink = np.asarray(requests).T
    names, inks = digit - _IDS["zero"], ink - _IDS["thin"]
    return np.where(names >= 0, names, -1), np.where((inks >= 0) & (inks < len(INKS)), inks, -1)


def fits(prompts: Int[np.ndarray, "N 4"], requests: Int[np.ndarray, "N 2"]) -> Bool[np.ndarray, " N"]:
    """Whether a request is what its prompt asks for: a digit of the kind, and the ink."""
    digit, ink = requested(requests)
    of_kind = kinds(prompts)[np.arange(len(digit)), digit] & (digit >= 0)
    return of_kind & (ink == wants_bold(prompts))
