"""What the verbs that train have in common."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from qstar_jax.config import DpoConfig, ExportConfig, RlConfig, SftConfig
from qstar_jax.interruption import naming_a_lost_partner


def run_training(config: SftConfig | DpoConfig | RlConfig, train: Callable[[Any], Any] | None = None):
    """Trains, draws the curves, and writes the model where `config.export` asks for it.

    Args:
        config: The options of the verb.
        train: `config -> summary`; by default that of labelled data.
    """
    import jax

    from qstar_jax.cli.export import export
    from qstar_jax.report.curves import write_curves
    from qstar_jax.sharding import join_processes
    from qstar_jax.training.run import train as train_on_rows

    join_processes(config.mesh)
    with naming_a_lost_partner():
        (train or train_on_rows)(config)
    if jax.process_index() == 0:
        write_curves(Path(config.out))
    if config.export is not None:
        export(ExportConfig(config.out, config.export, mesh=config.mesh))
