"""`qstar sft`."""

from pathlib import Path

from qstar_jax.config import SftConfig


def run(config: SftConfig):
    """Fine-tunes a model on responses."""
    import jax

    from qstar_jax.report.curves import write_curves
    from qstar_jax.sharding import join_processes
    from qstar_jax.training.run import train

    join_processes(config.mesh)
    train(config)
    if jax.process_index() == 0:
        write_curves(Path(config.out))
