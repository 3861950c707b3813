"""A run that goes on where other meshes have left it."""

import shutil
import signal
from dataclasses import replace

import pytest

from qstar_jax.config import MeshOptions


@pytest.mark.slow
def test_a_run_goes_on_on_other_meshes(tmp_path, smooth_config, tiny_train, signal_after, assert_runs_close):
    mesh = MeshOptions(data=4, fsdp=2, min_shard_size=64)
    whole = smooth_config(tmp_path / "whole", mesh=mesh, train={"save_every": 4})
    tiny_train(whole)
    # From step 4 with all axes but `data`, from step 5 on one device.
    out = shutil.copytree(whole.out, tmp_path / "run")
    shutil.rmtree(out / "checkpoints" / "6")
    (out / "summary.json").unlink()
    rest = replace(whole, out=str(out), resume=True)
    signal_after(replace(rest, mesh=replace(mesh, data=1, fsdp=4, tensor=2)), 5, signal.SIGTERM)
    tiny_train(replace(rest, mesh=replace(mesh, data=1, fsdp=1)))
    assert_runs_close(out, whole.out, 1e-6)
