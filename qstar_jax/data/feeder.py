"""Batches of a dataset on the mesh: those of a training step, and all of them in order.

A thread makes the next batch while the devices compute with this one.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qstar_jax.config import DataOptions
from qstar_jax.data.batches import Batch, make_batch, step_indices
from qstar_jax.data.loading import Dataset
from qstar_jax.data.packing import Shapes, plan_batch
from qstar_jax.data.ragged import Ragged
from qstar_jax.errors import InputError
from qstar_jax.sharding import BATCH

Track = Callable[[Iterable[Batch], str, int], Iterable[Batch]]


class Feeder:
    """Turns examples into batches on the mesh; each host transfers only the shards of its own devices.

    Args:
        dataset: The examples.
        batch_size: Examples per batch, over all hosts.
        mesh: Devices; data * fsdp must divide the examples of a micro-batch.
        options: How examples are packed into sequences.
        option: Name of the option that sets `batch_size`, for the error.
        accumulate: Micro-batches per training step.

    Raises:
        InputError: If the batch does not divide evenly.
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
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        divisor = shards * max(accumulate, 1)
        if batch_size < 1 or batch_size % divisor or accumulate < 1:
            micro = f" and {accumulate} micro-batches (train.accumulate)" if accumulate != 1 else ""
            raise InputError(
                f"--{option} {batch_size} does not divide evenly over {shards} devices (mesh data * fsdp){micro}; "
                f"choose a multiple of {divisor}, or give devices to mesh.tensor"
            )
        self.dataset, self.batch_size, self.accumulate = dataset, batch_size, accumulate
        self.shapes = Shapes.of(
            dataset.examples,
            options.layout,
            batch_size=batch_size // accumulate,
            row_length=options.row_length,
            shards=shards,
            texts=mesh.abstract_mesh.abstract_device.platform == "gpu",  # cuDNN's attention needs them
        )
        self._ref_logps: Sequence[Sequence[np.ndarray]] | None = None
        self._guide_rewards: Sequence[Sequence[np.ndarray]] | None = None
        self._maker = ThreadPoolExecutor(1, "batches")
        self._ahead: dict[tuple[int, int], Future[Batch]] = {}  # (seed, step) -> the batch that is made ahead
        self._sharding = NamedSharding(mesh, BATCH)
        self._step_sharding = NamedSharding(mesh, BATCH if accumulate == 1 else PartitionSpec(None, *BATCH))

    def with_reference(self, ref_logps: Sequence[Sequence[np.ndarray]]) -> "Feeder":
        """Returns a feeder whose batches also carry log pi_ref of their responses' tokens."""
        return self._with(_ref_logps=ref_logps)

    def with_guide(self, rewards: Sequence[Sequence[np.ndarray]]) -> "Feeder":
        """Returns a feeder whose batches also carry the rewards that a guide gives to their responses' tokens."""
        return self._with(_guide_rewards=rewards)

    def _with(self, **arrays: Sequence[Sequence[np.ndarray]]) -> "Feeder":
        other = copy.copy(self)
        other.__dict__ |= arrays | {"_ahead": {}}
        return other

    @property
    def batches(self) -> int:
        """Number of batches that `in_order` yields."""
        return -(-len(self.dataset.examples) // self.batch_size)

    def indices_at_step(self, seed: int, step: int) -> np.ndarray:
        """Returns the examples of each micro-batch of a step. Shape [accumulate, batch_size / accumulate]."""
        indices = step_indices(seed, step, len(self.dataset.examples), self.batch_size)
        return indices.reshape(self.accumulate, -1)

    def at_step(self, seed: int, step: int) -> Batch:
        """Returns the batch of a step, a pure function of (seed, step), with a leading axis of micro-batches."""
        future = self._ahead.get((seed, step))
        batch = self._make_step(seed, step) if future is None else future.result()
        self._ahead = {(seed, step + 1): self._maker.submit(self._make_step, seed, step + 1)}
        return self._place(batch, self._step_sharding)

    def shapes_at_step(self, seed: int, step: int) -> Batch:
        """Returns the shapes, dtypes and shardings of `at_step`; the devices need not be there."""
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._step_sharding), self._make_step(seed, step)
        )

    def _make_step(self, seed: int, step: int) -> Batch:
        micro_batches = self.indices_at_step(seed, step)
        if self.accumulate == 1:
            return self._make(micro_batches[0])
        # All micro-batches take the largest size among them, so that they can be stacked.
        plans = [plan_batch(self._examples(indices), self.shapes) for indices in micro_batches]
        size = tuple(np.max([plan.size for plan in plans], axis=0))
        batches = [self._make(i, at_least=size, plan=plan) for i, plan in zip(micro_batches, plans, strict=True)]
        return jax.tree.map(lambda *x: np.stack(x), *batches)

    def in_order(self, start: int = 0) -> Iterator[Batch]:
        """Yields all examples from `start` on in file order; those that fill up the last batch have weight 0."""
        batches = self._make_in_order(start)
        future = self._maker.submit(next, batches, None)
        while (batch := future.result()) is not None:
            future = self._maker.submit(next, batches, None)
            yield self._place(batch, self._sharding)

    def _make_in_order(self, start: int) -> Iterator[Batch]:
        size, total = (0, 0), len(self.dataset.examples)
        for first in range(start, total, self.batch_size):
            indices = np.arange(first, min(first + self.batch_size, total))
            # A short last batch takes at least the size of the previous one, to reuse its compiled program.
            short = len(indices) < self.batch_size
            at_least = size if short else (0, 0)
            batch = self._make(indices, fill_to=self.batch_size, at_least=at_least)
            size = (len(batch.tokens), batch.slots.shape[1])
            yield batch

    def _examples(self, indices: np.ndarray) -> Ragged:
        return Ragged.take(self.dataset.examples, indices)

    def _make(self, indices: np.ndarray, **options) -> Batch:
        of_tokens = {"ref_logps": self._ref_logps, "guide_rewards": self._guide_rewards}
        of_tokens = {name: values and [values[i] for i in indices] for name, values in of_tokens.items()}
        return make_batch(self._examples(indices), self.shapes, **of_tokens, **options)

    def _place(self, batch: Batch, sharding: NamedSharding) -> Batch:
        return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), batch)
