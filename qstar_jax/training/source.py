"""Where the batches of a run come from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from qstar_jax.data.batches import Batch
from qstar_jax.data.feeder import Feeder
from qstar_jax.training.step import TrainState

SHOWN = 8  # rows named in a message


class Source(Protocol):
    """Batches for the training loop. A subclass need write only `at_step`.

    Attributes:
        name: What messages call it: a file, a dataset, an environment.
    """

    name: str = "the source of batches"

    def at_step(self, step: int, state: TrainState) -> Any:
        """Makes the batch of a step; micro-batches, if there are several, lie along a leading axis.

        Args:
            step: Optimizer steps done before it.
            state: State before the step, for data that are sampled from the policy; others ignore it.

        Returns:
            A pytree of arrays: a pure function of (step, state), so that a resumed run repeats it.
        """
        ...

    def epochs(self, steps: int) -> float | None:
        """Passes over the data after some steps; None where that means nothing."""
        return None

    def locate(self, step: int, examples: Sequence[int]) -> str:
        """Names examples of a step's batch, counted from 0 over all micro-batches, for messages."""
        return f"examples {', '.join(map(str, examples))} of the batch"


@dataclass(frozen=True)
class DatasetSource(Source):
    """Batches of a dataset, shuffled anew each epoch.

    Attributes:
        feeder: The dataset, in batches.
        seed: Fixes the order.
    """

    feeder: Feeder
    seed: int

    @property
    def name(self) -> str:
        """File or dataset of the hub."""
        return self.feeder.dataset.source

    def at_step(self, step: int, state: TrainState | None = None) -> Batch:
        """The batch of a step, whatever the state."""
        return self.feeder.at_step(self.seed, step)

    def epochs(self, steps: int) -> float:
        """Passes over the dataset after some steps."""
        return steps * self.feeder.batch_size / len(self.feeder.dataset.examples)

    def locate(self, step: int, examples: Sequence[int]) -> str:
        """Names rows of the file, counted from 1."""
        indices = self.feeder.indices_at_step(self.seed, step).reshape(-1)
        return name_rows([self.feeder.dataset.examples[indices[i]].row for i in examples])


def name_rows(rows: Sequence[int]) -> str:
    """Names rows of a file, which count from 1 in messages and from 0 here."""
    more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
    return f"row{'s' if len(rows) > 1 else ''} {', '.join(str(row + 1) for row in rows[:SHOWN])}{more}"
