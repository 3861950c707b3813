"""The real packages, offline: what they keep is read back from their files."""

import json
import struct
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from qstar_jax.cli.main import main
from qstar_jax.config import LogOptions
from qstar_jax.errors import InputError
from qstar_jax.training import trackers
from qstar_jax.training.run import open_log, train


def stop_at(out: Path, step: int):
    """A watch that fails the run at its line of a step."""

    def watch():
        if json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"] == step:
            raise ZeroDivisionError

    return watch


def wandb_records(path: Path):
    """Records of wandb's log of transactions: blocks of 32 KiB, in which parts have a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, record = path.read_bytes(), 7, b""
    while at < len(content):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", content, at)
        record += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(record)
            record = b""


def items(updates) -> dict:
    return {entry.key or "/".join(entry.nested_key): json.loads(entry.value_json) for entry in updates}


@pytest.fixture(scope="module")
def tracked(tmp_path_factory, make_config, eval_file, on_devices):
    """Folder and summary of a run that failed after step 4 and was resumed; both trackers followed it, offline."""
    pytest.importorskip("wandb")
    pytest.importorskip("trackio")
    folder = tmp_path_factory.mktemp("tracked")
    config = make_config(folder / "mine", data={"eval": str(eval_file)}, log=LogOptions(wandb="q", trackio="q"))
    quiet = Console(quiet=True)
    with pytest.MonkeyPatch.context() as patch, on_devices(1):
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        patch.setattr("trackio.utils.TRACKIO_DIR", folder / "trackio")
        patch.setattr("trackio.sqlite_storage.TRACKIO_DIR", folder / "trackio")
        with pytest.raises(ZeroDivisionError):
            train(config, quiet, stop_at(Path(config.out), 4))
        yield Path(config.out), train(replace(config, resume=True), quiet)


@pytest.mark.slow
def test_trackio_has_options_lines_and_summary_of_a_resumed_run(tracked, metric_lines):
    from trackio.sqlite_storage import SQLiteStorage

    out, summary = tracked
    (name,) = SQLiteStorage.get_runs("q")
    assert name.startswith("mine-")
    kept = SQLiteStorage.get_run_config("q", name)
    assert kept["train"]["batch_size"] == 8 and kept["loss"]["beta"] == 0.1
    logs = SQLiteStorage.get_logs("q", name)
    for line in metric_lines(out):
        assert any(all(log.get(metric) == value for metric, value in line.items()) for log in logs)
    last = {name: value for log in logs for name, value in log.items() if name.startswith("summary/")}
    assert last == {f"summary/{name}": value for name, value in summary.items()}


@pytest.mark.slow
def test_wandb_has_options_lines_and_summary_of_a_resumed_run(tracked, metric_lines):
    out, summary = tracked
    files = sorted((out / "wandb").glob("offline-run-*/*.wandb"))
    both = [list(wandb_records(file)) for file in files]
    runs = [record.run for records in both for record in records if record.HasField("run")]
    assert len(both) == 2 and len({run.run_id for run in runs}) == 1  # two processes, one run
    assert {(run.project, run.display_name) for run in runs} == {("q", "mine")}
    options = items(runs[0].config.update)
    assert options["train"]["batch_size"] == 8 and options["loss"]["beta"] == 0.1
    assert [record.exit.exit_code for records in both for record in records if record.HasField("exit")] == [1, 0]
    history = [items(record.history.item) for records in both for record in records if record.HasField("history")]
    for line in metric_lines(out):
        expected = {"_step" if metric == "step" else metric: value for metric, value in line.items()}
        assert any(all(log.get(metric) == value for metric, value in expected.items()) for log in history)
    last = {}
    for record in both[1]:
        if record.HasField("summary"):
            last |= items(record.summary.update)
    assert {name: last[name] for name in summary} == summary


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_what_is_missing_or_empty_is_refused_before_anything_is_read(
    package, make_config, tiny_train, tmp_path, monkeypatch
):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    config = make_config(tmp_path / "out", log=LogOptions(**{package: "mine"}))
    with pytest.raises(InputError, match=rf"log.{package} mine: .* pip install 'qstar_jax\[{package}\]'"):
        tiny_train(config)
    with pytest.raises(InputError, match=rf"log.{package} is empty"):
        tiny_train(replace(config, log=LogOptions(**{package: " "})))
    assert not (tmp_path / "out").exists()


def test_a_tracker_that_does_not_begin_is_one_sentence(tmp_path):
    pytest.importorskip("wandb")
    with (
        pytest.raises(InputError, match=r"log\.wandb a/b: wandb does not begin \("),  # no name of a project
        trackers.Trackers(LogOptions(wandb="a/b"), tmp_path) as tracking,
    ):
        tracking.start({}, 0)


@pytest.fixture
def opened(monkeypatch):
    """Names of the runs that a stand-in for trackio was asked to open."""
    names = []

    def init(**given):
        names.append(given["name"])
        return SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)

    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(init=init))
    return names


def test_a_run_that_begins_anew_is_another_one(opened, tmp_path):
    for step in (0, 4, 0):
        trackers.Trackers(LogOptions(trackio="q"), tmp_path).start({}, step)
    assert opened[0] == opened[1] != opened[2]


@pytest.mark.parametrize("verb", ["dpo", "rl"])
def test_where_nobody_is_logged_in_nothing_is_written(
    verb, hf_folder, train_file, tmp_path, monkeypatch, one_device_only, capsys
):
    def init(**_):
        raise ValueError("No API key configured")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    monkeypatch.setattr(trackers, "find_spec", lambda name: name)
    words = [verb, f"--model={hf_folder}", f"--out={tmp_path / 'run'}", f"--data.train={train_file}"]
    words += ["--train.batch_size=8", "--train.steps=1", "--log.wandb=mine"]
    if verb == "rl":
        words += ["--reward.kind=verifier", "--reward.answer=chosen", "--rl.max_new_tokens=4"]
    assert main(words) == 2
    assert "log.wandb mine: wandb does not begin (No API key configured)" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_other_processes_than_the_first_log_nothing(opened, tmp_path, monkeypatch):
    monkeypatch.setattr("qstar_jax.training.run.jax.process_index", lambda: 1)
    tracking = trackers.Trackers(LogOptions(trackio="q"), tmp_path)
    tracking.start({}, 0)
    assert not opened
    with open_log(None, None, tracking) as log:  # nothing of the run is asked for
        assert log is None
    assert not tracking._runs and not list(tmp_path.iterdir())
