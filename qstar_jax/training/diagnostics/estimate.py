"""What a step will need, said before anything is compiled: memory of each device, and arithmetic."""

import math
import os
from dataclasses import dataclass
from datetime import timedelta

import jax
import jax.numpy as jnp
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
        steps: Length of the run.
        limit: Bytes that a device has, where that is known.
        peak_flops: FLOP/s of all devices, where they are known.
    """

    memory: dict[str, int]
    flops: float
    steps: int
    limit: int | None = None
    peak_flops: float | None = None

    @property
    def total(self) -> int:
        """Bytes on each device together."""
        return sum(self.memory.values())

    def __str__(self) -> str:
        """One or two lines in plain words."""
        parts = ", ".join(f"{name} {filesize.decimal(size)}" for name, size in self.memory.items() if size)
        has = f" of {filesize.decimal(self.limit)}" if self.limit else ""
        line = (
            f"estimate: at least {filesize.decimal(self.total)}{has} a device ({parts}); {self.flops:.2e} FLOPs a step"
        )
        if self.peak_flops:
            seconds = self.flops / self.peak_flops
            whole = timedelta(seconds=math.ceil(seconds * self.steps))
            line += f": {seconds:.2g} s at the hardware's peak, {whole} for {self.steps} steps"
        if self.limit and self.total > self.limit:
            line += (
                "\nthis may not fit; what helps: train.accumulate, compute.remat full, reference.mode cached, "
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
    limit: int | None = None,
    peak_flops: float | None = None,
) -> Estimate:
    """Adds up what a step holds; only shapes are looked at, and nothing is compiled.

    Activations are what the backward pass keeps of the forward pass, as JAX traces it, for the rows of one device. What
    the compiler needs besides is not known before: a compiled step of SmolLM2-135M needed 5 to 10 % more with remat
    none and dots, and up to half as much again with full, where the rest is small.

    Args:
        loss_fn: The objective.
        state: The state of the run.
        batch: The batch of a step.
        mesh: Devices.
        flops: Model FLOPs of the step.
        steps: Length of the run.
        accumulate: Micro-batches a step.
        limit: Bytes that a device has.
        peak_flops: FLOP/s of all devices.

    Returns:
        The estimate.
    """

    def kept(params: Params, frozen: Params | None, ref_params: Params | None, batch: Batch):
        return jax.vjp(lambda p: loss_fn(with_frozen(p, frozen), ref_params, batch)[0], params)[1]

    micro = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[accumulate > 1 :], x.dtype), batch)
    residuals = jax.eval_shape(kept, state.params, state.frozen, state.ref_params, micro)
    # The backward pass needs parameters too; they are counted already.
    parameters = {(x.shape, x.dtype) for x in jax.tree.leaves(state.policy)}
    activations = sum(_bytes(x) for x in jax.tree.leaves(residuals) if (x.shape, x.dtype) not in parameters)
    gradients = sum(4 * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(state.params))
    return Estimate(
        memory={
            "policy": _on_device(state.policy),
            "reference": _on_device(state.ref_params),
            "optimizer": _on_device(state.opt_state),
            "gradients": gradients if accumulate == 1 else 2 * gradients,
            "activations": activations // (mesh.shape["data"] * mesh.shape["fsdp"]),
        },
        flops=flops,
        steps=steps,
        limit=limit,
        peak_flops=peak_flops,
    )


def _bytes(x: jax.ShapeDtypeStruct) -> int:
    return math.prod(x.shape) * jnp.dtype(x.dtype).itemsize


def _on_device(tree) -> int:
    """Bytes of a tree's arrays on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def device_memory(device: jax.Device) -> int | None:
    """Bytes that a device has for this program; of a CPU, those of the machine."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats or device.platform != "cpu":
        return stats.get("bytes_limit")
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()
