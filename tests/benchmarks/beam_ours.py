"""This library as a worker of beam_vs_hf.py (see decode_turns.py).

Beside speed it says how far decoding is from what the processor allows: no step can be faster than reading the weights
and the cache that it needs once, nor than its arithmetic.
"""

import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
from decode_turns import random_prompts, reset_process_peak, serve
from dpo_ours import open_model
from jsonargparse import auto_cli
from worker import process_peak_bytes

from qstar_jax.config import ComputeOptions, Dtype, MeshOptions
from qstar_jax.decoding import BeamOptions, SampleOptions, beam_search, sample
from qstar_jax.sharding import make_mesh


def seconds_of(run: Callable[[], object], rounds: int = 5) -> float:
    """Shortest time of several runs; the first one, which may compile, is left out."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return min(times[1:])


def read_bandwidth() -> float:
    """Bytes per second that the device reads from its memory: a CPU with all cores, on arrays larger than any cache."""
    if jax.default_backend() != "cpu":
        array, read = jax.random.normal(jax.random.key(0), (2**29,)), jax.jit(jnp.max)
        return array.nbytes / seconds_of(lambda: read(array))
    cores = len(os.sched_getaffinity(0))
    arrays = [np.ones(2**26, np.float32) for _ in range(cores)]
    with ThreadPoolExecutor(cores) as pool:
        return sum(a.nbytes for a in arrays) / seconds_of(lambda: list(pool.map(np.max, arrays)))


def matmul_rate(rows: int, inner: int, outer: int, dtype: str) -> float:
    """FLOP/s of a product [rows, inner] @ [inner, outer] whose operands are in cache: XLA's or numpy's, the better."""
    x, w = jnp.ones((rows, inner), dtype), jnp.ones((inner, outer), dtype)
    repeats = max(1, int(2e8 / (2 * rows * inner * outer)))

    @jax.jit
    def several(x, w):
        # Each product needs the one before, or the compiler would make one of them.
        return jax.lax.fori_loop(0, repeats, lambda _, y: x + 0 * (y @ w).max(-1, keepdims=True), x)

    best = seconds_of(lambda: several(x, w))
    if dtype == "float32":
        a, b, out = np.asarray(x), np.asarray(w), np.empty((rows, outer), np.float32)
        best = min(best, seconds_of(lambda: [np.matmul(a, b, out=out) for _ in range(repeats)]))
    return 2 * rows * inner * outer * repeats / best


def nbytes(tree) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def memory() -> dict[str, Callable]:
    """How the peak of the device's memory is read, and begins anew: on accelerators it cannot."""
    if jax.default_backend() == "cpu":
        return {"peak": process_peak_bytes, "reset_peak": reset_process_peak}
    return {"peak": lambda: jax.devices()[0].memory_stats()["peak_bytes_in_use"], "reset_peak": lambda: None}


def main(
    model: str,
    prompt_tokens: int,
    new_tokens: int,
    batch: int,
    settings: list[str],
    dtype: Dtype = "float32",
    quick: bool = False,
):
    """Waits for requests and decodes.

    Args:
        model: Hugging Face folder; without weights they are drawn.
        prompt_tokens: Length of each prompt.
        new_tokens: Length of each answer.
        batch: Prompts.
        settings: Requests that there will be.
        dtype: Type of weights and activations.
        quick: Whether to leave out, in the end, what takes further programs.
    """
    compilations = 0

    def count_compilation(event: str, *_, **__):
        nonlocal compilations
        compilations += event.endswith("backend_compile_duration")

    jax.monitoring.register_event_duration_secs_listener(count_compilation)
    mesh = make_mesh(MeshOptions(data=1), jax.devices()[:1])
    lm, load = open_model(model, ComputeOptions(dtype=dtype, param_dtype=dtype), mesh)
    config, stacked = lm.config, load()
    params = jax.jit(lm.unstack)(stacked)
    jax.tree.map(lambda x: x.delete(), stacked["layers"])
    prompts = jnp.asarray(random_prompts(batch, prompt_tokens, config.vocab_size))
    lengths = jnp.full(batch, prompt_tokens, jnp.int32)
    prefill = jax.jit(lm.prefill, static_argnums=3)

    def program(kind: str, count: int):
        """The jitted search, its arguments, and the size of its pool."""
        if kind == "beams":
            arguments = (lm, params, prompts, lengths, BeamOptions(count, new_tokens, ()))
            return beam_search, arguments, count * new_tokens
        keys = jax.random.split(jax.random.key(0), batch)
        arguments = (lm, params, prompts, lengths, keys, SampleOptions(new_tokens, (), num_samples=count))
        return sample, arguments, count * (new_tokens - 1)

    def compile_search(setting: str) -> jax.stages.Compiled:
        kind, count = setting.split()
        search, arguments, _ = program(kind, int(count))
        return search.lower(*arguments).compile()

    with ThreadPoolExecutor() as pool:  # compilation is most of a short benchmark's time
        compiled = dict(zip(settings, pool.map(compile_search, settings), strict=True))

    def run(kind: str, count: int) -> np.ndarray:
        _, (_, *arguments, _), _ = program(kind, count)  # model and options are part of the program
        tokens = np.asarray(compiled[f"{kind} {count}"](*arguments).tokens)
        return tokens[:, 0] if kind == "beams" else tokens.reshape(-1, new_tokens)

    def floor(count: int, pool: int, bandwidth: float) -> dict:
        """What one step has to do at least, and how long that takes on average over the answer."""
        cache = jax.eval_shape(partial(lm.prefill, slots=pool), params, prompts, lengths)[1]
        per_slot = nbytes(jax.eval_shape(partial(lm.prefill, slots=pool + 1), params, prompts, lengths)[1])
        per_slot -= nbytes(cache)
        prompt_bytes = nbytes(cache) - per_slot * pool
        # An embedding is read for a few tokens, an unembedding as a whole; a tied one is both.
        weights = nbytes(params) - (0 if config.tie_word_embeddings else nbytes(params["embed"]))
        bytes_read = weights + prompt_bytes + per_slot * pool / 2  # the pool fills up as the answers grow
        tokens, context = batch * count, prompt_tokens + new_tokens / 2
        flops = config.forward_flops(tokens=tokens, scored_tokens=tokens, context=context)
        rate = matmul_rate(tokens, config.hidden_size, config.intermediate_size, dtype)
        times = {"bytes": bytes_read / bandwidth, "flops": flops / rate}
        return {
            "cache_bytes": nbytes(cache),
            "bytes_per_step": bytes_read,
            "flops_per_step": flops,
            "matmul_gflops_at_this_shape": rate / 1e9,
            "floor_step_seconds": max(times.values()),
            "bound_by": max(times, key=times.get),
        }

    def temporary(kind: str, count: int, pool: int) -> dict:
        """Bytes beside arguments and results: of the whole search, cache included, and of one step of the model."""
        whole = compiled[f"{kind} {count}"].memory_analysis().temp_size_in_bytes
        _, cache = jax.eval_shape(partial(lm.prefill, slots=pool), params, prompts, lengths)
        shapes = (jax.ShapeDtypeStruct((batch, count), jnp.int32), jax.ShapeDtypeStruct((batch, count, pool), bool))
        step = jax.jit(lm.extend, donate_argnums=1).lower(params, cache, *shapes, jax.ShapeDtypeStruct((), jnp.int32))
        return {
            "temporary_bytes": whole,
            "temporary : cache": whole / nbytes(cache),
            "model_step_temporary : cache": step.compile().memory_analysis().temp_size_in_bytes / nbytes(cache),
        }

    def limits() -> dict:
        bandwidth = read_bandwidth()
        found = {}
        for setting in settings:
            kind, count = setting.split()
            pool = program(kind, int(count))[2]
            found[setting] = floor(int(count), pool, bandwidth)
            if quick:
                continue
            found[setting] |= temporary(kind, int(count), pool)
            found[setting]["prefill_seconds"] = seconds_of(lambda pool=pool: prefill(params, prompts, lengths, pool))
        return {"read_gigabytes_per_second": bandwidth / 1e9, "limits": found}

    versions = {name: version(name) for name in ("jax", "flax")}
    serve(run, settings, count=lambda: {"compilations": compilations}, close=limits, versions=versions, **memory())


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
