"""The plan of a run on hardware that is not there: what its step needs, and what binds it."""

import re
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import jax

from qstar_jax.config import DpoConfig, LossOptions, PlanConfig, ReferenceOptions, SftConfig
from qstar_jax.data.tokenization import Example
from qstar_jax.errors import InputError
from qstar_jax.models import CausalLM
from qstar_jax.plan.costs import collectives, memory_traffic
from qstar_jax.plan.step import CompiledProgram, LoweredStep, lower_step, pairs_of_lengths
from qstar_jax.plan.topology import Chip, chip_of, devices_per_chip, topology_devices
from qstar_jax.sharding import make_mesh
from qstar_jax.store.checkpoints import find_checkpoint, read_description
from qstar_jax.store.hub.folder import read_config_of
from qstar_jax.training.plan import make_plan
from qstar_jax.training.throughput import peak_flops


@dataclass(frozen=True)
class Plan:
    """What a step needs; all figures are of one device and one step.

    Attributes:
        topology: The hardware.
        devices: Number of its devices.
        memory_limit: Bytes of memory.
        memory: Bytes: of arguments, of temporaries, in total; empty if the compiler found no room for them.
        refusal: What the compiler said then; None if it compiled.
        flops: FLOPs that the step needs, and those of the products in the program, which lack those of kernels that
            cannot be read.
        collectives: Kind -> how often it runs, and bytes that it sends.
        memory_traffic: Bytes read from and written to memory, at most: as if nothing stayed in the
            processor between two kernels.
        seconds: By arithmetic, memory and network, each on its own, at the rates of the data sheet.
        expected_mfu: Share of the peak that the step's FLOPs take if what binds takes all the time; None if unknown.
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
    compile_seconds: float

    @property
    def fits(self) -> bool:
        """Whether the memory of a device holds the step."""
        return self.refusal is None and self.memory["total"] <= self.memory_limit

    @property
    def binds(self) -> str | None:
        """What takes the most time: arithmetic, memory or network; None if unknown."""
        return max(self.seconds, key=self.seconds.get) if self.seconds else None

    def to_json(self) -> dict[str, Any]:
        """Returns the contents of plan.json."""
        return asdict(self) | {"fits": self.fits, "binds": self.binds}


def make_run_plan(config: PlanConfig, topology: str) -> Plan:
    """Compiles the step of a run for a topology.

    Raises:
        InputError: If options do not fit the model or the topology, or a package is missing that compiles for it.
    """
    chip, devices = chip_of(topology), topology_devices(topology)
    chip = _share_of(chip, devices_per_chip(topology, devices))
    run, mesh = run_options(config), make_mesh(config.mesh, devices)
    step = lower_step(make_plan(run), read_model(config), examples_of(config), mesh)
    began = time.perf_counter()
    try:
        program = CompiledProgram(step.lowered.compile(), len(devices))
    except jax.errors.JaxRuntimeError as error:
        if not re.search("RESOURCE_EXHAUSTED|[Oo]ut of memory", str(error)):
            raise
        return _refused(topology, devices, chip, step, str(error), time.perf_counter() - began)
    return _measured(topology, devices, chip, step, program, time.perf_counter() - began)


def run_options(config: PlanConfig) -> DpoConfig | SftConfig:
    """Returns the options of the verb that is planned.

    Raises:
        InputError: If some of those that were given are not for this verb.
    """
    if config.verb == "sft" and (config.loss, config.reference) != (LossOptions(), ReferenceOptions()):
        raise InputError("--loss and --reference have no effect with --verb sft; leave them out")
    # No file is read, so none need be named; without data, the length of an epoch is unknown.
    data = replace(config.data, train=config.data.train or "examples of one length")
    train = replace(config.train, steps=config.train.steps or config.optimizer.warmup_steps + 1)
    kind = SftConfig if config.verb == "sft" else DpoConfig
    options = {field.name: getattr(config, field.name) for field in fields(kind)}
    return kind(**options | {"data": data, "train": train})


def read_model(config: PlanConfig) -> CausalLM:
    """Reads the shape of a model, without its weights.

    Raises:
        InputError: If there is no usable config.json.
    """
    checkpoint = find_checkpoint(Path(config.model).expanduser())
    if checkpoint is None:
        return CausalLM.from_hf(read_config_of(config.model), config.compute)
    return read_description(checkpoint).build_model(config.compute).base


def check_lengths(config: PlanConfig) -> str | None:
    """Checks the lengths against the context of the model, as `CausalLM.check_length` does."""
    return read_model(config).check_length(sum(_lengths(config)), "prompt and response")


def examples_of(config: PlanConfig) -> list[Example]:
    """Returns the examples of one batch, all as long as the options say."""
    pairs = pairs_of_lengths(*_lengths(config), config.train.batch_size)
    return pairs if config.verb == "dpo" else [replace(pair, responses=pair.responses[:1]) for pair in pairs]


def _lengths(config: PlanConfig) -> tuple[int, int]:
    prompt = config.data.max_prompt_length if config.prompt_length is None else config.prompt_length
    response = config.data.max_length - prompt if config.response_length is None else config.response_length
    if prompt < 1 or response < 1:
        raise InputError(
            f"a prompt of {prompt} and a response of {response} tokens: expected at least 1 of each; set "
            "--prompt_length and --response_length, or data.max_length above data.max_prompt_length"
        )
    return prompt, response


def _share_of(chip: Chip, devices: int) -> Chip:
    """What one of several devices of a chip has of it."""
    return replace(
        chip,
        memory_bytes=chip.memory_bytes // devices,
        memory_bandwidth=chip.memory_bandwidth / devices,
        network_bandwidth=chip.network_bandwidth / devices,
    )


def _refused(
    topology: str, devices: Sequence[jax.Device], chip: Chip, step: LoweredStep, error: str, seconds: float
) -> Plan:
    flops = {"needed": step.flops / len(devices)}
    refusal = error.partition("\n")[0]
    return Plan(topology, len(devices), chip.memory_bytes, {}, refusal, flops, {}, 0.0, {}, None, seconds)


def _measured(
    topology: str,
    devices: Sequence[jax.Device],
    chip: Chip,
    step: LoweredStep,
    program: CompiledProgram,
    compile_seconds: float,
) -> Plan:
    flops = {"needed": step.flops / len(devices), "program": sum(program.flops.values())}
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
        compile_seconds=compile_seconds,
    )
