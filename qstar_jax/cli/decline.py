"""`qstar decline`."""

from pathlib import Path

from rich.console import Console

from qstar_jax.config import DeclineConfig
from qstar_jax.evaluation.insights.decline import measure_decline
from qstar_jax.report.insights import show


def run(config: DeclineConfig):
    """Reads the metrics of runs, and writes decline.json and decline.png."""
    console = Console()
    show(measure_decline(config), Path(config.out), console)
