"""Rows from runs of a pipeline, and rewards split by stage."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from qstar_jax.errors import InputError
from qstar_jax.pipeline.finished import _line
from qstar_jax.pipeline.plan import make_pipeline_plan
from qstar_jax.pipeline.rows import PairRow, read_pairs


def test_a_stage_that_was_not_trained_is_not_blamed():
    row = PairRow(0, "w1", ({"a": "w2", "b": "w3", "c": "w4"}, {"a": "w3", "b": "w4", "c": "w5"}))
    rewards = np.array([[-2.0, -1.0, 0.0], [0.0, 0.0, 0.0]])
    assert _line(row, ["a", "b", "c"], ["a", "b", "c"], rewards)["blame"] == "c"
    assert _line(row, ["a", "b", "c"], ["a", "b"], rewards)["blame"] == "b"


def test_runs_to_prompts_become_rows(make_pipeline, run_mode, pair_file, hf_folder, tmp_path):
    model = tmp_path / "model"  # many tokens end its texts, as it is not trained to
    shutil.copytree(hf_folder, model)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, *range(30, 60)]}))
    stage, data = {"model": str(model), "max_new_tokens": 12}, {"prompts": str(pair_file), "max_prompts": 6}
    config = make_pipeline(tmp_path / "a", mode="sample", stages=(stage, stage), data=data)
    rows = run_mode(config)
    read = read_pairs(str(tmp_path / "a" / "pairs.jsonl"), ("outline", "text"))
    assert [row.runs for row in read] == [tuple(row["outputs"]) for row in rows]
    assert 1 <= len(rows) <= 6 and all(not row.labelled for row in read)
    again = run_mode(replace(config, out=str(tmp_path / "b")))
    other = run_mode(replace(config, out=str(tmp_path / "c"), samples=replace(config.samples, seed=1)))
    assert again == rows != other
    with pytest.raises(InputError, match="no pair of runs is left"):
        run_mode(make_pipeline(tmp_path / "d", mode="sample", stages=({"max_new_tokens": 1}, {}), data=data))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"train": None}}, "mode train needs --data.train"),
        ({"mode": "sample"}, "mode sample needs --data.prompts"),
        ({"mode": "score"}, "mode score needs --run"),
        ({"run": "runs/p"}, "stages are given too"),
        ({"mode": "sample", "resume": True}, "--resume has no effect with mode sample"),
        ({"task": "builtin:tiny-questions"}, "no built-in task that knows the true reward"),
        ({"samples": {"label": "best"}}, "samples.label best needs --task"),
        ({"samples": {"temperature": 0.0}}, "samples.temperature 0 above 0"),
        ({"train": {"keep_best": "loss"}}, "train.keep_best loss is not supported"),
        ({"train": {"reference_samples": 4}}, "train.reference_samples 4 is not supported"),
        ({"train": {"show_responses": 2}}, "train.show_responses 2 is not supported"),
        ({"train": {"steps": 4, "epochs": 1.0}}, "stage outline: train.steps 4 and train.epochs 1.0 contradict"),
    ],
)
def test_options_that_have_no_meaning_are_refused(make_pipeline, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        make_pipeline_plan(make_pipeline(tmp_path / "p", **changes))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (({"name": "prompt"}, {}), r"stages\[0\].name 'prompt': expected letters"),
        (({"name": "../x"}, {}), r"stages\[0\].name '../x'"),
        (({}, {"name": "outline"}), r"stages\[1\].name 'outline' is that of an earlier stage"),
        (({"template": "{text}"}, {}), r"stages\[0\].template .*\{text\} is no text that comes before"),
        (({"beta": 0.0}, {}), r"stages\[0\].beta 0: expected a number above 0"),
        (({"train": False}, {"train": False}), "no stage is trained"),
        (({"max_new_tokens": 0}, {}), r"stages\[0\].max_new_tokens 0"),
    ],
)
def test_stages_that_make_no_pipeline_are_refused(make_pipeline, tmp_path, stages, message):
    with pytest.raises(InputError, match=message):
        make_pipeline_plan(make_pipeline(tmp_path / "p", stages=stages))


def test_a_folder_without_a_training_is_refused(make_pipeline, tmp_path):
    config = make_pipeline(tmp_path / "s", mode="score", run=str(tmp_path), stages=({}, {}))
    with pytest.raises(InputError, match=r"config\.yaml: no training of qstar pipeline"):
        make_pipeline_plan(replace(config, stages=[]))
    with pytest.raises(InputError, match="stages: none given"):
        make_pipeline_plan(replace(config, stages=[], run=None))
