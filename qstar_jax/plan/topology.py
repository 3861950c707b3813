"""Hardware that need not be there: devices to compile programs for, and what the makers say of each chip."""

import math
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from ctypes.util import find_library
from dataclasses import dataclass, replace
from importlib.metadata import requires, version
from importlib.util import find_spec
from pathlib import Path

import jax
from jax.experimental.topologies import get_topology_desc
from packaging.requirements import Requirement

from qstar_jax.errors import InputError
from qstar_jax.training.throughput import BF16_PEAKS

GPUS = Path(__file__).parent / "gpus"  # descriptions for XLA, as a card's driver would give them


@dataclass(frozen=True)
class Chip:
    """A chip; rates are of its data sheet.

    Attributes:
        name: What a topology calls it.
        kind: How the name of its device begins, as in `training.throughput.BF16_PEAKS`.
        memory_bytes: Its memory.
        memory_bandwidth: Bytes per second to and from its memory.
        network_bandwidth: Bytes per second that it can send to other chips of a slice, or GPUs of a host.
        slow_bandwidth: Bytes per second that it can send to other slices, or hosts; None if no data sheet says it.
        example: A topology of it.
        share: What part of a chip this is.
    """

    name: str
    kind: str
    memory_bytes: int
    memory_bandwidth: float
    network_bandwidth: float
    slow_bandwidth: float | None
    example: str
    share: float = 1.0

    @property
    def is_gpu(self) -> bool:
        """Whether it is an NVIDIA GPU; otherwise it is a TPU."""
        return not self.kind.startswith("TPU")

    @property
    def is_compiled_for(self) -> bool:
        """Whether programs can be compiled for it; otherwise what they need is estimated."""
        return not self.is_gpu or (GPUS / f"{self.name}.txtpb").is_file()

    @property
    def peak_flops(self) -> float:
        """FLOP/s of its matrix products in bfloat16."""
        return BF16_PEAKS[self.kind] * self.share


# TPUs: docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e and tpu7x, where the bandwidth between chips is that of both
# directions together; of the data-center network, a chip has its share of its pod's. GPUs: NVIDIA's data sheets of the
# SXM modules (A100, H100, H200, HGX B200), where NVLink is given here in one direction; of their DGX, which has an
# adapter for each GPU (A100: 200 Gb/s, later ones 400); and of cards, which have PCIe: 32 GB/s in one direction (T4:
# 16). Their memory is what the driver reports, a little less than on the sheet.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "TPU v4", 32 * 2**30, 1228e9, 300e9, None, "v4:2x2x4"),
        Chip("v5e", "TPU v5 lite", 16 * 2**30, 819e9, 200e9, 3.125e9, "v5e:4x4"),
        Chip("v5p", "TPU v5", 95 * 2**30, 2765e9, 600e9, 6.25e9, "v5p:2x2x4"),
        Chip("v6e", "TPU v6 lite", 32 * 2**30, 1638e9, 400e9, 12.5e9, "v6e:4x4"),
        Chip("tpu7x", "TPU7x", 192 * 2**30, 7380e9, 600e9, 12.5e9, "tpu7x:2x2x4"),
        Chip("h100", "NVIDIA H100", 84942979072, 3352e9, 450e9, 50e9, "h100:1x1x8"),
        Chip("h200", "NVIDIA H200", 143167 * 2**20, 4800e9, 450e9, 50e9, "h200:1x1x8"),
        Chip("b200", "NVIDIA B200", 182642 * 2**20, 8000e9, 900e9, 50e9, "b200:1x1x8"),
        Chip("a100-40gb", "NVIDIA A100", 40536 * 2**20, 1555e9, 300e9, 25e9, "a100-40gb:1x1x8"),
        Chip("a100-80gb", "NVIDIA A100", 81051 * 2**20, 2039e9, 300e9, 25e9, "a100-80gb:1x1x8"),
        Chip("l40s", "NVIDIA L40S", 45589 * 2**20, 864e9, 32e9, None, "l40s:1x1x4"),
        Chip("l4", "NVIDIA L4", 22563 * 2**20, 300e9, 32e9, None, "l4:1x1x4"),
        Chip("a10g", "NVIDIA A10G", 22723 * 2**20, 600e9, 32e9, None, "a10g:1x1x4"),
        Chip("t4", "Tesla T4", 14917 * 2**20, 320e9, 16e9, None, "t4:1x1x4"),
        Chip("rtx4090", "NVIDIA GeForce RTX 4090", 24210 * 2**20, 1008e9, 32e9, None, "rtx4090:1x1x1"),
    )
}


# Arrangements that can be rented, the smallest first.
_FLAT = "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16"
_CUBES = "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8"
_HOSTS = "1x1x1 1x1x2 1x1x4 1x1x8 1x2x8 1x4x8 1x8x8"


def slices_of(chip: str) -> list[str]:
    """Returns the topologies of a chip, the smallest first.

    Raises:
        InputError: If the chip is unknown.
    """
    if chip not in CHIPS:
        raise InputError(f"unknown chip {chip!r}; expected one of {', '.join(CHIPS)}")
    is_flat = CHIPS[chip].example.partition(":")[2].count("x") == 1
    sizes = _HOSTS if CHIPS[chip].is_gpu else _FLAT if is_flat else _CUBES
    return [f"{chip}:{size}" for size in sizes.split()]


def chip_of(topology: str) -> Chip:
    """Returns the chip of a topology such as v5e:4x4, or 2xv5e:4x4 (two slices).

    Raises:
        InputError: If the name is none of a topology, or the chip is unknown.
    """
    return _parse(topology)[1]


def chip_count(topology: str) -> int:
    """Returns the number of chips of a topology."""
    slices, _, sizes = _parse(topology)
    return slices * math.prod(sizes)


def device_count(topology: str) -> int:
    """Returns the number of devices of a topology: one per chip, but two in a tpu7x.

    Raises:
        InputError: If it is unknown, or a package is missing that compiles for TPUs.
    """
    return chip_count(topology) if chip_of(topology).is_gpu else len(topology_devices(topology))


def slice_count(topology: str) -> int:
    """Returns the number of slices of TPUs, or of hosts of GPUs: between these, the network is slow."""
    slices, chip, sizes = _parse(topology)
    return math.prod(sizes[:-1]) if chip.is_gpu else slices


def share_of_chip(topology: str, devices: int) -> Chip:
    """Returns the chip of a topology, with the memory and the rates that each of so many devices has of it."""
    chip, share = chip_of(topology), chip_count(topology) / devices
    return replace(
        chip,
        memory_bytes=int(chip.memory_bytes * share),
        memory_bandwidth=chip.memory_bandwidth * share,
        network_bandwidth=chip.network_bandwidth * share,
        slow_bandwidth=None if chip.slow_bandwidth is None else chip.slow_bandwidth * share,
        share=share,
    )


def _parse(topology: str) -> tuple[int, Chip, list[int]]:
    """Returns the number of slices of TPUs, the chip, and the arrangement of a slice."""
    match = re.fullmatch(r"(?:([1-9]\d*)x)?([a-z][\w-]*):([1-9]\d*(?:x[1-9]\d*){0,2})", topology)
    slices, name, sizes = match.groups() if match else (None, "", "")
    chip = CHIPS.get(name)
    if chip is None or (chip.is_gpu and (slices or sizes.count("x") != 2)):
        raise InputError(
            f"unknown topology {topology!r}; expected a chip and its arrangement, such as "
            f"{', '.join(chip.example for chip in CHIPS.values())} (GPUs: slices x hosts x devices of a host), or "
            "2xv5e:4x4 for two slices"
        )
    if slices and chip.slow_bandwidth is None:
        raise InputError(f"topology {topology!r}: no data sheet says what the network between slices of {name} sends")
    return int(slices or 1), chip, [int(size) for size in sizes.split("x")]


def topology_devices(topology: str) -> list[jax.Device]:
    """Returns the devices of a topology, for which programs can be compiled but not run.

    Args:
        topology: A chip and its arrangement: v5e:4x4, v5p:2x2x4, 2xv5e:4x4 (two slices), h100:1x1x8 (slices x hosts x
            devices of a host).

    Raises:
        InputError: If it is unknown, or a package is missing that compiles for it.
    """
    slices, chip, sizes = _parse(topology)
    if not chip.is_compiled_for:
        raise InputError(f"topology {topology!r}: programs cannot be compiled for this GPU, but `qstar plan` estimates")
    try:
        return list(_gpu_devices(chip, sizes) if chip.is_gpu else _tpu_devices(chip, sizes, slices))
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition(": ")[2]
        raise InputError(f"topology {topology!r}: {reason} (an example that exists: {chip.example})") from error


def _gpu_devices(chip: Chip, sizes: Sequence[int]) -> list[jax.Device]:
    missing = ", ".join(_missing_for_gpus())
    if missing:
        raise InputError(f"compiling for NVIDIA GPUs needs {missing}: pip install 'qstar_jax[plan-gpu]'")
    description = (GPUS / f"{chip.name}.txtpb").read_text(encoding="utf-8")
    arrangement = "x".join(map(str, sizes))
    return get_topology_desc(chip.name, "cuda", topology=arrangement, target_config=description).devices


def _missing_for_gpus() -> Iterator[str]:
    """Yields the packages that are not installed; the system may have what they hold."""
    if not list(_installed("jax_plugins", "xla_cuda*")):
        yield "jax-cuda12-plugin"
    if not shutil.which("ptxas") and not list(_installed("nvidia", "*/bin/ptxas")):
        yield "nvidia-cuda-nvcc-cu12"
    # JAX asks cuDNN for its version before it compiles attention for it.
    if not find_library("cudnn") and not list(_installed("nvidia", "cudnn/lib/libcudnn.so.*")):
        yield "nvidia-cudnn-cu12"


def _installed(package: str, pattern: str) -> Iterator[Path]:
    """Yields the files of a namespace package that match a pattern."""
    spec = find_spec(package)
    for folder in spec.submodule_search_locations if spec else ():
        yield from Path(folder).glob(pattern)


def _check_libtpu():
    """Refuses a libtpu other than that which the installed jax asks for: programs would not be those of a TPU."""
    for text in requires("jax") or ():
        needed = Requirement(text)
        if needed.name == "libtpu" and not needed.specifier.contains(version("libtpu"), prereleases=True):
            raise InputError(
                f"libtpu {version('libtpu')} does not belong to jax {version('jax')}, which needs "
                f"libtpu{needed.specifier}: pip install 'qstar_jax[plan]'"
            )


def _tpu_devices(chip: Chip, sizes: list[int], slices: int) -> list[jax.Device]:
    if find_spec("libtpu") is None:
        raise InputError("compiling for TPUs needs libtpu: pip install 'qstar_jax[plan]'")
    _check_libtpu()
    # Without these, libtpu would look for a TPU, its metadata and its neighbours, and only one process could load it.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")  # of this machine; what counts is the topology
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # Smaller topologies than a whole host of 2x2 chips are part of one.
    whole_host = len(sizes) > 1 and min(sizes[:2]) > 1
    options = {} if whole_host else {"chips_per_host_bounds": tuple(sizes + [1] * (3 - len(sizes)))}
    if chip.name == "v4":
        options["chip_config_name"] = "megacore"  # both cores as one device, as programs see a v4
    if slices > 1:
        options["num_slices"] = slices
    return get_topology_desc(f"{chip.name}:{'x'.join(map(str, sizes))}", "tpu", **options).devices
