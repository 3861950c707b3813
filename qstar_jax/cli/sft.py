"""`qstar sft`."""

from qstar_jax.config import SftConfig


def run(config: SftConfig):
    """Fine-tunes a model on answers."""
    from qstar_jax.sharding import join_processes
    from qstar_jax.training.run import train

    join_processes(config.mesh)
    train(config)
