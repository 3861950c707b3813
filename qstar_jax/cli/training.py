"""What the verbs that train have in common."""

from pathlib import Path

from qstar_jax.config import DpoConfig, ExportConfig, SftConfig


def run_training(config: SftConfig | DpoConfig):
    """Trains, draws the curves, and writes the model where `config.export` asks for it."""
    import jax

    from qstar_jax.cli.export import export
    from qstar_jax.report.curves import write_curves
    from qstar_jax.sharding import join_processes
    from qstar_jax.training.run import train

    join_processes(config.mesh)
    train(config)
    if jax.process_index() == 0:
        write_curves(Path(config.out))
    if config.export is not None:
        export(ExportConfig(config.out, config.export, mesh=config.mesh))
