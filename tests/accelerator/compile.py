"""Compiles a step of DPO for hardware that is not there, and says what it needs: memory, products, kernels.

    python tests/accelerator/compile.py --model llama-3.2-1b --shape tldr --topology h100:1x1x1 --batch 32

Needs the extra `plan-gpu` for GPUs, and `plan` for TPUs. Prints one line of JSON per program.
"""

import json
import os
import re
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before JAX looks for the hardware

from contests import LORA, ONE_B, SHAPES, SMALL, llama
from jsonargparse import auto_cli

from qstar_jax.config import (
    ComputeOptions,
    DataOptions,
    DpoConfig,
    LoraOptions,
    MeshOptions,
    ReferenceOptions,
    TrainOptions,
)
from qstar_jax.errors import InputError
from qstar_jax.models import CausalLM
from qstar_jax.plan.step import CompiledProgram, lower_step, pairs_of_lengths
from qstar_jax.plan.topology import Chip, chip_of, topology_devices
from qstar_jax.sharding import make_mesh
from qstar_jax.training.plan import make_plan
from qstar_jax.training.throughput import peak_flops

GIB = 2**30
MODELS = {contest.name.removesuffix(" lora"): contest.config for contest in (ONE_B, SMALL, LORA)} | {
    "smollm2-135m": llama(576, 1536, 30, 9, 3, 49152, tie_word_embeddings=True)
}


def main(
    model: str = ONE_B.name,
    shape: str = "tldr",
    topology: str = "h100:1x1x1",
    batch: int = 32,
    accumulate: int = 1,
    compute: ComputeOptions = ComputeOptions(dtype="bfloat16"),
    reference: ReferenceOptions = ReferenceOptions(),
    lora: LoraOptions = LoraOptions(),
    mesh: MeshOptions = MeshOptions(),
    layout: str = "packed",
    row_length: int = 0,
    hlo: str = "",
):
    """Compiles a step and prints what it needs.

    Args:
        model: Name of a model's shape, or a config.json.
        shape: Lengths in tokens: tldr (a prompt of 384, responses of 48), chat (64, 448), or PROMPT+RESPONSE.
        topology: The hardware: h100:1x1x1 (slices x hosts x devices), v5e:4x4, ...
        batch: Pairs per step.
        accumulate: Micro-batches per step.
        compute: Dtypes, attention and rematerialization.
        reference: How the reference enters.
        lora: An adapter.
        mesh: How the devices are arranged.
        layout: How prompts and responses share sequences.
        row_length: Slots of a packed sequence; 0: those of the longest pair.
        hlo: File for the compiled program as text; empty: none.
    """
    config = DpoConfig(
        model=model,
        out="",
        data=DataOptions(train=shape, layout=layout, row_length=row_length),
        train=TrainOptions(batch_size=batch, accumulate=accumulate),
        reference=reference,
        lora=lora,
        compute=compute,
        mesh=mesh,
    )
    if model not in MODELS and not Path(model).is_file():
        raise InputError(f"--model {model}: expected a config.json, or one of {', '.join(MODELS)}")
    if shape not in SHAPES and not re.fullmatch(r"\d+\+\d+", shape):
        raise InputError(f"--shape {shape}: expected {', '.join(SHAPES)} or lengths in tokens such as 384+48")
    hf = MODELS.get(model) or json.loads(Path(model).read_text(encoding="utf-8"))
    prompt, response = SHAPES.get(shape) or map(int, shape.split("+"))
    devices = make_mesh(mesh, topology_devices(topology))
    began = time.perf_counter()
    step = lower_step(
        make_plan(config), CausalLM.from_hf(hf, compute), pairs_of_lengths(prompt, response, batch), devices
    )
    lowered = time.perf_counter()
    program = CompiledProgram(step.lowered.compile(), devices.size)
    compiled = time.perf_counter()
    if hlo:
        Path(hlo).write_text(program.compiled.as_text(), encoding="utf-8")
    settings = {"model": model, "shape": shape, "topology": topology, "pairs": batch, "micro_batches": accumulate}
    settings |= {"attention": compute.attention, "remat": compute.remat, "reference": reference.mode}
    settings |= {
        "scan_layers": compute.scan_layers,
        "lora_rank": lora.rank,
        "layout": layout,
        "sequences": list(step.batch.tokens.shape),
    }
    settings |= {"lower_seconds": round(lowered - began, 1), "compile_seconds": round(compiled - lowered, 1)}
    peak = peak_flops(list(devices.devices.flat)) / devices.size
    print(json.dumps(settings | record(program, step.flops / devices.size, chip_of(topology), peak)))


def record(program: CompiledProgram, model_flops: float, chip: Chip, peak: float) -> dict:
    """What a program needs on one device, and the times of its products and its traffic at the chip's rates."""
    flops = program.flops
    times = {"products_seconds": sum(flops.values()) / peak, "memory_seconds": program.traffic / chip.memory_bandwidth}
    return {
        **{f"{name}_gib": round(size / GIB, 2) for name, size in program.memory.items()},
        "of_gib": round(chip.memory_bytes / GIB, 2),
        "model_flops": model_flops,
        "product_flops": sum(flops.values()),
        "products_over_model": round(sum(flops.values()) / model_flops, 3),
        "product_flops_by_dtype": flops,
        **(times if chip.is_gpu else {}),
        "wire_bytes": program.wire_bytes,
        "kernels": program.kernels,
        "opaque_kernels": program.opaque,
    }


if __name__ == "__main__":
    try:
        auto_cli(main, as_positional=False)
    except InputError as error:
        sys.exit(str(error))
