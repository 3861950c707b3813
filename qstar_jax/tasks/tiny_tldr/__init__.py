"""tiny-tldr: a little language of posts and their summaries, whose readers' taste is known word by word.

As data it is `builtin:tiny-tldr` (splits train, test and corrupted), as a model, a base model of the language that
has never seen a summary, too.
"""

import re
from pathlib import Path

from qstar_jax.tasks.tiny_tldr.posts import read_post as read_post
from qstar_jax.tasks.tiny_tldr.rewards import true_reward as true_reward
from qstar_jax.tasks.tiny_tldr.rows import SPLITS as SPLITS
from qstar_jax.tasks.tiny_tldr.rows import split_rows as split_rows

BUILTIN = "builtin:tiny-tldr"
BASE = Path(__file__).parent / "base"  # the base model, a Hugging Face folder


def builtin_seed(source: str) -> int | None:
    """Reads the seed from the name of the task.

    Args:
        source: For example "builtin:tiny-tldr" or "builtin:tiny-tldr?seed=3".

    Returns:
        The seed, 0 where none is named; None if it is not the name of this task.
    """
    found = re.fullmatch(re.escape(BUILTIN) + r"(?:\?seed=(\d+))?", source)
    return int(found.group(1) or 0) if found else None


def reward_of_text(prompt: str, summary: str) -> float | None:
    """The true reward of a summary.

    Args:
        prompt: A prompt of this task.
        summary: Any text.

    Returns:
        Its reward; None if the prompt is not one of this task.
    """
    post = read_post(prompt)
    return None if post is None else true_reward(post, summary)
