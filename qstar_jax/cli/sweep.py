"""`qstar sweep`."""

from pathlib import Path

from rich.console import Console

from qstar_jax.config import SweepConfig
from qstar_jax.console import say
from qstar_jax.evaluation.insights.sweep import measure_sweep
from qstar_jax.report.figures import write_figures
from qstar_jax.report.insights_terminal import print_sweep


def run(config: SweepConfig):
    """Decodes with every width, judges the responses, and writes sweep.json and sweep.png."""
    console = Console()
    sweep = measure_sweep(config, console)
    write_figures(Path(config.out), sweep=sweep)
    print_sweep(sweep, console)
    say(console, f"sweep.json, sweep.png, comparisons.jsonl: {config.out}")
