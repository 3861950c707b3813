"""`qstar decline`."""

from pathlib import Path

from rich.console import Console

from qstar_jax.config import DeclineConfig
from qstar_jax.console import say
from qstar_jax.evaluation.insights.decline import measure_decline
from qstar_jax.report.figures import write_figures
from qstar_jax.report.insights_terminal import print_decline


def run(config: DeclineConfig):
    """Reads the metrics of runs, and writes decline.json and decline.png."""
    console = Console()
    decline = measure_decline(config)
    write_figures(Path(config.out), decline=decline)
    print_decline(decline, console)
    say(console, f"decline.json, decline.png: {config.out}")
