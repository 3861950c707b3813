"""Compiles searches for responses for hardware that is not there, and says what they need.

    python tests/accelerator/compile_decoding.py --model llama-3.2-1b --searches '[greedy 1, beams 5]'

Needs what compile.py needs. Prints one line of JSON per search.
"""

import json
import math
import os
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before JAX looks for the hardware

import jax
from compile import GIB, MODELS
from jsonargparse import auto_cli

from qstar_jax.config import ComputeOptions, DecodeOptions, MeshOptions
from qstar_jax.decoding.options import interpret
from qstar_jax.errors import InputError
from qstar_jax.models import CausalLM
from qstar_jax.plan.decode import lower_search
from qstar_jax.plan.step import CompiledProgram
from qstar_jax.plan.topology import chip_of, topology_devices
from qstar_jax.sharding import make_mesh


def options_of(search: str, new_tokens: int) -> DecodeOptions:
    """The options of a search such as `beams 5`, `samples 8` or `greedy 1`."""
    kind, _, count = search.partition(" ")
    if kind == "beams":
        return DecodeOptions("beam", new_tokens, beams=int(count))
    if kind == "samples":
        return DecodeOptions("sample", new_tokens, return_sequences=int(count))
    if search != "greedy 1":
        raise InputError(f"--searches {search}: expected beams N, samples N or greedy 1")
    return DecodeOptions("greedy", new_tokens)


def main(
    model: str = "llama-3.2-1b",
    topology: str = "h100:1x1x1",
    searches: list[str] = ["greedy 1", "beams 5", "beams 10", "samples 8"],  # noqa: B006
    prompts: int = 8,
    prompt_tokens: int = 448,
    new_tokens: int = 128,
    compute: ComputeOptions = ComputeOptions(param_dtype="bfloat16", dtype="bfloat16"),
    mesh: MeshOptions = MeshOptions(),
):
    """Compiles searches and prints what they need.

    Args:
        model: Name of a model's shape.
        topology: The hardware: h100:1x1x1 (slices x hosts x devices), v5e:4x4, ...
        searches: What to compile: beams N, samples N, greedy 1.
        prompts: Number of prompts.
        prompt_tokens: Tokens of each.
        new_tokens: Tokens of each response.
        compute: Dtypes and attention.
        mesh: How the devices are arranged.
    """
    devices, chip = make_mesh(mesh, topology_devices(topology)), chip_of(topology)
    policy = CausalLM.from_hf(MODELS[model], compute)
    weights = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(policy.abstract_params()))
    for search in searches:
        plan, began = interpret(options_of(search, new_tokens)), time.perf_counter()
        lowered = lower_search([policy], plan, prompts, prompt_tokens, devices, mesh)
        program = CompiledProgram(lowered.lowered.compile(), devices.size, lowered.unknown_trips)
        record = {"model": model, "topology": topology, "search": search, "prompts": prompts}
        record |= {"compile_seconds": round(time.perf_counter() - began, 1)}
        record |= {f"{name}_gib": round(size / GIB, 2) for name, size in program.memory.items()}
        record |= {"of_gib": round(chip.memory_bytes / GIB, 2), "product_flops": sum(program.flops.values())}
        if chip.is_gpu:
            record["memory_seconds"] = program.traffic / chip.memory_bandwidth
            record["weights_seconds"] = new_tokens * weights / devices.size / chip.memory_bandwidth
            record["kernels_per_token"] = sum(program.kernels.values()) / new_tokens
        print(json.dumps(record | {"opaque_kernels": program.opaque}), flush=True)


if __name__ == "__main__":
    try:
        auto_cli(main, as_positional=False)
    except InputError as error:
        sys.exit(str(error))
