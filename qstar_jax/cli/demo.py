"""`qstar demo`."""

import os
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from qstar_jax.config import DemoConfig
from qstar_jax.errors import InputError

_FOLDERS = {
    "paper": "runs/demo",
    "dialogue": "runs/dialogue",
    "reasoning": "runs/reasoning",
    "control": "runs/control",
    "diffusion": "runs/diffusion",
    "pipeline": "runs/drawing",
}
_MADE = ("sft", "sweep", "credit", "random", "prm", "control", "diffusion", "pipeline")  # folders that tours make
_BEGINS = {
    "dialogue": "always begins from scratch",
    "reasoning": "begins from a model in the package",
    "control": "has no language model",
    "diffusion": "always begins from scratch",
    "pipeline": "always begins from scratch",
}


def run(config: DemoConfig):
    """Runs the tour of an insight, or of the paper's three."""
    config = replace(config, out=config.out or _FOLDERS[config.insight])
    if config.from_scratch and config.insight != "paper":
        begins = _BEGINS[config.insight]
        raise InputError(f"--from_scratch has no effect with --insight {config.insight}, which {begins}; leave it out")
    taken = [path for name in _MADE if (path := Path(config.out) / name).exists()]
    if taken:
        raise InputError(f"{taken[0]} is there already; remove {config.out}, or choose another --out")
    _compile_quickly()
    from qstar_jax.demo import control, dialogue, diffusion, pipeline, reasoning, tour

    tours = {
        "paper": tour.run,
        "dialogue": dialogue.run,
        "reasoning": reasoning.run,
        "control": control.run,
        "diffusion": diffusion.run,
        "pipeline": pipeline.run,
    }
    tours[config.insight](config, Console())


def _compile_quickly():
    """Leaves out what LLVM would still gain, which for a model this small is less than it costs; before jax begins."""
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_backend_optimization_level" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_backend_optimization_level=1".strip()
