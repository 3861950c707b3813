"""`qstar sft`."""

from qstar_jax.cli.training import run_training
from qstar_jax.config import SftConfig


def run(config: SftConfig):
    """Fine-tunes a model on responses."""
    run_training(config)
