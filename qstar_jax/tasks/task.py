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
    """A task with its data, and perhaps a base model of its language and the known reward of a response.

    Attributes:
        name: Its name.
        splits: Names of its splits.
        rows: (split, seed, limit) -> rows of a split.
        base: Folder of the base model, a Hugging Face folder; None if the package has none.
        true_reward: (prompt, response) -> true reward; None if the prompt is not one of this task. Without it, the task
            has no such reward of single responses.
        advantages: (tokenizer, beta) -> function of (prompt, token ids) that gives each token its true advantage, in
            reward, if the task knows it. Shape [T].
    """

    name: str
    splits: tuple[str, ...]
    rows: Callable[[str, int, int | None], list[dict]]
    base: Path | None = None
    true_reward: Callable[[str, str], float | None] | None = None
    advantages: Callable[[Any, float], Callable[[str, Sequence[int]], Float[ndarray, " T"]]] | None = None

    @property
    def source(self) -> str:
        """How options name the task, as data and as a model: for example "builtin:tiny-tldr"."""
        return PREFIX + self.name
