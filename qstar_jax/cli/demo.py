"""`qstar demo`."""

import os
from pathlib import Path

from rich.console import Console

from qstar_jax.config import DemoConfig
from qstar_jax.errors import InputError


def run(config: DemoConfig):
    """Runs the tour of the paper's insights."""
    taken = [path for name in ("sft", "sweep", "credit") if (path := Path(config.out) / name).exists()]
    if taken:
        raise InputError(f"{taken[0]} is there already; remove {config.out}, or choose another --out")
    _compile_quickly()
    from qstar_jax.demo import tour

    tour.run(config, Console())


def _compile_quickly():
    """Leaves out what LLVM would still gain, which for a model this small is less than it costs; before jax begins."""
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_backend_optimization_level" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_backend_optimization_level=1".strip()
