"""The speed of a run: tokens per second, and the share of the hardware's peak that the model's own FLOPs take (MFU)."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp

from qstar_jax.models import CausalLM

# Dense bfloat16 peak of one chip in FLOP/s, from the makers' data sheets (RTX 4090: the whitepaper of its architecture,
# with float32 accumulation; T4: float16, as it has no bfloat16); prefix of `device_kind` -> peak.
BF16_PEAKS = {
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA A100": 312e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "Tesla T4": 65e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 2307e12,
}


@dataclass(frozen=True)
class Throughput:
    """Turns a step's token counts and seconds into metrics.

    Attributes:
        model: The model.
        batch_size: Examples per step.
        runs_reference: Whether the reference's forward pass is part of each step.
        peak_flops: FLOP/s of all devices; None if unknown.
    """

    model: CausalLM
    batch_size: int
    runs_reference: bool
    peak_flops: float | None

    def step_flops(self, counts: dict[str, float]) -> float:
        """Model FLOPs of a step: forward and backward of the policy, and forward of the reference if it is run."""
        forward = self.model.config.forward_flops(
            tokens=counts["count/tokens"],
            scored_tokens=counts["count/scored_tokens"],
            context=counts["count/tokens"] / self.batch_size / 2,
        )
        # An adapter saves the gradients of the weights, a third of the rest; what it adds itself is not counted.
        return forward * ((3 if self.model.lora is None else 2) + self.runs_reference)

    def __call__(self, counts: dict[str, float], seconds: float) -> dict[str, float]:
        """Computes the metrics of speed from mean `count/...` metrics per step, and seconds per step.

        Returns:
            Share of padding, tokens per second, and MFU if the peak is known.
        """
        metrics = {
            "perf/padding": 1 - counts["count/tokens"] / counts["count/slots"],
            "perf/tokens_per_second": counts["count/tokens"] / seconds,
        }
        if self.peak_flops:
            metrics["perf/mfu"] = self.step_flops(counts) / seconds / self.peak_flops
        return metrics


@cache
def measured_matmul_peak(dtype: str = "float32", size: int | None = None, rounds: int = 3) -> float:
    """Measures the FLOP/s of large matrix products on the default device, once per process: the best of some rounds.

    The matrices are random: GPUs multiply zeros and ones faster, as bits that never change take less power.

    Args:
        dtype: Dtype of the matrices and of their product.
        size: Edge of the matrices. By default 2048 on a CPU and 8192 elsewhere: smaller products do not fill a GPU.
        rounds: Rounds, of one product on a CPU and of ten elsewhere, whose launches then cost nothing.

    Returns:
        FLOP/s, a multiply-add counted as two.
    """
    on_cpu = jax.default_backend() == "cpu"
    size = size or (2048 if on_cpu else 8192)
    products = 1 if on_cpu else 10
    left, right = (jax.random.normal(key, (size, size), dtype) for key in jax.random.split(jax.random.key(0)))
    product = jax.jit(jnp.matmul)
    product(left, right).block_until_ready()
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(products):
            result = product(left, right)
        result.block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 * products / best


def peak_flops(devices: Sequence[jax.Device]) -> float | None:
    """Peak FLOP/s of all devices together: from the data sheet, or measured where they are one CPU.

    Returns:
        FLOP/s; None for an accelerator that the table does not know.
    """
    if devices[0].platform == "cpu":
        return measured_matmul_peak() * jax.process_count()  # virtual CPU devices share one processor
    kinds = [kind for kind in BF16_PEAKS if devices[0].device_kind.startswith(kind)]
    return BF16_PEAKS[max(kinds, key=len)] * len(devices) if kinds else None


def peak_memory_bytes() -> int:
    """Largest memory in use so far: of the fullest accelerator, or of this process where there is none."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    if all(stats):
        return max(stat["peak_bytes_in_use"] for stat in stats)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
