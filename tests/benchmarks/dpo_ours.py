"""This library as a worker of dpo_vs_trl.py: the same requests on stdin as dpo_peers.py, the same lines of JSON out.

python tests/benchmarks/dpo_ours.py --model FOLDER --pairs FILE.npz [--batch 4] [--reference live]
"""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jsonargparse import auto_cli

from qstar_jax.config import ComputeOptions, DataOptions, Dtype, MeshOptions, OptimizerOptions
from qstar_jax.data.batches import step_indices
from qstar_jax.data.feeder import Feeder
from qstar_jax.data.loading import Dataset
from qstar_jax.data.packing import Layout
from qstar_jax.data.tokenization import Example, Response
from qstar_jax.losses import make_loss
from qstar_jax.scoring import score_policy
from qstar_jax.sharding import make_mesh
from qstar_jax.store.open import load_model
from qstar_jax.training.objectives import preference_loss_fn
from qstar_jax.training.optimizers import make_optimizer
from qstar_jax.training.step import TrainState, make_train_step
from qstar_jax.training.throughput import measured_matmul_peak


def read_pairs(path: str) -> list[Example]:
    """Reads the pairs' tokens that dpo_vs_trl.py has written."""
    with np.load(path, allow_pickle=False) as file:
        prompts = np.split(file["prompts"], np.cumsum(file["prompt_lengths"])[:-1])
        lengths = file["answer_lengths"]
        answers = np.split(file["answers"], np.cumsum(lengths.ravel())[:-1])
    return [
        Example(prompt, False, (Response(answers[2 * i], False), Response(answers[2 * i + 1], False)), i)
        for i, prompt in enumerate(prompts)
    ]


def main(
    model: str,
    pairs: str,
    batch: int = 4,
    reference: Literal["live", "cached"] = "live",
    dtype: Dtype = "float32",
    learning_rate: float = 1e-6,
    layout: Layout = "packed",
    row_length: int = 0,
    accumulate: int = 1,
):
    """Waits for requests and trains.

    Args:
        model: Hugging Face folder.
        pairs: The pairs' tokens.
        batch: Pairs per step.
        reference: Run at each step, or computed before.
        dtype: Type of activations.
        learning_rate: Of AdamW, constant.
        layout: How prompts and answers share rows.
        row_length: Slots of a packed row; 0 takes those of the longest pair.
        accumulate: Micro-batches per step.
    """
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    examples = read_pairs(pairs)
    steps = len(examples) // batch
    # Training shuffles: here so that it brings back the order of the file, which is that of the other libraries.
    order = np.concatenate([step_indices(0, step, steps * batch, batch) for step in range(steps)])
    examples = [example for _, example in sorted(zip(order, examples, strict=False), key=lambda pair: pair[0])]
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        loaded = load_model(model, ComputeOptions(dtype=dtype), mesh, MeshOptions())
        options = DataOptions(layout=layout, row_length=row_length)
        dataset = Dataset(examples, (), pairs)
        feeder = Feeder(dataset, batch, mesh, options, "batch", accumulate=accumulate)
        if reference == "cached":
            logprobs = jax.jit(lambda params, batch: score_policy(loaded.model, params, batch).logp)
            in_order = Feeder(dataset, batch, mesh, options, "batch").in_order()
            values = np.concatenate([logprobs(loaded.params, b) for b in in_order])
            known = [[values[i, r, : len(a.ids)] for r, a in enumerate(e.responses)] for i, e in enumerate(examples)]
            feeder = feeder.with_reference(known)
        batches = [feeder.at_step(0, step) for step in range(steps)]
        optimizer = make_optimizer(OptimizerOptions(learning_rate=learning_rate, schedule="constant"), 1)
        step = make_train_step(preference_loss_fn(loaded.model, make_loss()), optimizer, accumulate=accumulate)
        step = jax.jit(step, donate_argnums=0)
        copy = jax.tree.map(jnp.copy, loaded.params) if reference == "live" else None
        state = TrainState(jnp.int32(0), loaded.params, jax.jit(optimizer.init)(loaded.params), copy)
        shapes = {tuple(x.shape for x in jax.tree.leaves(b)): b for b in batches}
        compiled = {shape: step.lower(state, b).compile() for shape, b in shapes.items()}

        def run(b):
            nonlocal state
            state, metrics = compiled[tuple(x.shape for x in jax.tree.leaves(b))](state, b)
            total, count = jax.device_get(metrics["loss"])
            return float(total / count)

        losses = [run(batches[0])]
        print(
            json.dumps({"ready": True, "jax": jax.__version__, "losses": losses, "programs": len(compiled)}), flush=True
        )
        done = 1
        for line in sys.stdin:
            words = line.split()
            if words[:1] == ["stop"]:
                break
            chosen = [batches[(done + i) % len(batches)] for i in range(int(words[1]))]
            done += len(chosen)
            start = time.perf_counter()
            losses = [run(b) for b in chosen]
            seconds = time.perf_counter() - start
            tokens = sum(int((b.blocks >= 0).sum()) for b in chosen)
            scored = sum(int(b.response_lengths.sum()) for b in chosen)
            config = loaded.model.config
            context = tokens / batch / len(chosen) / 2
            forward = config.forward_flops(tokens=tokens, scored_tokens=scored, context=context)
            flops = forward * (4 if reference == "live" else 3)
            peak = measured_matmul_peak(dtype, 2048)
            share = flops / seconds / peak
            slots = sum(b.tokens.size for b in chosen)
            print(
                json.dumps(
                    {
                        "seconds": seconds,
                        "pairs": batch * len(chosen),
                        "losses": losses,
                        "tokens": tokens,
                        "padding": 1 - tokens / slots,
                        "share_of_matmul_peak": share,
                        "matmul_gflops": peak / 1e9,
                    }
                ),
                flush=True,
            )
        peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
        print(json.dumps({"peak_memory_bytes": peak, "baseline_bytes": rss}), flush=True)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
