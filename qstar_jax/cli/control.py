"""`qstar control`."""

from pathlib import Path

from rich.console import Console

from qstar_jax.config import ControlConfig, DeclineConfig


def run(config: ControlConfig):
    """Trains the arms, and writes decline.json and decline.png of the first seed's arms with and without cloning."""
    from qstar_jax.control.run import train_control
    from qstar_jax.evaluation.insights.decline import measure_decline
    from qstar_jax.report.control import print_runs
    from qstar_jax.report.insights import show

    console, out = Console(), Path(config.out).expanduser()
    summaries = train_control(config, console)
    print_runs(summaries, console)
    folders = {arm: str(out / f"{arm}-{config.seeds[0]}") for arm in config.arms if arm in ("with_bc", "without_bc")}
    if folders:
        decline = measure_decline(DeclineConfig(str(out), folders.get("with_bc"), folders.get("without_bc")))
        show(decline, out, console)
