"""All built-in tasks, found by the names that options use."""

import re

from qstar_jax.errors import InputError
from qstar_jax.tasks import reasoning_gym
from qstar_jax.tasks.task import PREFIX, Task
from qstar_jax.tasks.tiny_questions import TASK as TINY_QUESTIONS
from qstar_jax.tasks.tiny_sums import TASK as TINY_SUMS
from qstar_jax.tasks.tiny_tldr import TASK as TINY_TLDR

TASKS = (TINY_TLDR, TINY_QUESTIONS, TINY_SUMS)


def find(source: str) -> tuple[Task, int | None] | None:
    """Finds a built-in task, or one that the package reasoning-gym generates.

    Args:
        source: Value of an option, for example "builtin:tiny-tldr", "builtin:tiny-tldr?seed=3" or
            "reasoning-gym:chain_sum?seed=3&size=500".

    Returns:
        The task, and the seed of its data if one is named; None if the source is not built in.

    Raises:
        InputError: If there is no such task.
    """
    if source.startswith(reasoning_gym.PREFIX):
        return reasoning_gym.open_task(source), None
    if not source.startswith(PREFIX):
        return None
    name, seed = re.fullmatch(r"(.*?)(?:\?seed=(\d+))?", source.removeprefix(PREFIX), re.DOTALL).groups()
    for task in TASKS:
        if task.name == name:
            return task, None if seed is None else int(seed)
    names = ", ".join(task.source for task in TASKS)
    raise InputError(f"{source}: no such built-in task; expected {names}, optionally with ?seed=N for other rows")
