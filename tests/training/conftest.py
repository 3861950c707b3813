"""Tiny runs from file to checkpoint."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from qstar_jax import sharding
from qstar_jax.config import (
    ComputeOptions,
    DataOptions,
    DpoConfig,
    MeshOptions,
    OptimizerOptions,
    SftConfig,
    TrainOptions,
)
from qstar_jax.models.lora import split_adapter
from qstar_jax.store.checkpoint_store import CheckpointStore
from qstar_jax.store.checkpoints import abstract_with_shardings, find_checkpoint, read_description
from qstar_jax.training.optimizers import make_optimizer
from qstar_jax.training.run import train


@pytest.fixture(scope="session")
def make_config(hf_folder, train_file):
    """`make_config(out, verb="dpo", **sections)`: six steps of eight pairs, logged at each, saved at every second."""

    def make(out, verb="dpo", **changes):
        sections = {
            "data": DataOptions(train=str(train_file)),
            "optimizer": OptimizerOptions(learning_rate=3e-3),
            "train": TrainOptions(steps=6, batch_size=8, log_every=1, save_every=2, reference_samples=0),
            "mesh": MeshOptions(data=1, min_shard_size=64),
        }
        for name, change in changes.items():
            sections[name] = replace(sections[name], **change) if isinstance(change, dict) else change
        kind = DpoConfig if verb == "dpo" else SftConfig
        return kind(model=str(hf_folder), out=str(out), **sections)

    return make


@pytest.fixture(scope="session")
def tiny_train(on_devices):
    """`tiny_train(config)` trains on as many of the devices as the mesh asks for, and shows nothing by default."""

    def run(config, console=None):
        with on_devices(config.mesh.data * config.mesh.fsdp * config.mesh.tensor):
            return train(config, console or Console(quiet=True))

    return run


@pytest.fixture(scope="session")
def metric_lines():
    """`metric_lines(out)`: lines of metrics.jsonl, without those numbers that are times."""

    def read(out):
        lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in lines]

    return read


@pytest.fixture(scope="session")
def arrays_of(one_device):
    """`arrays_of(out)`: parameters and optimizer state of a run's newest checkpoint, as numpy arrays."""

    def read(out):
        step = int(find_checkpoint(Path(out)).name)
        description = read_description(find_checkpoint(Path(out)))
        model = description.build_model(ComputeOptions())
        options = OptimizerOptions(**description.options["optimizer"])
        params = split_adapter(model.abstract_params())[0 if model.lora is None else 1]
        opt_state = jax.eval_shape(make_optimizer(options, description.options["train"]["steps"]).init, params)
        abstract = {"params": params, "opt_state": opt_state}
        one = sharding.tree_shardings(abstract, one_device)
        with CheckpointStore(Path(out), keep=9) as store:
            arrays = store.restore(step, abstract_with_shardings(abstract, one))
        return jax.tree.map(np.asarray, (arrays["params"], arrays["opt_state"]))

    return read
