"""Speed of a DPO step as a share of what this machine's matrix products reach, both measured in one run, in turn.

    python tests/benchmarks/dpo_step.py [--model FOLDER] [--pairs 4] [--length 256] [--rounds 3] [--environment 0.75]

Prints JSON. Tokens are random and sequences are full, so every computed token counts. With `--environment`, that share
of the answers is an environment's, and the step is measured in turn with one that scores all of their tokens.
"""

import json
import statistics
import time
from dataclasses import asdict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from jsonargparse import auto_cli

from qstar_jax.config import ComputeOptions, Dtype, MeshOptions, OptimizerOptions
from qstar_jax.data.batches import Batch, make_batch
from qstar_jax.data.packing import Layout, Shapes
from qstar_jax.data.tokenization import Example, Response
from qstar_jax.losses import make_loss
from qstar_jax.models import CausalLM
from qstar_jax.sharding import make_mesh, platform, use_mesh
from qstar_jax.store.open import load_model
from qstar_jax.tasks.tiny_tldr import BASE
from qstar_jax.training.objectives import preference_loss_fn
from qstar_jax.training.optimizers import make_optimizer
from qstar_jax.training.step import TrainState, make_train_step
from qstar_jax.training.throughput import measured_matmul_peak, peak_memory_bytes


def full_batch(model: CausalLM, pairs: int, length: int, layout: Layout, environment: float = 0.0) -> Batch:
    """Makes pairs of random tokens; the first quarter of prompt and answer is the prompt.

    The environment and the policy take turns in the answers, four times.
    """
    rng, prompt = np.random.default_rng(0), length // 4

    def ids(count: int) -> np.ndarray:
        return rng.integers(0, model.config.vocab_size, count, dtype=np.int32)

    place = np.arange(length - prompt) / (length - prompt) * 4
    turns = np.where(place % 1 < environment, -1, place).astype(np.int32)
    examples = [
        Example(ids(prompt), False, tuple(Response(ids(len(turns)), False, turns >= 0, turns) for _ in range(2)), row)
        for row in range(pairs)
    ]
    shapes = Shapes.of(examples, layout, batch_size=pairs, texts=platform() == "gpu")  # cuDNN's attention needs them
    return jax.tree.map(jnp.asarray, make_batch(examples, shapes))


def main(
    model: str = str(BASE),
    pairs: int = 4,
    length: int = 256,
    rounds: int = 3,
    dtype: Dtype = "float32",
    layout: Layout = "packed",
    matmul_size: int | None = None,
    environment: float = 0.0,
):
    """Measures matrix products and DPO steps in turn.

    Args:
        model: Hugging Face folder, hub name or run folder; the demo's base model by default.
        pairs: Pairs per step.
        length: Tokens of a row.
        rounds: Rounds, of which the medians count.
        dtype: Type of activations and of the measured matrix products.
        layout: How prompts and answers share rows.
        matmul_size: Edge of the measured matrices; by default 2048 on a CPU and 8192 elsewhere.
        environment: Share of the answers' tokens that an environment writes.
    """
    mesh = make_mesh()
    with use_mesh(mesh, dtype):
        loaded = load_model(model, ComputeOptions(dtype=dtype), mesh, MeshOptions())
        optimizer = make_optimizer(OptimizerOptions(), steps=100)
        step = jax.jit(make_train_step(preference_loss_fn(loaded.model, make_loss()), optimizer), donate_argnums=0)
        reference = jax.tree.map(jnp.copy, loaded.params)
        state = TrainState(jnp.int32(0), loaded.params, jax.jit(optimizer.init)(loaded.params), reference)
        batch = full_batch(loaded.model, pairs, length, layout, environment)
        batches = [batch] if environment == 0 else [batch, full_batch(loaded.model, pairs, length, layout)]
        for each in batches:
            state, _ = jax.block_until_ready(step(state, each))  # compiles
        peaks, all_seconds = [], [[] for _ in batches]
        for _ in range(rounds):
            peaks.append(measured_matmul_peak(dtype, matmul_size))
            for each, seconds in zip(batches, all_seconds, strict=True):
                start = time.perf_counter()
                state, _ = jax.block_until_ready(step(state, each))
                seconds.append(time.perf_counter() - start)
    seconds, *others = all_seconds
    tokens, scored = int((batch.blocks >= 0).sum()), int(batch.num_actions.sum())
    forward = loaded.model.config.forward_flops(tokens=tokens, scored_tokens=scored, context=length / 2)
    flops = 4 * forward / statistics.median(seconds)  # policy forward and backward, reference forward
    result = {
        "model": Path(model).name,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(reference)),
        "compute": asdict(loaded.model.compute),
        "device": jax.devices()[0].device_kind,
        "physical_cores": psutil.cpu_count(logical=False),
        "pairs": pairs,
        "length": length,
        "layout": layout,
        "rows": list(batch.tokens.shape),
        "actions": scored,
        "scored_slots": batch.slots.size,
        "seconds_per_step": statistics.median(seconds),
        "seconds_per_step_that_scores_all": statistics.median(others[0]) if others else None,
        "pairs_per_second": pairs / statistics.median(seconds),
        "tokens_per_second": tokens / statistics.median(seconds),
        "model_gflops_per_second": flops / 1e9,
        "matmul_gflops_per_second": statistics.median(peaks) / 1e9,
        "share_of_matmul_peak": flops / statistics.median(peaks),
        "peak_memory_gib": peak_memory_bytes() / 2**30,
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    auto_cli(main)
