"""`qstar control`."""

from pathlib import Path

from rich.console import Console

from qstar_jax.config import ControlConfig


def run(config: ControlConfig):
    """Trains the arms, and writes control.json and control.png."""
    from qstar_jax.control.run import train_control
    from qstar_jax.evaluation.insights.control import measure_control
    from qstar_jax.report.insights import show

    console, out = Console(), Path(config.out).expanduser()
    train_control(config, console)
    show(measure_control(out), out, console)
