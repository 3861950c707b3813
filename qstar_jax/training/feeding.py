"""Batches onto the mesh, and evaluation over a whole file."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from qstar_jax.data.batches import Batch, eval_batches, make_batch, padded_lengths, step_indices
from qstar_jax.data.loading import Dataset
from qstar_jax.errors import InputError
from qstar_jax.models.causal_lm import Params
from qstar_jax.sharding import BATCH
from qstar_jax.training.objectives import Metrics

Track = Callable[[Iterable[Batch], str, int], Iterable[Batch]]


class Feeder:
    """Turns examples into batches on the mesh; each host builds only what its devices hold.

    Args:
        dataset: The examples.
        batch_size: Rows of a batch, over all hosts.
        mesh: Devices; (data * fsdp) must divide `batch_size`.
        pad_id: Token id of padding, which no mask depends on.
        option: Name of the option that sets `batch_size`, for the error.

    Raises:
        InputError: If the batch cannot be cut evenly.
    """

    def __init__(self, dataset: Dataset, batch_size: int, mesh: Mesh, pad_id: int, option: str):
        parts = mesh.shape["data"] * mesh.shape["fsdp"]
        if batch_size < 1 or batch_size % parts:
            raise InputError(
                f"--{option} {batch_size} cannot be cut evenly over {parts} devices (mesh data * fsdp); "
                f"choose a multiple of {parts}, or give devices to mesh.tensor"
            )
        self.dataset, self.batch_size, self.pad_id = dataset, batch_size, pad_id
        self.length, self.response_length = padded_lengths(dataset.examples)
        self._sharding = NamedSharding(mesh, BATCH)

    def _place(self, indices: np.ndarray) -> Batch:
        batch = make_batch(
            [self.dataset.examples[i] for i in indices],
            length=self.length,
            response_length=self.response_length,
            pad_id=self.pad_id,
            fill_to=self.batch_size,
        )
        return jax.tree.map(
            lambda x: jax.make_array_from_callback(x.shape, self._sharding, lambda index: x[index]), batch
        )

    @property
    def batches(self) -> int:
        """How many batches `in_order` yields."""
        return -(-len(self.dataset.examples) // self.batch_size)

    def at_step(self, seed: int, step: int) -> Batch:
        """The training batch of a step: a pure function of (seed, step)."""
        return self._place(step_indices(seed, step, len(self.dataset.examples), self.batch_size))

    def in_order(self) -> Iterator[Batch]:
        """All examples once, in file order; fill-up rows of the last batch have weight 0."""
        for indices in eval_batches(len(self.dataset.examples), self.batch_size):
            yield self._place(indices)


class Evaluator:
    """Weighted global means over a held-out file; what the frozen reference says of it is computed once.

    Args:
        feeder: The held-out examples.
        eval_step: `(params, batch) -> metrics`, jitted.
        ref_logprobs: `batch -> ref_logp`, where the objective needs them.
        track: `(batches, description, total)` wraps batches, for a progress bar.
    """

    def __init__(
        self,
        feeder: Feeder,
        eval_step: Callable[[Params, Batch], Metrics],
        ref_logprobs: Callable[[Batch], jax.Array] | None = None,
        track: Track = lambda batches, description, total: batches,
    ):
        self._feeder, self._eval_step, self._track = feeder, eval_step, track
        self._ref_logps = None
        if ref_logprobs is not None:
            batches = self._batches("reference on held-out rows")
            self._ref_logps = [jax.block_until_ready(ref_logprobs(batch)) for batch in batches]

    def _batches(self, description: str) -> Iterable[Batch]:
        return self._track(self._feeder.in_order(), description, self._feeder.batches)

    def __call__(self, params: Params) -> dict[str, float]:
        """Evaluates parameters; returns metric name (with prefix `eval_`) -> mean."""
        parts = []
        for i, batch in enumerate(self._batches("evaluation")):
            if self._ref_logps is not None:
                batch = replace(batch, ref_logp=self._ref_logps[i])
            parts.append(jax.block_until_ready(self._eval_step(params, batch)))
        return {f"eval_{name}": value for name, value in mean_metrics(parts).items() if not name.startswith("count/")}


def mean_metrics(parts: list[Metrics]) -> dict[str, float]:
    """Joins metrics of several batches: sum of sums over sum of denominators.

    Args:
        parts: At least one dictionary of (sum, denominator) pairs, with the same names.

    Returns:
        Name -> mean.
    """
    parts = jax.device_get(parts)
    names = parts[0]
    total = {name: np.sum([np.float64(part[name]) for part in parts], axis=0) for name in names}
    return {name: float(value / max(weight, 1e-9)) for name, (value, weight) in total.items()}
