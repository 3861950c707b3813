"""Whole trainings of a pipeline of two language models: what they leave behind, and what they repeat."""

import json
import shutil
import signal
from dataclasses import replace
from itertools import count
from pathlib import Path

import jax
import numpy as np
import pytest

from qstar_jax.config import ComputeOptions, LoraOptions, MeshOptions
from qstar_jax.config.pipeline import PipelineDataOptions
from qstar_jax.errors import InputError
from qstar_jax.interruption import TEMPORARY, Stopped, StopSignals
from qstar_jax.pipeline.start import _newest_step
from qstar_jax.store.checkpoint_store import CheckpointStore
from qstar_jax.store.open import load_model
from qstar_jax.store.references import find_beta, open_reference
from qstar_jax.store.sole_writer import sole_writer


@pytest.fixture(scope="module")
def whole(tmp_path_factory, make_pipeline, run_mode, held_out_file):
    """(configuration, summary) of an uninterrupted training."""
    data = {"eval": str(held_out_file), "max_train_rows": 8}  # the same eight at every step
    config = make_pipeline(tmp_path_factory.mktemp("runs") / "p", data=data)
    return config, run_mode(config)


def lines(out):
    read = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith("perf/")} for line in read]


def weights(out, mesh, stage):
    loaded = load_model(out / stage, ComputeOptions(), mesh, MeshOptions())
    return loaded, np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(loaded.params)])


def test_metrics_of_the_pipeline_and_of_each_stage(whole):
    config, summary = whole
    training = [line for line in lines(Path(config.out)) if "loss" in line]
    assert training[0]["loss"] == pytest.approx(np.log(2), abs=1e-5) and training[-1]["loss"] < 0.6
    for line in training:
        for name in ("chosen", "rejected", "margins"):
            total = line[f"rewards/{name}"]
            assert total == pytest.approx(line[f"outline/rewards/{name}"] + line[f"text/rewards/{name}"], abs=1e-5)
    before, after = (line for line in lines(Path(config.out)) if "eval_kl" in line)
    assert before["eval_kl"] == pytest.approx(0, abs=1e-5) and after["step"] == 4
    assert after["eval_kl"] == pytest.approx(after["eval_outline/kl"] + after["eval_text/kl"], abs=1e-5)
    assert after["eval_outline/kl"] != 0 and "eval_outline/rewards/accuracies" in summary


def test_each_stage_is_a_run_that_other_verbs_read(whole, one_device):
    config, _ = whole
    for stage, beta in (("outline", 0.1), ("text", 0.2)):
        loaded, own = weights(Path(config.out), one_device, stage)
        assert find_beta(loaded, None, stage, "beta") == beta

        def load(source):
            return load_model(source, ComputeOptions(), one_device, MeshOptions())

        reference = open_reference(loaded, None, stage, load)
        old = np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(reference.params)])
        assert np.abs(own - old).max() > 1e-3


@pytest.mark.slow
def test_a_stopped_training_goes_on_as_if_it_had_not(whole, make_pipeline, run_mode, tmp_path, one_device, monkeypatch):
    complete, requested = whole[0], StopSignals.requested
    out, options = tmp_path / "p", {"log_every": 2, "save_every": 0}
    config = make_pipeline(out, data={"max_train_rows": 8}, train=options)

    steps = count(1)

    def signalled(stop):
        if next(steps) == 2:
            signal.raise_signal(signal.SIGTERM)
        return requested(stop)

    with monkeypatch.context() as patch, pytest.raises(Stopped, match="stopped after step 2 of 4") as stop:
        patch.setattr(StopSignals, "requested", signalled)
        run_mode(config)
    assert stop.value.code == TEMPORARY and not (out / "summary.json").exists()
    with pytest.raises(InputError, match="already holds a run"):
        run_mode(config)
    again = replace(config, resume="auto")
    with pytest.raises(InputError, match=r"--resume: optimizer.learning_rate was 0.003"):
        run_mode(replace(again, optimizer=replace(config.optimizer, learning_rate=1e-3)))
    with pytest.raises(InputError, match="--resume: stages was"):
        run_mode(replace(again, stages=[config.stages[0], replace(config.stages[1], template="{outline}")]))
    run_mode(again)
    # The line of step 2 has the mean of steps 1 and 2, of which the first process took one.
    losses = [line["loss"] for line in lines(Path(complete.out)) if "loss" in line]
    expected = {0: losses[0], 2: np.mean(losses[1:3]), 3: losses[3]}
    assert {line["step"]: line["loss"] for line in lines(out)} == pytest.approx(expected, abs=1e-6)
    for stage in ("outline", "text"):
        np.testing.assert_array_equal(*(weights(p, one_device, stage)[1] for p in (out, Path(complete.out))))


def test_a_training_goes_on_from_the_newest_step_that_all_stages_have(whole, tmp_path):
    shutil.copytree(whole[0].out, tmp_path, dirs_exist_ok=True)
    folders = [tmp_path / name / "checkpoints" for name in ("outline", "text")]

    def newest():
        with CheckpointStore(tmp_path / "outline", 2) as first, CheckpointStore(tmp_path / "text", 2) as second:
            return _newest_step({"outline": first, "text": second})

    assert newest() == 4
    [file] = (folders[1] / "4" / "description").glob("*.json")
    file.write_text("{}")  # a damaged one gives way to the one before it
    assert newest() == 2
    shutil.rmtree(folders[0] / "2")
    with pytest.raises(InputError, match=r"the newest checkpoint that the other stages have is 2, but .*outline"):
        newest()
    shutil.rmtree(folders[0])
    with pytest.raises(InputError, match=r"outline.*there is none; restore it"):
        newest()
    shutil.rmtree(folders[1])
    assert newest() is None


def test_one_run_writes_a_folder(make_pipeline, run_mode, tmp_path):
    with sole_writer(tmp_path / "p"), pytest.raises(InputError, match="is being written by another run"):
        run_mode(make_pipeline(tmp_path / "p"))


def test_a_training_is_not_resumed_with_other_rows(whole, make_pipeline, run_mode, tmp_path):
    config, _ = whole
    out, rows = tmp_path / "p", tmp_path / "rows.jsonl"
    shutil.copytree(config.out, out)
    lines = Path(config.data.train).read_text().splitlines(keepends=True)
    rows.write_text("".join(lines[1:]))
    stored = out / "config.yaml"
    stored.write_text(stored.read_text().replace(config.data.train, str(rows)))
    changed = replace(config, out=str(out), resume=True, data=replace(config.data, train=str(rows)))
    with pytest.raises(InputError, match=r"data\.train was|gives other examples"):
        run_mode(changed)


def test_scores_split_the_rewards_of_training(whole, run_mode, pair_file, tmp_path):
    trained, scores = whole[0], {"out": str(tmp_path / "s"), "mode": "score", "stages": []}
    with pytest.raises(InputError, match="holds a training; choose another --out"):
        run_mode(replace(trained, **scores | {"out": trained.out}, run=trained.out))
    summary = run_mode(replace(trained, **scores, run=trained.out, data=PipelineDataOptions(eval=str(pair_file))))
    scored = [json.loads(line) for line in (tmp_path / "s" / "scores.jsonl").read_text().splitlines()]
    assert len(scored) == summary["rows"] == summary["compared"] == 40 and sum(summary["blamed"].values()) == 40
    assert json.loads((tmp_path / "s" / "summary.json").read_text()) == summary
    for line in scored:
        for role in ("chosen", "rejected"):
            assert line[role]["total"] == pytest.approx(sum(line[role]["rewards"].values()), abs=1e-6)
        margins = {
            name: line["chosen"]["rewards"][name] - line["rejected"]["rewards"][name] for name in line["margins"]
        }
        assert line["margins"] == pytest.approx(margins, abs=1e-6)
        assert line["blame"] == max(margins, key=margins.get)
    # The eight rows that were trained on are ranked as labelled, and by both stages together.
    assert np.mean([sum(line["margins"].values()) > 0 for line in scored[:8]]) == 1.0
    assert summary["accuracy"] == np.mean([sum(line["margins"].values()) > 0 for line in scored])


@pytest.mark.slow
def test_an_adapter_beside_a_stage_that_stays_as_it_is(make_pipeline, run_mode, tmp_path, held_out_file):
    lora = {"lora": LoraOptions(rank=2)}
    config = make_pipeline(tmp_path / "p", stages=(lora, {"train": False}), data={"eval": str(held_out_file)})
    summary = run_mode(config)
    assert {path.name for path in (tmp_path / "p").iterdir()} >= {"outline", "config.yaml", "metrics.jsonl"}
    assert not (tmp_path / "p" / "text").exists() and (tmp_path / "p" / "outline" / "base").is_dir()
    assert summary["eval_text/kl"] == pytest.approx(0, abs=1e-5) and abs(summary["eval_outline/kl"]) > 1e-4
    assert summary["rewards/margins"] == pytest.approx(summary["outline/rewards/margins"], abs=1e-6)


@pytest.mark.slow
def test_devices_and_micro_batches_change_nothing(whole, make_pipeline, run_mode, tmp_path):
    config, _ = whole
    data, samples = {"max_train_rows": 8, "layout": "plain"}, {"eval_prompts": 0}
    mesh = MeshOptions(data=2, fsdp=2, min_shard_size=64)
    run_mode(make_pipeline(tmp_path / "p", data=data, samples=samples, train={"accumulate": 2}, mesh=mesh))
    one, other = ([x for x in lines(out) if "loss" in x] for out in (Path(config.out), tmp_path / "p"))
    assert [x.keys() for x in one] == [x.keys() for x in other]
    np.testing.assert_allclose([x["loss"] for x in other], [x["loss"] for x in one], atol=2e-4)
