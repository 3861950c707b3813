"""Two processes over loopback, one device each: what a pod does, in small."""

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import qstar_jax
from qstar_jax.cli.main import main
from qstar_jax.config import ComputeOptions, MeshOptions
from qstar_jax.interruption import TEMPORARY
from qstar_jax.store.checkpoints import find_checkpoint
from qstar_jax.store.open import load_model
from qstar_jax.training.diagnostics.decline import FILE

METRICS = ("loss", "rewards/margins", "logps/chosen", "lengths/chosen", "grad_norm", "eval_rewards/reference_samples")

# The second process gets SIGTERM before its first step. It waits until JAX has noticed, which looks once a second.
STOPPED = """
import os, signal, sys, time
from qstar_jax.cli.main import main
from qstar_jax.interruption import StopSignals

real = StopSignals.defer

def defer(self):
    real(self)
    if os.environ["JAX_PROCESS_ID"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(3)

StopSignals.defer = defer
sys.exit(main(sys.argv[1:]))
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def by_two_processes(verb: str, options: dict, program=("-m", "qstar_jax.cli.main"), code: int = 0) -> list[str]:
    """Runs a verb, and returns what each process says; both must end with that exit code."""
    words = [f"--{name}={value}" for name, value in options.items()]
    environment = os.environ | {
        "PYTHONPATH": str(Path(qstar_jax.__file__).parent.parent),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
        "JAX_NUM_PROCESSES": "2",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, *program, verb, *words],
            env=environment | {"JAX_PROCESS_ID": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:  # one that waits for a partner that has failed
            process.kill()
    assert [process.returncode for process in processes] == [code, code], "\n".join(outputs)
    return outputs


@pytest.mark.slow
def test_two_processes_train_as_one_does(
    tmp_path,
    hf_folder,
    train_file,
    make_config,
    tiny_train,
    metric_lines,
    arrays_of,
    one_device,
    assert_norm_close,
):
    expected, out = tmp_path / "one", tmp_path / "two"
    tiny_train(make_config(expected, train={"steps": 2, "save_every": 0, "reference_samples": 4}, mesh={"fsdp": 2}))
    options = {
        "model": hf_folder,
        "out": out,
        "data.train": train_file,
        "optimizer.learning_rate": 3e-3,
        "train.steps": 2,
        "train.batch_size": 8,
        "train.log_every": 1,
        "train.reference_samples": 4,
        "mesh.data": 1,
        "mesh.fsdp": 2,
        "mesh.min_shard_size": 64,
        "mesh.multi_process": "true",
    }
    outputs = by_two_processes("dpo", options)
    lines, expected_lines = metric_lines(out), metric_lines(expected)
    assert [line["step"] for line in lines] == [line["step"] for line in expected_lines]
    for line, other in zip(lines, expected_lines, strict=True):
        for name in METRICS:
            if name in other:
                np.testing.assert_allclose(line[name], other[name], rtol=1e-5, atol=1e-5, err_msg=name)
    # Each has drawn the same samples from the reference.
    assert "eval_rewards/reference_samples" in lines[-1]
    samples = [[json.loads(line)["answer"] for line in (run / FILE).open()] for run in (out, expected)]
    assert samples[0] == samples[1]
    # Only the first process writes and speaks.
    assert "step 1/2" in outputs[0] and "step 1/2" not in outputs[1]
    assert json.loads((out / "summary.json").read_text())["steps"] == 2

    # One process, on another number of devices, reads what two have written.
    assert find_checkpoint(out).name == "2"
    loaded = load_model(out, ComputeOptions(), one_device, MeshOptions())
    # AdamW divides rounding by rounding where a gradient is almost 0, so this is wider than the losses need.
    assert_norm_close(loaded.params, arrays_of(expected)[0], 1e-3)

    # Together they export what one process exports.
    size = {"model": out, "max_shard_size": "20KB"}
    mesh = {name: value for name, value in options.items() if name.startswith("mesh.")}
    by_two_processes("export", {**size, **mesh, "out": tmp_path / "by_two"})
    assert main(["export", *(f"--{name}={value}" for name, value in size.items()), f"--out={tmp_path / 'by_one'}"]) == 0
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("by_one", "by_two")]
    assert len(files[0]) > 8 and files[0] == files[1]


@pytest.mark.slow
def test_a_run_goes_on_with_other_numbers_of_processes(
    tmp_path, train_file, smooth_config, tiny_train, signal_after, assert_runs_close
):
    expected, out = tmp_path / "one", tmp_path / "run"
    config = smooth_config(expected)
    tiny_train(config)
    options = {
        "model": config.model,
        "out": out,
        "data.train": train_file,
        "optimizer.learning_rate": config.optimizer.learning_rate,
        "optimizer.eps": config.optimizer.eps,
        "train.steps": 6,
        "train.batch_size": 8,
        "train.log_every": 1,
        "train.save_every": 2,
        "train.reference_samples": 0,
        "mesh.data": 1,
        "mesh.fsdp": 2,
        "mesh.min_shard_size": 64,
        "mesh.multi_process": "true",
        "resume": "auto",
    }
    # One process until step 2; two, of which one is asked to stop before either has asked whether to; one.
    rest = replace(config, out=str(out), resume="auto")
    signal_after(rest, 2, signal.SIGTERM)
    outputs = by_two_processes("dpo", options, ("-c", STOPPED), TEMPORARY)
    assert all("stopped after step 3 of 6, which is saved; go on with" in output for output in outputs)
    assert find_checkpoint(out).name == "3"
    tiny_train(rest)
    assert_runs_close(out, expected, 1e-6)
