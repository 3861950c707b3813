"""Tiny runs on a reward."""

from dataclasses import replace

import pytest
from rich.console import Console

from qstar_jax.config import (
    DataOptions,
    MeshOptions,
    OptimizerOptions,
    RewardOptions,
    RlConfig,
    RlOptions,
    TrainOptions,
)
from qstar_jax.training.rl.run import train_rl


def brevity(pairs):
    """One for an empty response, less for each word."""
    return [1.0 - 0.25 * len(response.split()) for _, response in pairs]


@pytest.fixture(scope="session")
def make_rl_config(hf_folder, train_file):
    """`make_rl_config(out, **sections)`: four steps of eight prompts, logged at each, saved at every second."""

    def make(out, **changes):
        sections = {
            "data": DataOptions(train=str(train_file), layout="shared"),
            "rl": RlOptions(max_new_tokens=6, samples_per_prompt=2),
            "reward": RewardOptions(),
            "optimizer": OptimizerOptions(learning_rate=3e-3, eps=1e-3),  # Adam would blow rounding up to signs
            "train": TrainOptions(steps=4, batch_size=8, log_every=1, save_every=2, reference_samples=0),
            "mesh": MeshOptions(data=1, min_shard_size=64),
        }
        for name, change in changes.items():
            sections[name] = replace(sections[name], **change) if isinstance(change, dict) else change
        return RlConfig(model=str(hf_folder), out=str(out), **sections)

    return make


@pytest.fixture(scope="session")
def tiny_rl(on_devices):
    """`tiny_rl(config)` trains on as many of the devices as the mesh asks for, and shows nothing."""

    def run(config, reward=brevity, **options):
        options = {"console": Console(quiet=True), **options}
        with on_devices(config.mesh.data * config.mesh.fsdp * config.mesh.tensor):
            return train_rl(config, lambda prompts: reward, **options)

    return run
