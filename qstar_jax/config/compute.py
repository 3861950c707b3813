"""Dtypes, rematerialization, and the mesh of devices."""

from dataclasses import dataclass, field
from typing import Literal

from qstar_jax.config.ranges import ranged

Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class ComputeOptions:
    """Dtypes and rematerialization.

    Args:
        param_dtype: Dtype in which parameters and optimizer moments are stored; float32 with `dtype` bfloat16 trains
            float32 master weights with bfloat16 matrix products.
        dtype: Dtype of activations and matrix products; log-softmax, sums over tokens and losses are always float32.
        remat: What the backward pass recomputes instead of keeping it: `none`; `dots`, all but matrix products and the
            output of attention; `attention`, all but the output of attention; `full`, every layer.
        attention: Attention in training and scoring. `dense` computes all scores of a sequence at once; `blockwise`
            those of 128 queries at a time, and again in the backward pass, for long sequences; `flash` is a TPU kernel
            whose scores never leave the processor, `cudnn` its counterpart for bfloat16 on NVIDIA GPUs; `auto` is flash
            on a TPU, cudnn on a GPU for what it can compute, else blockwise.
        scan_layers: Whether training and scoring loop over one compiled layer. Without the loop, programs take two to
            six times as long to compile, and no longer copy weights and activations from and to stacks of all layers: a
            DPO step compiled for an H100 reads and writes 14 to 29 % less memory.
        longrope: Which rotary frequencies a model with longrope (Phi 3) uses, for all texts alike: those for texts that
            fit its original context (`short`), or those for longer ones (`long`); `auto` is short if no sequence is
            longer than that context, and refuses to guess otherwise.
    """

    param_dtype: Dtype = "float32"
    dtype: Dtype = "float32"
    remat: Literal["none", "dots", "attention", "full"] = "none"
    attention: Literal["auto", "dense", "blockwise", "flash", "cudnn"] = "auto"
    scan_layers: bool = True
    longrope: Literal["auto", "short", "long"] = "auto"


@dataclass(frozen=True)
class MeshOptions:
    """How devices are arranged and parameters are sharded.

    Args:
        data: Devices along the axis that replicates parameters and shards the batch; -1 takes all that are left.
        fsdp: Devices along the axis that shards both parameters and batch.
        tensor: Devices along the axis that shards parameters only (tensor parallelism).
        min_shard_size: Arrays with fewer elements are replicated.
        overrides: Regular expression on a parameter's path -> one axis name (or null) for each of its dimensions.
        multi_process: Join the other processes of this job, where a verb trains or exports. Slurm, Open MPI, Kubernetes
            and TPU pods are recognized; elsewhere set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
        join_timeout: Seconds to wait for the others at the start; large pods need more.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    min_shard_size: int = ranged(65536, "[0, inf)")
    overrides: dict[str, list[str | None]] = field(default_factory=dict)
    multi_process: bool = False
    join_timeout: int = 300
