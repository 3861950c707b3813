"""An estimate of what a step needs, before anything is compiled: memory per device, and FLOPs."""

import math
import os
from dataclasses import dataclass
from datetime import timedelta

import jax
from jax.sharding import Mesh
from rich import filesize

from qstar_jax.data.batches import Batch
from qstar_jax.models.causal_lm import Params
from qstar_jax.training.objectives import LossFn
from qstar_jax.training.step import TrainState, with_frozen


@dataclass(frozen=True)
class Estimate:
    """What one optimizer step needs.

    Attributes:
        memory: Bytes on each device, by what they hold.
        flops: Model FLOPs of the step, over all devices.
        steps: Remaining steps of the run.
        limit: Bytes that a device has, if known.
        peak_flops: FLOP/s of all devices, if known.
    """

    memory: dict[str, int]
    flops: float
    steps: int
    limit: int | None = None
    peak_flops: float | None = None

    @property
    def total(self) -> int:
        """Sum of the bytes on each device."""
        return sum(self.memory.values())

    def __str__(self) -> str:
        """One or two lines for the terminal."""
        parts = ", ".join(f"{name} {filesize.decimal(size)}" for name, size in self.memory.items() if size)
        has = f" of {filesize.decimal(self.limit)}" if self.limit else ""
        line = f"estimate: at least {filesize.decimal(self.total)}{has} per device ({parts}); "
        line += f"{self.flops:.2e} FLOPs per step"
        if self.peak_flops:
            seconds = self.flops / self.peak_flops
            duration = timedelta(seconds=math.ceil(seconds * self.steps))
            line += f": {seconds:.2g} s at the hardware's peak, {duration} for {self.steps} steps"
        if self.limit and self.total > self.limit:
            line += (
                "\nthis may not fit; try train.accumulate, compute.remat full, reference.mode cached, "
                "lora.rank, compute.param_dtype bfloat16, shorter data.max_length, or more devices along mesh.fsdp"
            )
        return line


def estimate(
    loss_fn: LossFn,
    state: TrainState,
    batch: Batch,
    mesh: Mesh,
    *,
    flops: float,
    steps: int,
    accumulate: int = 1,
    updates: int = 1,
    limit: int | None = None,
    peak_flops: float | None = None,
) -> Estimate:
    """Adds up the memory of a step from shapes alone; nothing is compiled.

    Activations are what the backward pass keeps of the forward pass, as JAX traces it, for the sequences of one device.
    With several updates per step, what is trained is kept as it was before the first (see `rl.step`).
    Temporary buffers of the compiler come on top: a compiled step of SmolLM2-135M needed 5 to 10 % more with remat none
    and dots, and up to half as much again with full, where the rest is small.
    """

    def residuals_of(params: Params, frozen: Params | None, ref_params: Params | None, batch: Batch):
        return jax.vjp(lambda p: loss_fn(with_frozen(p, frozen), ref_params, batch)[0], params)[1]

    # Activations: what one micro-batch leaves for the backward pass, but for parameters, which are counted already.
    micro_batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[accumulate > 1 :], x.dtype), batch)
    residuals = jax.eval_shape(residuals_of, state.params, state.frozen, state.ref_params, micro_batch)
    parameters = {(x.shape, x.dtype) for x in jax.tree.leaves(state.policy)}
    kept = [x for x in jax.tree.leaves(residuals) if (x.shape, x.dtype) not in parameters]
    activations = sum(math.prod(x.shape) * x.dtype.itemsize for x in kept)
    # Gradients have the dtype of their parameters; those of micro-batches are added up in float32.
    gradients = bytes_on_device(state.params)
    if accumulate > 1:
        gradients += sum(4 * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(state.params))
    return Estimate(
        memory={
            "policy": bytes_on_device(state.policy),
            "reference": bytes_on_device(state.ref_params),
            "optimizer": bytes_on_device(state.opt_state),
            "state before the step": bytes_on_device((state.params, state.opt_state)) if updates > 1 else 0,
            "gradients": gradients,
            "activations": activations // (mesh.shape["data"] * mesh.shape["fsdp"]),
        },
        flops=flops,
        steps=steps,
        limit=limit,
        peak_flops=peak_flops,
    )


def bytes_on_device(tree) -> int:
    """Returns the bytes of a tree's arrays on one device; they may be abstract."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def device_memory(device: jax.Device) -> int | None:
    """Bytes that a device has for this program; for a CPU, its share of the machine's memory."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats or device.platform != "cpu":
        return stats.get("bytes_limit")
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()
