"""`qstar dpo`."""

from qstar_jax.config import DpoConfig


def run(config: DpoConfig):
    """Trains a model on preference pairs."""
    from qstar_jax.sharding import join_processes
    from qstar_jax.training.run import train

    join_processes(config.mesh)
    train(config)
