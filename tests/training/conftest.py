"""Tiny runs from file to checkpoint."""

import json
import os
from dataclasses import replace
from itertools import count
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
from qstar_jax.interruption import Stopped, StopSignals
from qstar_jax.models.lora import split_adapter
from qstar_jax.store import hub
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


@pytest.fixture
def signal_after(monkeypatch, tiny_train):
    """`signal_after(config, step, number)`: this process gets a signal while that step is computed."""

    def run(config, step, number):
        real, begun = StopSignals.requested, find_checkpoint(Path(config.out) / "checkpoints")
        steps = count(1 if begun is None else int(begun.name) + 1)
        with monkeypatch.context() as patch:

            def requested(self):
                if next(steps) == step:
                    os.kill(os.getpid(), number)
                return real(self)

            patch.setattr(StopSignals, "requested", requested)
            with pytest.raises(Stopped) as stop:
                tiny_train(config)
        return stop.value

    return run


@pytest.fixture(scope="session")
def smooth_config(tmp_path_factory, make_config, tiny_model, tiny_params, tiny_tokenizer):
    """`make_config` for comparisons to 1e-6 of runs whose devices add in another order, which changes last bits.

    Relative to their norm, the gradients of `hf_folder` make 1e-6 to 2e-6 of that; with its layers' weights halved,
    they make 5e-7. AdamW divides by the square root of the second moment, so an update is arbitrary where a gradient
    is rounding alone. Clipped gradients have a root mean square of 7e-3 here, far above `eps`; their rounding is far
    below it.
    """
    params = tiny_params | {"layers": jax.tree.map(lambda x: 0.5 * x, tiny_params["layers"])}
    folder = tmp_path_factory.mktemp("hf") / "smooth"
    hub.write_folder(folder, tiny_model, params, tiny_tokenizer, "float32")

    def make(out, **changes):
        config = make_config(out, **changes)
        return replace(config, model=str(folder), optimizer=replace(config.optimizer, eps=1e-4))

    return make


@pytest.fixture(scope="session")
def assert_runs_close(arrays_of, metric_lines, assert_norm_close):
    """`assert_runs_close(out, expected, tolerance)`: parameters, optimizer state, metrics.jsonl and summary.json."""

    def numbers(out):
        summary = json.loads((Path(out) / "summary.json").read_text())
        times = ("seconds", "peak_memory_bytes")
        summary = {k: v for k, v in summary.items() if k not in times and not k.startswith("perf/")}
        return [*metric_lines(out), summary]

    def check(out, expected, tolerance):
        assert find_checkpoint(Path(out)).name == find_checkpoint(Path(expected)).name
        assert_norm_close(arrays_of(out), arrays_of(expected), tolerance)
        for actual, line in zip(numbers(out), numbers(expected), strict=True):
            assert actual.keys() == line.keys()
            # A reward is beta = 0.1 times a difference of log-probabilities, so it has the rounding of these.
            terms = 0.1 * max(abs(line["logps/chosen"]), abs(line["logps/rejected"]))
            for name, value in line.items():
                size = max(abs(value), terms) if name.startswith("rewards/") else abs(value)
                assert abs(actual[name] - value) <= tolerance * size, (name, actual, line)

    return check
