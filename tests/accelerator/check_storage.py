"""Memory of the log-prob kernel on the accelerator, and a checkpoint that it writes and a CPU reads."""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from check_families import random_params, tiny_model
from sides import accelerator, cpu, place

from qstar_jax.config import MeshOptions
from qstar_jax.models.head import Head
from qstar_jax.models.logprobs import token_logprobs
from qstar_jax.sharding import use_mesh
from qstar_jax.store.checkpoint_store import CheckpointStore
from qstar_jax.store.checkpoints import STEPS, Description, read_checkpoint_params
from qstar_jax.store.identity import params_identity
from qstar_jax.store.open import param_shardings


def check_logprob_memory(vocabulary: int, lengths: tuple[int, int], batch: int = 2, width: int = 64) -> dict[str, Any]:
    """Checks that the memory of log-probabilities and their gradient does not grow with T * V.

    That of an implementation that makes all logits does, and must be seen to. It must be the first check of a process,
    as the measured peaks are those since its start.

    Args:
        vocabulary: V.
        lengths: A short and a long T.
        batch: B.
        width: D.

    Returns:
        A record of how much memory is added from short to long, as compiled and, where the backend says so, measured.
    """

    def all_logits(hidden, head, targets):
        logp = jax.nn.log_softmax(head.logits(hidden.reshape(-1, width)))
        return jnp.take_along_axis(logp, targets.reshape(-1, 1), axis=1), None

    with use_mesh(accelerator(), "float32"):
        # Even the short texts take several chunks: of a single one, the compiler keeps the logits.
        kernel = partial(token_logprobs, chunk_size=batch * lengths[0] // 2)
        short, long = (gradient_memory(kernel, batch, length, width, vocabulary) for length in lengths)
        whole = gradient_memory(all_logits, batch, lengths[1], width, vocabulary)
    logits = batch * (lengths[1] - lengths[0]) * vocabulary * 4
    record: dict[str, Any] = {"name": "memory of the log-prob kernel", "logits_gib": logits / 2**30}
    ok = True
    for key in short:
        record |= {f"{key}_growth_gib": (long[key] - short[key]) / 2**30, f"all_logits_{key}_gib": whole[key] / 2**30}
        # What grows with T alone, such as the gradient of the hidden states, is a few hundredths of the logits.
        ok &= long[key] - short[key] < logits / 10 and whole[key] - short[key] > logits / 2
    return record | {"ok": ok} | ({} if ok else {"error": "memory grows with the logits, or was not measured"})


def gradient_memory(logprobs: Callable, batch: int, length: int, width: int, vocabulary: int) -> dict[str, int]:
    """Bytes that the gradient of log-probabilities takes: compiled, and the measured peak since the process began."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(batch, length, width)).astype(np.float32)
    head = Head(rng.normal(size=(vocabulary, width)).astype(np.float32))
    targets = rng.integers(0, vocabulary, (batch, length), dtype=np.int32)
    arguments = place((hidden, head, targets), accelerator())
    program = jax.jit(jax.grad(lambda *x: logprobs(*x)[0].sum(), (0, 1))).lower(*arguments).compile()
    found = {"compiled": program.memory_analysis().temp_size_in_bytes}
    jax.block_until_ready(program(*arguments))
    if stats := jax.devices()[0].memory_stats():
        found["measured"] = stats["peak_bytes_in_use"]
    return found


def check_checkpoint(name: str) -> dict[str, Any]:
    """Writes the parameters of a tiny model on the accelerator, and reads them on the CPU: bit for bit the same."""
    model, options = tiny_model(name, "float32", "auto"), MeshOptions(data=1)
    params = random_params(model)
    on_device = jax.device_put(params, param_shardings(model, accelerator(), options))
    with tempfile.TemporaryDirectory() as folder:
        with CheckpointStore(Path(folder), keep=1) as store:
            store.save(1, {"params": on_device}, Description("dpo", model.to_hf(), {}, {}))
        read = read_checkpoint_params(Path(folder) / STEPS / "1", model, param_shardings(model, cpu(), options))
    platforms = {device.platform for leaf in jax.tree.leaves(read) for device in leaf.devices()}
    bits = jax.tree.map(lambda a, b: np.asarray(a).tobytes() == b.tobytes(), jax.device_get(read), params)
    checks = {
        "the parameters are not on the CPU": platforms == {"cpu"},
        "the parameters differ": all(jax.tree.leaves(bits)),
        # Runs are resumed, and reference log-probabilities reused, only if this is equal.
        "their identity differs": params_identity(read) == params_identity(on_device),
    }
    errors = [message for message, ok in checks.items() if not ok]
    return {"name": "checkpoint", "ok": not errors} | ({"error": "; ".join(errors)} if errors else {})
