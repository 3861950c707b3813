"""`qstar dpo`."""

from pathlib import Path

from qstar_jax.config import DpoConfig


def run(config: DpoConfig):
    """Trains a model on preference pairs."""
    import jax

    from qstar_jax.report.curves import write_curves
    from qstar_jax.sharding import join_processes
    from qstar_jax.training.run import train

    join_processes(config.mesh)
    train(config)
    if jax.process_index() == 0:
        write_curves(Path(config.out))
