"""The plan of a run on hardware that is not there: what a step or a search needs, and what binds it."""

import re
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
from jax.sharding import Mesh

from qstar_jax.config import PlanConfig
from qstar_jax.plan.costs import collectives, memory_traffic
from qstar_jax.plan.decode import LoweredSearch, lower_search
from qstar_jax.plan.options import (
    decode_plan,
    examples_of,
    mesh_options,
    prompt_length_of,
    read_model,
    read_models,
    run_plan,
)
from qstar_jax.plan.step import CompiledProgram, LoweredStep, lower_step
from qstar_jax.plan.topology import Chip, chip_of, devices_per_chip, topology_devices
from qstar_jax.sharding import make_mesh
from qstar_jax.training.throughput import peak_flops


@dataclass(frozen=True)
class Plan:
    """What a step of training, or a batch of a search, needs; all figures are of one device, but for the tokens.

    Attributes:
        topology: The hardware.
        devices: Number of its devices.
        memory_limit: Bytes of memory.
        memory: Bytes: of arguments, of temporaries, in total; empty if the compiler found no room for them.
        refusal: What the compiler said then; None if it compiled.
        flops: FLOPs that the model needs, and those of the products in the program, which lack those of kernels that
            cannot be read.
        collectives: Kind -> how often it runs, and bytes that it sends.
        memory_traffic: Bytes read from and written to memory, at most: as if nothing stayed in the
            processor between two kernels.
        seconds: By arithmetic, memory and network, each on its own, at the rates of the data sheet.
        expected_mfu: Share of the peak that the model's FLOPs take if what binds takes all the time; None if unknown.
        tokens: Tokens of the texts of a step, or new tokens of the responses of a search, over all devices.
        tokens_per_second: These, if what binds takes all the time; None if unknown.
        compile_seconds: Time to compile the program here.
    """

    topology: str
    devices: int
    memory_limit: int
    memory: dict[str, int]
    refusal: str | None
    flops: dict[str, float]
    collectives: dict[str, dict[str, float]]
    memory_traffic: float
    seconds: dict[str, float]
    expected_mfu: float | None
    tokens: int
    tokens_per_second: float | None
    compile_seconds: float

    @property
    def fits(self) -> bool:
        """Whether the memory of a device holds it."""
        return self.refusal is None and self.memory["total"] <= self.memory_limit

    @property
    def binds(self) -> str | None:
        """What takes the most time: arithmetic, memory or network; None if unknown."""
        return max(self.seconds, key=self.seconds.get) if self.seconds else None

    def to_json(self) -> dict[str, Any]:
        """Returns the contents of plan.json."""
        return asdict(self) | {"fits": self.fits, "binds": self.binds}


def make_run_plan(config: PlanConfig, topology: str) -> Plan:
    """Compiles the step of a run, or a search, for a topology.

    Raises:
        InputError: If options do not fit the model or the topology, or a package is missing that compiles for it.
    """
    chip, devices = chip_of(topology), topology_devices(topology)
    chip = _share_of(chip, devices_per_chip(topology, devices))
    lowered = lower_program(config, make_mesh(mesh_options(config), devices))
    began = time.perf_counter()
    try:
        program = CompiledProgram(lowered.lowered.compile(), len(devices), lowered.unknown_trips)
    except jax.errors.JaxRuntimeError as error:
        if not re.search("RESOURCE_EXHAUSTED|[Oo]ut of memory", str(error)):
            raise
        return _refused(topology, devices, chip, lowered, str(error), time.perf_counter() - began)
    return _measured(topology, devices, chip, lowered, program, time.perf_counter() - began)


def lower_program(config: PlanConfig, mesh: Mesh) -> LoweredStep | LoweredSearch:
    """Lowers the step of a run, or a search, on a mesh.

    Raises:
        InputError: If options do not fit the model or the mesh.
    """
    if config.verb != "generate":
        return lower_step(run_plan(config), read_model(config, config.model), examples_of(config), mesh)
    weights = [pair.weight for pair in config.pairs]
    prompts = config.batch_size, prompt_length_of(config)
    return lower_search(read_models(config), decode_plan(config), *prompts, mesh, mesh_options(config), weights)


def _share_of(chip: Chip, devices: int) -> Chip:
    """What one of several devices of a chip has of it."""
    return replace(
        chip,
        memory_bytes=chip.memory_bytes // devices,
        memory_bandwidth=chip.memory_bandwidth / devices,
        network_bandwidth=chip.network_bandwidth / devices,
    )


def _refused(
    topology: str,
    devices: Sequence[jax.Device],
    chip: Chip,
    lowered: LoweredStep | LoweredSearch,
    error: str,
    seconds: float,
) -> Plan:
    return Plan(
        topology=topology,
        devices=len(devices),
        memory_limit=chip.memory_bytes,
        memory={},
        refusal=error.partition("\n")[0],
        flops={"needed": lowered.flops / len(devices)},
        collectives={},
        memory_traffic=0.0,
        seconds={},
        expected_mfu=None,
        tokens=lowered.tokens,
        tokens_per_second=None,
        compile_seconds=seconds,
    )


def _measured(
    topology: str,
    devices: Sequence[jax.Device],
    chip: Chip,
    lowered: LoweredStep | LoweredSearch,
    program: CompiledProgram,
    compile_seconds: float,
) -> Plan:
    flops = {"needed": lowered.flops / len(devices), "program": sum(program.flops.values())}
    transfers = defaultdict(lambda: {"count": 0.0, "bytes": 0.0})
    for item in collectives(program.module, len(devices)):
        transfers[item.kind]["count"] += item.runs
        transfers[item.kind]["bytes"] += item.wire_bytes
    traffic = memory_traffic(program.module)
    peak = peak_flops(devices[:1]) / devices_per_chip(topology, devices)
    seconds = {
        "arithmetic": max(flops.values()) / peak,
        "memory": traffic / chip.memory_bandwidth,
        "network": sum(item["bytes"] for item in transfers.values()) / chip.network_bandwidth,
    }
    return Plan(
        topology=topology,
        devices=len(devices),
        memory_limit=chip.memory_bytes,
        memory=program.memory,
        refusal=None,
        flops=flops,
        collectives=dict(transfers),
        memory_traffic=traffic,
        seconds=seconds,
        expected_mfu=flops["needed"] / peak / max(seconds.values()),
        tokens=lowered.tokens,
        tokens_per_second=lowered.tokens / max(seconds.values()),
        compile_seconds=compile_seconds,
    )
