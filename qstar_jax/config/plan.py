"""The verb that plans runs for hardware that is not there."""

from dataclasses import dataclass, field
from typing import Literal

from qstar_jax.config.compute import MeshOptions
from qstar_jax.config.decode import DecodeOptions
from qstar_jax.config.loss import ReferenceOptions
from qstar_jax.config.train import DpoConfig
from qstar_jax.config.verbs import GuidancePair


@dataclass(frozen=True)
class PlanMeshOptions(MeshOptions):
    """How devices are arranged and parameters are sharded.

    Args:
        data: Devices along the axis that replicates parameters and shards the batch; null: 1, or all that are left if
            `generate` is planned. -1 takes all that are left.
        fsdp: Devices along the axis that shards both parameters and batch; null: all that are left, or 1 if `generate`
            is planned.
        tensor: Devices along the axis that shards parameters only (tensor parallelism); null: 1.
    """

    data: int | None = None
    fsdp: int | None = None
    tensor: int | None = None


@dataclass(frozen=True)
class PlanConfig(DpoConfig):
    """What a run needs on hardware that one does not have: memory, arithmetic, traffic, and seconds.

    A step of `dpo` or `sft`, or a batch of `generate`, is compiled from shapes alone: neither weights nor data are
    read, all texts are as long as the options allow, and no response ends early. Takes the options of the verb that is
    planned, and refuses those of the others.

    Args:
        model: Folder with a config.json, hub name (of which only that is downloaded), or folder of an earlier run.
        out: Folder for plan.json.
        verb: The verb that is planned.
        topology: The hardware: a chip and its arrangement, such as v5e:4x4, or h100:1x1x8 (slices x hosts x devices of
            a host).
        topologies: A chip, such as v5e: its slices are tried from the smallest on, until one holds the run.
        prompt_length: Tokens of every prompt; null: `data.max_prompt_length`.
        response_length: Tokens of every response in training; null: what `data.max_length` leaves.
        search: Whether to try settings that need less memory where the run does not fit.
        reference: Options of the reference of `dpo`, or the model that `generate` reads as one; without a name, one of
            the policy's shape.
        pairs: Models whose differences guide `generate`; each is {tuned: ..., untuned: ..., weight: ...}.
        batch_size: Prompts per batch of `generate`.
        decode: How `generate` decodes.
        mesh: How devices are arranged and parameters are sharded; all devices are `fsdp` for `dpo` and `sft`, and
            `data` for `generate`, unless some are given to other axes.
    """

    verb: Literal["dpo", "sft", "generate"] = "dpo"
    topology: str | None = None
    topologies: str | None = None
    prompt_length: int | None = None
    response_length: int | None = None
    search: bool = True
    reference: ReferenceOptions | str = field(default_factory=ReferenceOptions, metadata={"path": True})
    pairs: list[GuidancePair] = field(default_factory=list)
    batch_size: int = 4
    decode: DecodeOptions = field(default_factory=DecodeOptions)
    mesh: PlanMeshOptions = field(default_factory=PlanMeshOptions)
