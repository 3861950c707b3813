"""`qstar decline`."""

import json
from pathlib import Path

from rich.console import Console

from qstar_jax.config import DeclineConfig
from qstar_jax.errors import InputError
from qstar_jax.evaluation.insights.decline import decline_run
from qstar_jax.report.figures import write_figures
from qstar_jax.report.insights_terminal import print_decline


def run(config: DeclineConfig):
    """Reads the metrics of runs, and writes decline.json and decline.png."""
    console = Console()
    print_decline(decline(config), console)
    console.print(f"decline.json, decline.png: {config.out}", markup=False, soft_wrap=True)


def decline(config: DeclineConfig) -> dict:
    """Gathers how rewards moved in one run or two.

    Args:
        config: The runs.

    Returns:
        The record that is also written to decline.json.

    Raises:
        InputError: If no run is named, or one cannot be used.
    """
    runs = {"with SFT": config.with_sft, "without SFT": config.without_sft}
    runs = {name: Path(folder).expanduser() for name, folder in runs.items() if folder is not None}
    if not runs:
        raise InputError("name a DPO run with --with_sft, --without_sft or both")
    record = {"runs": [decline_run(name, folder) for name, folder in runs.items()]}
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "decline.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    write_figures(out, decline=record)
    return record
