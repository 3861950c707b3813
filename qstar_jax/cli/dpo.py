"""`qstar dpo`."""

from qstar_jax.cli.training import run_training
from qstar_jax.config import DpoConfig


def run(config: DpoConfig):
    """Trains a model on preference pairs."""
    run_training(config)
