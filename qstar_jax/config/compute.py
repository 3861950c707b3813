"""Dtypes, rematerialization, and the mesh of devices."""

from dataclasses import dataclass, field
from typing import Literal

Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class ComputeOptions:
    """Numbers and memory.

    Args:
        param_dtype: Type in which parameters (and optimizer moments) are stored; float32 with `dtype` bfloat16 trains
            float32 masters by bfloat16 products.
        dtype: Type of activations and matrix products; log-softmax, sums over tokens and losses are float32 always.
        remat: What the backward pass recomputes instead of keeping it: `none`; `dots`, all but matrix products;
            `attention`, all but what attention has read; `full`, each layer.
        attention: Of training and scoring. `dense` computes the scores of whole rows at once; `blockwise` those of 128
            queries at a time, and again in the backward pass, for long rows; `flash` is a kernel for TPUs whose scores
            never leave the processor; `auto` is flash on a TPU, else blockwise.
        longrope: Which rotary frequencies a model with longrope (Phi 3) has: those for texts that fit the context
            before its stretch (`short`), or those for longer ones (`long`), for all texts alike; `auto` is short where
            no row is longer than that context, and refuses to guess where one is.
    """

    param_dtype: Dtype = "float32"
    dtype: Dtype = "float32"
    remat: Literal["none", "dots", "attention", "full"] = "none"
    attention: Literal["auto", "dense", "blockwise", "flash"] = "auto"
    longrope: Literal["auto", "short", "long"] = "auto"


@dataclass(frozen=True)
class MeshOptions:
    """How devices are arranged and parameters are cut.

    Args:
        data: Devices along the axis that replicates parameters and splits the batch; -1 takes what is left.
        fsdp: Devices along the axis that splits both parameters and batch.
        tensor: Devices along the axis that splits parameters only (tensor parallelism).
        min_shard_size: Arrays with fewer elements are replicated.
        overrides: Regular expression on a parameter's path -> one axis name (or null) for each of its dimensions.
        multi_process: Join the other processes of this job. Slurm, Open MPI, Kubernetes and TPU pods are recognised;
            elsewhere JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say who is who.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    min_shard_size: int = 65536
    overrides: dict[str, list[str | None]] = field(default_factory=dict)
    multi_process: bool = False
