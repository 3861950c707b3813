"""Responses to fixed prompts at the evaluations of a run."""

import json
from dataclasses import replace

import pytest

import qstar_jax as qstar
from qstar_jax.errors import InputError
from qstar_jax.training.diagnostics.responses import _append


def lines_of(out):
    return [json.loads(line) for line in (out / "responses.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(make_config, tiny_train, eval_file, tmp_path_factory):
    """Folder of a run of six steps, evaluated at 0, 3 and 6."""
    out = tmp_path_factory.mktemp("responses") / "run"
    train = {"eval_every": 3, "show_responses": 2}
    tiny_train(make_config(out, data={"eval": str(eval_file)}, train=train))
    return out


def test_responses_are_those_of_the_policy_at_each_evaluation(run, hf_folder, eval_file):
    lines = lines_of(run)
    assert [(line["step"], line["row"]) for line in lines] == [(s, r) for s in (0, 3, 6) for r in (0, 1)]
    prompts = [json.loads(line)["prompt"] for line in eval_file.read_text().splitlines()[:2]]
    said = {}
    for step, model in ((0, hf_folder), (6, run)):
        answers = qstar.load(model).generate(prompts, max_new_tokens=9)  # as many as the longest response has
        said[step] = [line["response"] for line in lines if line["step"] == step]
        assert said[step] == answers.texts
        truncated = [line["truncated"] for line in lines if line["step"] == step]
        assert truncated == [not best.finished for best, *_ in answers]
    assert [line["prompt"] for line in lines] == prompts * 3 and said[0] != said[6]


def test_a_resumed_run_continues_the_file(tmp_path):
    path = tmp_path / "responses.jsonl"
    for step in (0, 3, 6):
        _append(path, step, [{"step": step, "response": "\u2028"}])
    _append(path, 3, [{"step": 3, "response": "again"}])
    assert [json.loads(line)["step"] for line in path.read_text().split("\n")[:-1]] == [0, 3]
    _append(path, 0, [{"step": 0, "response": "over"}])  # a run that starts over
    assert lines_of(tmp_path) == [{"step": 0, "response": "over"}]


def test_a_negative_number_is_refused(make_config, tiny_train, tmp_path):
    config = make_config(tmp_path / "run")
    with pytest.raises(InputError, match=r"train.show_responses is -1"):
        tiny_train(replace(config, train=replace(config.train, show_responses=-1)))
