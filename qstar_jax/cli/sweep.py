"""`qstar sweep`."""

from pathlib import Path

from rich.console import Console

from qstar_jax.config import SweepConfig
from qstar_jax.evaluation.insights.sweep import measure_sweep
from qstar_jax.report.insights import show


def run(config: SweepConfig):
    """Decodes with every width, judges the responses, and writes sweep.json and sweep.png."""
    console = Console()
    show(measure_sweep(config, console), Path(config.out), console)
