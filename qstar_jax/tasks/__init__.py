"""Built-in tasks: data and models that need no network, known by names such as `builtin:tiny-tldr`."""

from qstar_jax.tasks.registry import TASKS as TASKS
from qstar_jax.tasks.registry import find as find
from qstar_jax.tasks.task import Task as Task
