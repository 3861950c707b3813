"""The verb that plans runs for hardware that is not there."""

from dataclasses import dataclass, field
from typing import Literal

from qstar_jax.config.compute import MeshOptions
from qstar_jax.config.train import DpoConfig


@dataclass(frozen=True)
class PlanConfig(DpoConfig):
    """What a step of a run needs on hardware that one does not have: memory, arithmetic, traffic, and seconds.

    The step is compiled from shapes alone: neither weights nor data are read. Takes the options of `dpo` and `sft`.

    Args:
        model: Folder with a config.json, hub name (of which only that is downloaded), or folder of an earlier run.
        out: Folder for plan.json.
        verb: The verb that is planned.
        topology: The hardware: a chip and its arrangement, such as v5e:4x4, or h100:1x1x8 (slices x hosts x devices of
            a host).
        topologies: A chip, such as v5e: its slices are tried from the smallest on, until one holds the run.
        prompt_length: Tokens of every prompt; null: `data.max_prompt_length`.
        response_length: Tokens of every response; null: what `data.max_length` leaves.
        search: Whether to try settings that need less memory where the run does not fit.
        mesh: How devices are arranged and parameters are sharded; by default, all devices are `fsdp`.
    """

    verb: Literal["dpo", "sft"] = "dpo"
    topology: str | None = None
    topologies: str | None = None
    prompt_length: int | None = None
    response_length: int | None = None
    search: bool = True
    mesh: MeshOptions = field(default_factory=lambda: MeshOptions(data=1, fsdp=-1))
