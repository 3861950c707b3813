"""Hardware that need not be there: devices to compile programs for, and what the makers say of each chip."""

import math
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from ctypes.util import find_library
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import jax
from jax.experimental.topologies import get_topology_desc

from qstar_jax.errors import InputError

GPUS = Path(__file__).parent / "gpus"  # descriptions for XLA, as a card's driver would give them


@dataclass(frozen=True)
class Chip:
    """A chip; rates are of its data sheet. For the peak of its matrix products, see `training.throughput.BF16_PEAKS`.

    Attributes:
        name: What a topology calls it.
        memory_bytes: Its memory.
        memory_bandwidth: Bytes per second to and from its memory.
        network_bandwidth: Bytes per second that it can send to other chips of a slice, or GPUs of a host.
        slow_bandwidth: Bytes per second that it can send to other slices, or hosts; None if no data sheet says it.
        example: A topology of it.
    """

    name: str
    memory_bytes: int
    memory_bandwidth: float
    network_bandwidth: float
    slow_bandwidth: float | None
    example: str

    @property
    def is_gpu(self) -> bool:
        """Whether it is an NVIDIA GPU; otherwise it is a TPU."""
        return (GPUS / f"{self.name}.txtpb").is_file()


# TPUs: docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e and tpu7x, where the bandwidth between chips is that of both
# directions together; of the data-center network, a chip has its share of its pod's. H100: NVIDIA's data sheets, of the
# SXM5 module, NVLink in one direction, and of the DGX, an adapter of 400 Gb/s for each GPU; the memory is what its
# driver reports.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 32 * 2**30, 1228e9, 300e9, None, "v4:2x2x4"),
        Chip("v5e", 16 * 2**30, 819e9, 200e9, 3.125e9, "v5e:4x4"),
        Chip("v5p", 95 * 2**30, 2765e9, 600e9, 6.25e9, "v5p:2x2x4"),
        Chip("v6e", 32 * 2**30, 1638e9, 400e9, 12.5e9, "v6e:4x4"),
        Chip("tpu7x", 192 * 2**30, 7380e9, 600e9, 12.5e9, "tpu7x:2x2x4"),
        Chip("h100", 84942979072, 3352e9, 450e9, 50e9, "h100:1x1x8"),
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


def devices_per_chip(topology: str, devices: Sequence[jax.Device]) -> int:
    """Returns the number of devices that share the memory and the rates of a chip: two in a tpu7x."""
    slices, _, sizes = _parse(topology)
    return len(devices) // (slices * math.prod(sizes))


def devices_per_slice(topology: str, devices: Sequence[jax.Device]) -> int:
    """Returns the number of devices of a slice of TPUs, or of a host of GPUs: between these, the network is slow."""
    slices, chip, sizes = _parse(topology)
    return sizes[-1] if chip.is_gpu else len(devices) // slices


def _parse(topology: str) -> tuple[int, Chip, list[int]]:
    """Returns the number of slices of TPUs, the chip, and the arrangement of a slice."""
    match = re.fullmatch(r"(?:([1-9]\d*)x)?([a-z]\w*):([1-9]\d*(?:x[1-9]\d*){0,2})", topology)
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


def _tpu_devices(chip: Chip, sizes: list[int], slices: int) -> list[jax.Device]:
    if find_spec("libtpu") is None:
        raise InputError("compiling for TPUs needs libtpu: pip install 'qstar_jax[plan]'")
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
