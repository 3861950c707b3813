"""Puts batches of a data set on the mesh."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qstar_jax.config import DataOptions
from qstar_jax.data.batches import Batch, eval_batches, make_batch, step_indices
from qstar_jax.data.loading import Dataset
from qstar_jax.data.packing import Shapes
from qstar_jax.errors import InputError
from qstar_jax.sharding import BATCH

Track = Callable[[Iterable[Batch], str, int], Iterable[Batch]]


class Feeder:
    """Turns examples into batches on the mesh; each host puts there only what its devices hold.

    Args:
        dataset: The examples.
        batch_size: Rows of a batch, over all hosts.
        mesh: Devices; (data * fsdp) must divide the rows of a micro-batch.
        options: How examples are laid into rows.
        option: Name of the option that sets `batch_size`, for the error.
        accumulate: Micro-batches of a training step.

    Raises:
        InputError: If the batch cannot be cut evenly.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        mesh: Mesh,
        options: DataOptions,
        option: str,
        *,
        accumulate: int = 1,
    ):
        parts = mesh.shape["data"] * mesh.shape["fsdp"]
        pieces = parts * max(accumulate, 1)
        if batch_size < 1 or batch_size % pieces or accumulate < 1:
            micro = f" and {accumulate} micro-batches (train.accumulate)" if accumulate != 1 else ""
            raise InputError(
                f"--{option} {batch_size} cannot be cut evenly over {parts} devices (mesh data * fsdp){micro}; "
                f"choose a multiple of {pieces}, or give devices to mesh.tensor"
            )
        self.dataset, self.batch_size, self.accumulate = dataset, batch_size, accumulate
        self.shapes = Shapes.of(
            dataset.examples,
            options.layout,
            batch_size=batch_size // accumulate,
            row_length=options.row_length,
            parts=parts,
        )
        self._ref_logps: Sequence[Sequence[np.ndarray]] | None = None
        self._sharding = NamedSharding(mesh, BATCH)
        self._stacked_sharding = NamedSharding(mesh, PartitionSpec(None, *BATCH))

    def _make(self, indices: np.ndarray, fill_to: int, at_least: tuple[int, int] = (0, 0)) -> Batch:
        return make_batch(
            [self.dataset.examples[i] for i in indices],
            self.shapes,
            fill_to=fill_to,
            ref_logps=None if self._ref_logps is None else [self._ref_logps[i] for i in indices],
            at_least=at_least,
        )

    def _place(self, batch: Batch, sharding: NamedSharding) -> Batch:
        return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), batch)

    def with_reference(self, ref_logps: Sequence[Sequence[np.ndarray]]) -> "Feeder":
        """The same feeder, whose batches carry log pi_ref of their answers' tokens."""
        other = copy.copy(self)
        other._ref_logps = ref_logps
        return other

    @property
    def batches(self) -> int:
        """How many batches `in_order` yields."""
        return -(-len(self.dataset.examples) // self.batch_size)

    def at_step(self, seed: int, step: int) -> Batch:
        """The training batch of a step, a pure function of (seed, step); micro-batches lie along a leading axis."""
        indices = step_indices(seed, step, len(self.dataset.examples), self.batch_size)
        if self.accumulate == 1:
            return self._place(self._make(indices, self.batch_size), self._sharding)
        size = self.batch_size // self.accumulate
        parts = indices.reshape(self.accumulate, size)
        shapes = [self._make(part, size).slots.shape for part in parts]
        batches = [self._make(part, size, tuple(np.max(shapes, axis=0))) for part in parts]
        return self._place(jax.tree.map(lambda *x: np.stack(x), *batches), self._stacked_sharding)

    def rows_at_step(self, seed: int, step: int) -> list[list[int]]:
        """Rows of the data file in each micro-batch of a step, counted from 0."""
        indices = step_indices(seed, step, len(self.dataset.examples), self.batch_size)
        parts = indices.reshape(self.accumulate, -1)
        return [[self.dataset.examples[i].row for i in part] for part in parts]

    def in_order(self, start: int = 0) -> Iterator[Batch]:
        """All examples from `start` on, once, in file order; examples that fill up the last batch have weight 0."""
        shape = (0, 0)
        for indices in eval_batches(len(self.dataset.examples) - start, self.batch_size):
            # The last batch may be short: it is filled up to the rows of the one before, whose program serves it too.
            at_least = shape if len(indices) < self.batch_size else (0, 0)
            batch = self._make(indices + start, self.batch_size, at_least)
            shape = batch.slots.shape
            yield self._place(batch, self._sharding)
