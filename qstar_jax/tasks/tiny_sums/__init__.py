"""tiny-sums: sums worked out in steps by somebody who slips, with the known value of every prefix.

As data it is `builtin:tiny-sums` (splits train, test, solutions, outcomes and steps); as a model, a base model that was
fitted to the solver, slips included.
"""

from pathlib import Path

from qstar_jax.tasks.task import Task
from qstar_jax.tasks.tiny_sums.oracle import Oracle
from qstar_jax.tasks.tiny_sums.rows import SPLITS, split_rows
from qstar_jax.tasks.tiny_sums.sums import true_reward

BASE = Path(__file__).parent / "base"  # the base model, a Hugging Face folder

TASK = Task("tiny-sums", SPLITS, split_rows, BASE, true_reward, lambda *settings: Oracle(*settings).advantages)
