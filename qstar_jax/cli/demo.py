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
    "diffusion": "runs/diffusion",
}


def run(config: DemoConfig):
    """Runs the tour of the paper's insights, or that of another one."""
    config = replace(config, out=config.out or _FOLDERS[config.insight])
    if config.from_scratch and config.insight != "paper":
        begins = "begins from a model in the package" if config.insight == "reasoning" else "always begins from scratch"
        raise InputError(f"--from_scratch has no effect with --insight {config.insight}, which {begins}; leave it out")
    taken = [
        path
        for name in ("sft", "sweep", "credit", "random", "prm", "diffusion")
        if (path := Path(config.out) / name).exists()
    ]
    if taken:
        raise InputError(f"{taken[0]} is there already; remove {config.out}, or choose another --out")
    _compile_quickly()
    from qstar_jax.demo import dialogue, diffusion, reasoning, tour

    tours = {"paper": tour.run, "dialogue": dialogue.run, "reasoning": reasoning.run, "diffusion": diffusion.run}
    tours[config.insight](config, Console())


def _compile_quickly():
    """Leaves out what LLVM would still gain, which for a model this small is less than it costs; before jax begins."""
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_backend_optimization_level" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_backend_optimization_level=1".strip()
