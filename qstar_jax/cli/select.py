"""`qstar select`."""

from pathlib import Path

from rich.console import Console

from qstar_jax.config import SelectConfig
from qstar_jax.evaluation.selecting import measure_selection
from qstar_jax.report.insights import show


def run(config: SelectConfig):
    """Measures best of N and votes, and writes selection.json and selection.png."""
    console = Console()
    show(measure_selection(config, console), Path(config.out), console)
