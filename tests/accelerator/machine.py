"""The machine: its device, its software, and what it reaches in matrix products and copies.

python tests/accelerator/machine.py [--tiny true]
"""

import json
import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version

import jax
import jax.numpy as jnp
from jsonargparse import auto_cli

from qstar_jax.training.throughput import measured_matmul_peak

PACKAGES = (
    "jax jaxlib jax-cuda12-plugin jax-cuda13-plugin flax optax orbax-checkpoint torch transformers trl vllm".split()
)


def versions() -> dict[str, str]:
    """Versions of what is installed of `PACKAGES`."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def copied_bytes_per_second(gib: float, rounds: int = 3, copies: int = 10) -> float:
    """Measures how fast an array is read and written on the default device: the best of some rounds.

    Args:
        gib: Size of the array; it should not fit into a cache.
        rounds: Rounds.
        copies: Copies per round.

    Returns:
        Bytes per second, those read and those written.
    """
    array = jax.random.normal(jax.random.key(0), (int(gib * 2**28),), "float32")
    negate = jax.jit(jnp.negative)
    negate(array).block_until_ready()
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(copies):
            result = negate(array)
        result.block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * array.nbytes * copies / best


def main(tiny: bool = False):
    """Prints the records.

    Args:
        tiny: Whether to measure small arrays.
    """
    device = jax.devices()[0]
    memory = (device.memory_stats() or {}).get("bytes_limit")
    record = {
        "name": "machine",
        "device": device.device_kind,
        "platform": device.client.platform_version.splitlines()[0],
        "cores": os.cpu_count(),
        **({"memory_gib": memory / 2**30} if memory else {}),
        "matmul_tflops_per_second": measured_matmul_peak("bfloat16", 512 if tiny else None) / 1e12,
        "memory_gigabytes_per_second": copied_bytes_per_second(1 / 16 if tiny else 2) / 1e9,
    }
    print(json.dumps(record))
    print(json.dumps({"name": "versions"} | versions()))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
