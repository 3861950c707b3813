"""`qstar rl`."""

from functools import partial

from qstar_jax.cli.training import run_training
from qstar_jax.config import RlConfig


def run(config: RlConfig):
    """Trains a model on rewards of its own samples."""
    from qstar_jax.evaluation.rewards import reward_maker
    from qstar_jax.training.rl.run import train_rl

    run_training(config, partial(train_rl, make_reward=reward_maker(config)))
