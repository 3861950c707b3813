"""Tiny pipelines of two language models, from file to checkpoint."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from rich.console import Console

from qstar_jax.config import MeshOptions, OptimizerOptions, PipelineConfig, StageOptions, TrainOptions
from qstar_jax.config.pipeline import PipelineDataOptions, RunSamplesOptions
from qstar_jax.pipeline import finished, run
from qstar_jax.sharding import make_mesh


def write_rows(path, rows, seed):
    """Preferences between runs of an outline and a text, of one to eight words."""
    rng = np.random.default_rng(seed)

    def text(low, high):
        return " ".join(f"w{i}" for i in rng.integers(0, 56, rng.integers(low, high + 1)))

    lines = [
        {
            "prompt": text(2, 6),
            "chosen": {"outline": text(1, 4), "text": text(1, 8)},
            "rejected": {"outline": text(1, 4), "text": text(1, 8)},
        }
        for _ in range(rows)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="session")
def pair_file(tmp_path_factory):
    """Forty rows of preferences."""
    return write_rows(tmp_path_factory.mktemp("pipeline") / "train.jsonl", 40, seed=0)


@pytest.fixture(scope="session")
def held_out_file(tmp_path_factory):
    """Eleven rows of preferences: not a multiple of any batch size."""
    return write_rows(tmp_path_factory.mktemp("pipeline") / "eval.jsonl", 11, seed=1)


@pytest.fixture(scope="session")
def make_pipeline(hf_folder, pair_file):
    """`make_pipeline(out, **sections)`: four steps of eight pairs, logged at each, saved at every second."""

    def make(out, stages=({}, {}), **changes):
        common = {"model": str(hf_folder), "max_new_tokens": 5, "max_length": 48}
        outline = StageOptions(**{"name": "outline", **common, **stages[0]})
        text = StageOptions(**{"name": "text", "template": "{prompt} w0 {outline}", "beta": 0.2, **common, **stages[1]})
        sections = {
            "data": PipelineDataOptions(train=str(pair_file)),
            "optimizer": OptimizerOptions(learning_rate=3e-3, schedule="constant"),
            "train": TrainOptions(steps=4, batch_size=8, log_every=1, save_every=2, reference_samples=0),
            "samples": RunSamplesOptions(eval_prompts=4, batch_size=4),
            "mesh": MeshOptions(data=1, min_shard_size=64),
        }
        for name, change in changes.items():
            old = sections.get(name)
            sections[name] = replace(old, **change) if isinstance(change, dict) else change
        return PipelineConfig(**{"out": str(out), "stages": [outline, text], **sections})

    return make


@pytest.fixture(scope="session")
def run_mode(on_devices):
    """`run_mode(config)` does what the configuration's mode says, on as many devices as its mesh asks for."""
    modes = {"train": run.train_pipeline, "sample": finished.sample_pipeline, "score": finished.score_pipeline}

    def call(config):
        count = config.mesh.data * config.mesh.fsdp * config.mesh.tensor
        with on_devices(count), pytest.MonkeyPatch.context() as patch:  # it keeps programs of one device
            for module in (run, finished):
                patch.setattr(module, "make_mesh", lambda options: make_mesh(options, jax.devices()[:count]))
            return modes[config.mode](config, Console(quiet=True))

    return call
