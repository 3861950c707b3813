"""`qstar generate`."""

from rich.console import Console

from qstar_jax.config import GenerateConfig
from qstar_jax.decoding.run import generate_file


def run(config: GenerateConfig):
    """Generates responses to prompts."""
    generate_file(config, Console())
