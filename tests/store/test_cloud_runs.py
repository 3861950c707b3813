"""A run in a bucket, on loopback: killed, gone on with on another machine, scored, and equal to one in a folder."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import qstar_jax
from qstar_jax.cli.main import main
from qstar_jax.config import ComputeOptions, MeshOptions
from qstar_jax.store.cloud.place import Place
from qstar_jax.store.cloud.reading import copy
from qstar_jax.store.open import load_model

# Uploads often, and takes its time: so there is a checkpoint in the bucket long before the end.
SLOW = """
import sys, time
from qstar_jax.cli.main import main
from qstar_jax.store.cloud import writing
from qstar_jax.training.source import DatasetSource
writing.INTERVAL = 0.2
at_step = DatasetSource.at_step
DatasetSource.at_step = lambda self, step, state=None: (time.sleep(0.8), at_step(self, step, state))[1]
sys.exit(main(sys.argv[1:]))
"""


def lines_of(run: Path) -> list[dict]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if not name.startswith("perf/")} for line in lines]


def params_of(run: Path, mesh) -> list[np.ndarray]:
    params = load_model(run, ComputeOptions(), mesh, MeshOptions(data=1)).params
    return [np.asarray(array) for array in jax.tree.leaves(params)]


@pytest.mark.slow
@pytest.mark.parametrize("bucket", ["gs", pytest.param("s3", marks=pytest.mark.grid)], indirect=True)
def test_a_run_in_a_bucket_is_killed_goes_on_elsewhere_and_equals_one_in_a_folder(
    bucket, hf_folder, train_file, eval_file, tmp_path, monkeypatch, one_device, on_devices
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "first"))
    # Model and data are in the bucket, too.
    files = Place.at("out", bucket).files
    files.put(str(hf_folder), f"{bucket}/model", recursive=True)
    files.put_file(str(train_file), f"{bucket}/data/train.jsonl")
    files.put_file(str(eval_file), f"{bucket}/data/eval.jsonl")

    def words(place: str, out: str, model: str) -> list[str]:
        options = {"model": model, "out": out, "data.train": f"{place}/train.jsonl", "data.eval": f"{place}/eval.jsonl"}
        options |= {"train.steps": 8, "train.batch_size": 8, "train.log_every": 1, "train.save_every": 2}
        options |= {"train.eval_every": 4, "train.reference_samples": 0, "reference.mode": "cached"}
        options |= {"reference.cache": f"{Path(out).parent}/cache" if "://" not in out else f"{bucket}/cache"}
        options |= {"mesh.data": 1, "mesh.min_shard_size": 64}
        return ["dpo", *(f"--{name}={value}" for name, value in options.items())]

    there = words(f"{bucket}/data", f"{bucket}/runs/mine", f"{bucket}/model")
    environment = os.environ | {"PYTHONPATH": str(Path(qstar_jax.__file__).parent.parent), "JAX_NUM_CPU_DEVICES": "1"}
    process = subprocess.Popen([sys.executable, "-c", SLOW, *there], env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not files.glob(f"{bucket}/runs/mine/checkpoints/*/_checksums*"):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
        files.invalidate_cache()
    process.kill()
    process.wait()
    files.invalidate_cache()
    assert not files.exists(f"{bucket}/runs/mine/summary.json")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "second"))  # another machine
    before = {int(path.split("/")[-2]) for path in files.glob(f"{bucket}/runs/mine/checkpoints/*/_checksums*")}
    assert 0 < max(before) < 8
    with on_devices(1):
        assert main([*there, "--resume"]) == 0
        local = tmp_path / "runs" / "mine"
        for name in ("train", "eval"):
            copied = tmp_path / "data" / f"{name}.jsonl"
            copied.parent.mkdir(exist_ok=True)
            copied.write_bytes({"train": train_file, "eval": eval_file}[name].read_bytes())
        assert main(words(str(tmp_path / "data"), str(local), str(hf_folder))) == 0
        mine = copy(Place.at("model", f"{bucket}/runs/mine"))
        assert lines_of(mine) == lines_of(local)
        for ours, theirs in zip(params_of(mine, one_device), params_of(local, one_device), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        files.invalidate_cache()
        assert {path.rsplit("/", 1)[1] for path in files.ls(f"{bucket}/runs/mine/checkpoints", detail=False)} == {
            "6",
            "8",
        }
        assert files.glob(f"{bucket}/cache/**") and "summary.json" in {path.name for path in mine.iterdir()}
        # Its options name addresses, and other verbs read it and write beside it.
        assert f"model: {bucket}/model" in (mine / "config.yaml").read_text()
        scores = ["score", f"--model={bucket}/runs/mine", f"--data.eval={bucket}/data/eval.jsonl", "--mesh.data=1"]
        assert main([*scores, f"--out={bucket}/scores"]) == 0
        assert (
            main(["score", f"--model={local}", f"--data.eval={eval_file}", "--mesh.data=1", f"--out={tmp_path}/s"]) == 0
        )
        files.invalidate_cache()
        assert files.cat_file(f"{bucket}/scores/scores.jsonl") == (tmp_path / "s" / "scores.jsonl").read_bytes()
