"""The plan of a run on hardware that is not there: what a step or a search needs, and what binds it."""

import re
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import jax
from jax.sharding import Mesh

from qstar_jax.config import PlanConfig
from qstar_jax.plan.costs import collectives, memory_traffic
from qstar_jax.plan.decode import LoweredSearch, lower_search
from qstar_jax.plan.estimate import abstract_gpus, estimate_step
from qstar_jax.plan.estimate_search import estimate_search
from qstar_jax.plan.needs import Needs
from qstar_jax.plan.options import (
    decode_plan,
    examples_of,
    mesh_options,
    prompt_length_of,
    read_model,
    read_models,
    run_plan,
)
from qstar_jax.plan.step import CompiledProgram, LoweredStep, abstract_step, lower_step
from qstar_jax.plan.topology import chip_count, chip_of, device_count, share_of_chip, topology_devices
from qstar_jax.sharding import AXES, axis_sizes, make_mesh


@dataclass(frozen=True)
class Plan:
    """What a step of training, or a batch of a search, needs; all figures are of one device, but for the tokens.

    Attributes:
        topology: The hardware.
        devices: Number of its devices.
        estimate: Whether nothing was compiled: what is needed was estimated from shapes.
        memory_limit: Bytes of memory.
        needs: Memory, FLOPs, collectives, traffic and tokens.
        refusal: What the compiler said if it found no room for the program; None otherwise.
        seconds: By arithmetic, memory and network, each on its own, at the rates of the data sheet.
        expected_mfu: Share of the peak that the model's FLOPs take if what binds takes all the time; None if unknown.
        tokens_per_second: Tokens, if what binds takes all the time; None if unknown.
        compile_seconds: Time to compile the program here; None if nothing was compiled.
    """

    topology: str
    devices: int
    estimate: bool
    memory_limit: int
    needs: Needs
    refusal: str | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    expected_mfu: float | None = None
    tokens_per_second: float | None = None
    compile_seconds: float | None = None

    @property
    def fits(self) -> bool:
        """Whether the memory of a device holds it."""
        return self.refusal is None and self.needs.memory["total"] <= self.memory_limit

    @property
    def binds(self) -> str | None:
        """What takes the most time: arithmetic, memory or network; None if unknown."""
        return max(self.seconds, key=self.seconds.get) if self.seconds else None

    def to_json(self) -> dict[str, Any]:
        """Returns the contents of plan.json."""
        values = asdict(self)
        return values | values.pop("needs") | {"fits": self.fits, "binds": self.binds}


def make_run_plan(config: PlanConfig, topology: str) -> Plan:
    """Plans the step of a run, or a search, on a topology: compiled where that is possible, otherwise estimated.

    Raises:
        InputError: If options do not fit the model or the topology, or a package is missing that compiles for it.
    """
    return compile_plan(config, topology) if chip_of(topology).is_compiled_for else estimate_plan(config, topology)


def compile_plan(config: PlanConfig, topology: str) -> Plan:
    """Compiles the step of a run, or a search, for a topology; see `make_run_plan`."""
    devices = topology_devices(topology)
    lowered = lower_program(config, make_mesh(mesh_options(config), devices))
    began = time.perf_counter()
    try:
        program = CompiledProgram(lowered.lowered.compile(), len(devices), lowered.unknown_trips)
    except jax.errors.JaxRuntimeError as error:
        if not re.search("RESOURCE_EXHAUSTED|[Oo]ut of memory", str(error)):
            raise
        needs = Needs({}, {"needed": lowered.flops / len(devices)}, {}, 0.0, lowered.tokens)
        limit = share_of_chip(topology, len(devices)).memory_bytes
        refusal, seconds = str(error).partition("\n")[0], time.perf_counter() - began
        return Plan(topology, len(devices), False, limit, needs, refusal, compile_seconds=seconds)
    seconds = time.perf_counter() - began
    return _plan(topology, len(devices), _measure(lowered, program), compile_seconds=seconds)


def estimate_plan(config: PlanConfig, topology: str) -> Plan:
    """Estimates the step of a run, or a search, on GPUs from shapes alone.

    Raises:
        InputError: If options do not fit the model or the topology.
    """
    mesh = abstract_gpus(mesh_sizes(config, topology), chip_of(topology).kind)
    if config.verb != "generate":
        step = abstract_step(run_plan(config), read_model(config, config.model), examples_of(config), mesh)
        needs = estimate_step(step, mesh)
    else:
        prompts = config.batch_size, prompt_length_of(config)
        needs = estimate_search(read_models(config), decode_plan(config), *prompts, mesh, mesh_options(config))
    return _plan(topology, chip_count(topology), needs, estimate=True)


def mesh_sizes(config: PlanConfig, topology: str) -> dict[str, int]:
    """Returns the sizes of the axes of the mesh on a topology.

    Raises:
        InputError: If they do not multiply to the number of its devices.
    """
    return dict(zip(AXES, axis_sizes(mesh_options(config), device_count(topology)), strict=True))


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


def _measure(lowered: LoweredStep | LoweredSearch, program: CompiledProgram) -> Needs:
    """Reads off a compiled program what it needs."""
    transfers = defaultdict(lambda: {"count": 0.0, "bytes": 0.0})
    for item in collectives(program.module, program.devices):
        transfers[item.kind]["count"] += item.runs
        transfers[item.kind]["bytes"] += item.wire_bytes
    flops = {"needed": lowered.flops / program.devices, "program": sum(program.flops.values())}
    return Needs(program.memory, flops, dict(transfers), memory_traffic(program.module), lowered.tokens)


def _plan(
    topology: str, devices: int, needs: Needs, *, estimate: bool = False, compile_seconds: float | None = None
) -> Plan:
    """Adds what the chips do with it."""
    chip = share_of_chip(topology, devices)
    seconds = {
        "arithmetic": max(needs.flops.values()) / chip.peak_flops,
        "memory": needs.memory_traffic / chip.memory_bandwidth,
        "network": sum(item["bytes"] for item in needs.collectives.values()) / chip.network_bandwidth,
    }
    longest = max(seconds.values())
    return Plan(
        topology=topology,
        devices=devices,
        estimate=estimate,
        memory_limit=chip.memory_bytes,
        needs=needs,
        seconds=seconds,
        expected_mfu=needs.flops["needed"] / chip.peak_flops / longest,
        tokens_per_second=needs.tokens / longest,
        compile_seconds=compile_seconds,
    )
