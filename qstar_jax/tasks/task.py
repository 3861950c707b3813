"""What a built-in task offers the rest of the package."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from numpy import ndarray

PREFIX = "builtin:"


@dataclass(frozen=True)
class Task:
    """A task with its data, a base model of its language, and a known reward.

    Attributes:
        name: Its name.
        base: Folder of the base model, a Hugging Face folder.
        splits: Names of its splits.
        rows: (split, seed, limit) -> rows of a split.
        true_reward: (prompt, response) -> true reward; None if the prompt is not one of this task.
        advantages: (tokenizer, beta) -> function of (prompt, token ids) that gives each token its true advantage, in
            reward. Shape [T].
    """

    name: str
    base: Path
    splits: tuple[str, ...]
    rows: Callable[[str, int, int | None], list[dict]]
    true_reward: Callable[[str, str], float | None]
    advantages: Callable[[Any, float], Callable[[str, Sequence[int]], Float[ndarray, " T"]]]

    @property
    def source(self) -> str:
        """How options name the task, as data and as a model: for example "builtin:tiny-tldr"."""
        return PREFIX + self.name
