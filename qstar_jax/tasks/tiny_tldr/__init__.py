"""tiny-tldr: posts and summaries in a small language, with a known reward for every word.

As data it is `builtin:tiny-tldr` (splits train, test and corrupted); as a model, a base model of the language that
has never seen a summary.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from numpy import ndarray

from qstar_jax.tasks.task import Task
from qstar_jax.tasks.tiny_tldr.oracle import Oracle
from qstar_jax.tasks.tiny_tldr.posts import read_post as read_post
from qstar_jax.tasks.tiny_tldr.rewards import true_reward as true_reward
from qstar_jax.tasks.tiny_tldr.rows import SPLITS as SPLITS
from qstar_jax.tasks.tiny_tldr.rows import split_rows as split_rows

BASE = Path(__file__).parent / "base"  # the base model, a Hugging Face folder


def reward_of_text(prompt: str, summary: str) -> float | None:
    """Computes the true reward of a summary; None if the prompt is not one of this task."""
    post = read_post(prompt)
    return None if post is None else true_reward(post, summary)


def _advantages(tokenizer: Any, beta: float) -> Callable[[str, Sequence[int]], Float[ndarray, " T"]]:
    oracle = Oracle(lambda text: tokenizer(text).input_ids, tokenizer.eos_token_id, beta)
    return lambda prompt, token_ids: oracle.advantages(read_post(prompt), token_ids)


TASK = Task("tiny-tldr", SPLITS, split_rows, BASE, reward_of_text, _advantages)
