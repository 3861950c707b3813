"""`qstar demo`."""

from pathlib import Path

from rich.console import Console

from qstar_jax.config import DemoConfig
from qstar_jax.errors import InputError


def run(config: DemoConfig):
    """Runs the tour of the paper's insights."""
    taken = [path for name in ("sft", "sweep", "credit") if (path := Path(config.out) / name).exists()]
    if taken:
        raise InputError(f"{taken[0]} is there already; remove {config.out}, or choose another --out")
    from qstar_jax.demo import tour

    tour.run(config, Console())
