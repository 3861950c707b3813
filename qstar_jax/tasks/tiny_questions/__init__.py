"""tiny-questions: dialogues that find out a hidden thing, with the known value of every turn.

As data it is `builtin:tiny-questions` (splits train, test, noisy and noisy_test). There is no base model: each seed has
things of its own. `rows.lists` and `rows.documents` make texts on which one can be trained.
"""

from qstar_jax.tasks.task import Task
from qstar_jax.tasks.tiny_questions.rows import SPLITS, split_rows

TASK = Task("tiny-questions", SPLITS, split_rows)
