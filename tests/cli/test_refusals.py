"""What is refused leaves nothing behind, on any verb that makes a folder; a folder that was there stays."""

import json

import pytest
import yaml

from qstar_jax.cli.main import main

RIGHT = ("--right", "answer", "--samples", "2", "--max_new_tokens", "4")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    row = {"prompt": "w1 w2", "chosen": "w3 w4", "rejected": "w5", "completion": "w3\nw4", "marks": ["w5"], "first": 7}
    path.write_text("".join(json.dumps(row | {"number": i}) + "\n" for i in range(8)))
    return path


@pytest.fixture
def refused(tmp_path, capsys, one_device_only):
    """`refused(message, *words)` runs a command, which must leave no folder that was not there before."""

    def check(message, *words, out=tmp_path / "a" / "b"):
        was_there = out.exists()
        assert main([*map(str, words), "--out", str(out)]) == 2
        assert message in capsys.readouterr().err
        assert (list(out.iterdir()) == []) if was_there else not (tmp_path / "a").exists()

    return check


def scored(model):
    return "--model", model, "--reference", model, "--beta", "0.1"


def test_dpo(refused, hf_folder, rows, tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    words = ["dpo", "--model", hf_folder, "--data.train", rows, "--data.chosen", "better"]
    refused("no column 'better'", *words)
    refused("no column 'better'", *words, out=there)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train.reference_samples", "1"], "train.reference_samples is 1; expected 0"),
        (["--train.profile", "5:7", "--train.steps", "6"], "the run has 6 steps"),
    ],
)
def test_options_of_training(words, message, refused, hf_folder, rows):
    refused(message, "dpo", "--model", hf_folder, "--data.train", rows, "--train.batch_size", "8", *words)


def test_rewards_of_held_out_prompts(refused, hf_folder, rows, tmp_path):
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text('{"prompt": "w1"}\n')
    words = ["rl", "--model", hf_folder, "--data.train", rows, "--train.batch_size", "8", "--rl.max_new_tokens", "4"]
    words += ["--data.eval", held_out, "--reward.kind", "verifier", "--reward.answer", "first"]
    refused("held_out.jsonl row 1: column 'first' is missing (found: 'prompt')", *words)


def test_pipeline(refused, hf_folder, rows, tmp_path):
    stages = [
        {"name": "one", "model": str(hf_folder), "max_length": 32},
        {"name": "two", "model": str(hf_folder), "template": "{prompt} {one}", "max_length": 32},
    ]
    (tmp_path / "stages.yaml").write_text(yaml.safe_dump({"stages": stages}))
    words = ["pipeline", "--config", tmp_path / "stages.yaml", "--train.steps", "1", "--train.batch_size", "8"]
    refused("row 1: a run is 'w3 w4'", *words, "--data.train", rows)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--wrong", "oops"], "row 1: no column 'oops'"),
        (["--wrong", "number"], "row 1: found 0 as marks"),
        (["--wrong", "marks", "--kind", "sort"], "--kind sort"),
        (["--kind", "sort"], "--kind sort has no effect without --wrong"),
        (["--answers", "single", "--steps", "--wrong_step", "first"], "found step 7 of a response of 1 steps"),
        (["--answers", "single", "--steps", "--wrong_step", "number"], "found step 1 of a response of 1 steps"),
        (["--answers", "single", "--steps", "--data.step_delimiter", "column:steps"], "row 1: no column 'steps'"),
    ],
)
def test_marks(words, message, refused, hf_folder, rows):
    refused(message, "score", *scored(hf_folder), "--data.eval", rows, *words)


def test_first_errors_of_one_kind_only(refused, hf_folder, rows, tmp_path):
    right = tmp_path / "right.jsonl"
    right.write_text('{"prompt": "w1", "completion": "w2", "first": -1}\n')
    words = ["score", *scored(hf_folder), "--answers", "single", "--steps", "--wrong_step", "first"]
    refused("the calibration split has 0 responses", *words, "--data.eval", right)


def test_models_of_a_sweep(refused, hf_folder, rows):
    models = f"[{hf_folder}, {hf_folder}/no]"
    words = ["--widths", "[2]", "--judge.kind", "reward_model", "--judge.model", hf_folder]
    refused("no such path", "sweep", "--model", models, "--data.eval", rows, *words)


def test_right_answers(refused, hf_folder, rows):
    refused("column 'answer' is missing", "select", *scored(hf_folder), "--data.eval", rows, *RIGHT)


@pytest.mark.parametrize("verb", ["dpo", "report"])
@pytest.mark.parametrize(("name", "message"), [("file", "is no folder"), ("file/in/it", "is no folder"), ("", "empty")])
def test_a_folder_that_cannot_be(verb, name, message, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    out = str(tmp_path / name) if name else " "
    assert main([verb, *(["--model", "m"] if verb == "dpo" else []), "--out", out]) == 2
    assert message in capsys.readouterr().err and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("verb", "option"), [("dpo", "reference.cache"), ("dpo", "export"), ("rl", "export"), ("sweep", "judge.cache")]
)
def test_another_folder_that_cannot_be(verb, option, refused, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    model = f"[{tmp_path}]" if verb == "sweep" else tmp_path
    refused(f"--{option} {file}: {file} is no folder; name another", verb, "--model", model, f"--{option}", file)
    assert file.read_text() == "mine"


@pytest.mark.parametrize("verb", ["generate", "score", "sweep", "select", "play"])
def test_verbs_that_run_in_one_process_do_not_join_others(verb, refused, tmp_path):
    model = f"[{tmp_path}]" if verb == "sweep" else tmp_path
    words = [verb, "--model", model, "--mesh.multi_process", "true", *(["--game", "Any-v0"] if verb == "play" else [])]
    refused(f"multi_process true: {verb} runs in one process", *words)
