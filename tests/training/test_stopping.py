"""Signals that end a run where it can go on."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

import qstar_jax
from qstar_jax.cli.main import main
from qstar_jax.interruption import CTRL_C, TEMPORARY, Stopped, StopSignals
from qstar_jax.store.checkpoints import find_checkpoint
from qstar_jax.training.loop import Loop


@pytest.fixture(scope="module")
def config_of(make_config, eval_file):
    """`config_of(out)`: a run whose lines, evaluations and checkpoints fall on different steps."""

    def make(out, **changes):
        train = {"log_every": 3, "save_every": 4, "eval_every": 3, "eval_batch_size": 4, "keep_best": "loss"}
        return make_config(out, data={"eval": str(eval_file)}, train={**train, "keep_checkpoints": 3, **changes})

    return make


@pytest.fixture(scope="module")
def whole(tmp_path_factory, config_of, tiny_train):
    out = tmp_path_factory.mktemp("runs") / "whole"
    tiny_train(config_of(out))
    return out


def assert_equal_runs(out, expected, arrays_of, metric_lines):
    jax.tree.map(np.testing.assert_array_equal, arrays_of(out), arrays_of(expected))
    assert metric_lines(out) == metric_lines(expected)
    summaries = [json.loads((run / "summary.json").read_text()) for run in (out, expected)]
    speeds = ("seconds", "peak_memory_bytes")
    numbers = [
        {name: value for name, value in summary.items() if not name.startswith("perf/") and name not in speeds}
        for summary in summaries
    ]
    assert numbers[0] == numbers[1] and "before_eval_loss" in numbers[0]
    assert json.loads((out / "best.json").read_text()) == json.loads((expected / "best.json").read_text())


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(
    whole, tmp_path, config_of, tiny_train, signal_after, arrays_of, metric_lines
):
    # After 3 an evaluation is due; 5 is between lines of the log; after 6 only the last evaluation is missing.
    out, config = tmp_path / "run", replace(config_of(tmp_path / "run"), resume="auto")
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    for step, number, code in ((3, signal.SIGTERM, TEMPORARY), (5, signal.SIGINT, CTRL_C), (6, signal.SIGTERM, 75)):
        stop = signal_after(config, step, number)
        assert stop.code == code and str(stop) == f"stopped after step {step} of 6, which is saved"
        assert find_checkpoint(out / "checkpoints" / str(step)) is not None  # on disk before the run ends
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    tiny_train(config)
    assert_equal_runs(out, whole, arrays_of, metric_lines)


def test_a_second_ctrl_c_ends_the_process_at_once():
    program = """
import os, signal
from qstar_jax.interruption import StopSignals
with StopSignals() as stop:
    stop.defer()
    os.kill(os.getpid(), signal.SIGINT)
    if stop.requested():
        os.kill(os.getpid(), signal.SIGINT)
"""
    package = {"PYTHONPATH": str(Path(qstar_jax.__file__).parent.parent)}
    assert subprocess.run([sys.executable, "-c", program], env=os.environ | package).returncode == -signal.SIGINT


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, TEMPORARY), (signal.SIGINT, CTRL_C)])
def test_before_the_first_step_a_run_ends_at_once(number, code):
    with pytest.raises(Stopped) as stop, StopSignals():
        os.kill(os.getpid(), number)
    assert stop.value.code == code


@pytest.mark.parametrize("given", [[], ["--resume", "auto"]])
def test_the_command_says_how_to_go_on(given, tmp_path, monkeypatch, capsys, one_device_only, hf_folder, train_file):
    def run(self, state, start=0, batch=None):
        raise self.stop.stopped("stopped after step 2 of 6, which is saved")

    monkeypatch.setattr(Loop, "run", run)
    options = {"model": hf_folder, "out": tmp_path / "a run", "data.train": train_file, "train.reference_samples": 0}
    words = ["dpo", *(f"--{name}={value}" for name, value in options.items()), "--train.batch_size=8", *given]
    assert main(words) == TEMPORARY
    said = capsys.readouterr().err.splitlines()
    assert said[-2] == "qstar dpo: stopped after step 2 of 6, which is saved; go on with"
    assert said[-1].startswith(f"qstar dpo --model={hf_folder} '--out={tmp_path}/a run'")
    assert said[-1].endswith("--resume auto" if given else "--train.batch_size=8 --resume")


def test_a_run_killed_before_its_summary_gets_one(whole, tmp_path, config_of, tiny_train, arrays_of, metric_lines):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "summary.json").unlink()
    tiny_train(replace(config_of(out), resume=True))
    assert_equal_runs(out, whole, arrays_of, metric_lines)
