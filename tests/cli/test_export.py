"""`qstar export`, beyond what tests/training/test_lora_runs.py has of adapters."""

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from qstar_jax.cli.main import main


def test_a_model_in_several_files_and_the_same_bytes_again(dpo_run, tmp_path, one_device_only):
    words = ["export", "--model", str(dpo_run), "--max_shard_size", "30KB", "--out"]
    for name in ("first", "second"):
        assert main([*words, str(tmp_path / name)]) == 0
    assert main([*words[:3], "--out", str(tmp_path / "whole")]) == 0
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("first", "second"))
    assert first == second
    weight_map = json.loads(first["model.safetensors.index.json"])["weight_map"]
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert weight_map.keys() == whole.keys() and set(weight_map.values()) == {n for n in first if "-of-" in n}
    for name, file in weight_map.items():
        np.testing.assert_array_equal(load_file(tmp_path / "first" / file)[name], whole[name])
    assert main([*words, str(tmp_path / "first")]) == 2


@pytest.mark.parametrize(
    "left", ["model-00001-of-00003.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"]
)
def test_files_of_an_export_that_was_interrupted_are_not_mixed_in(left, hf_folder, tmp_path, capsys):
    (tmp_path / left).touch()
    assert main(["export", "--model", str(hf_folder), "--out", str(tmp_path)]) == 2
    assert f"holds {left} and no config.json, as an export that was interrupted leaves it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max_shard_size", "5 gigs"], "--max_shard_size is '5 gigs'; expected a positive number"),
        (["--max_shard_size", "1GB", "--part", "adapter"], "leave --max_shard_size out, or give --part model"),
        (["--dtype", "bfloat16", "--part", "adapter"], "leave --dtype out, or give --part model"),
    ],
    ids=str,
)
def test_options_that_would_do_nothing_are_refused(words, message, hf_folder, tmp_path, capsys):
    assert main(["export", "--model", str(hf_folder), "--out", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["sft", "dpo"])
def test_training_may_end_with_an_export(verb, tmp_path, hf_folder, train_file, on_devices, capsys):
    words = [verb, "--model", str(hf_folder), "--out", str(tmp_path / "run"), "--data.train", str(train_file)]
    words += ["--train.steps", "1", "--train.batch_size", "8", "--train.reference_samples", "0"]
    words += ["--export", str(tmp_path / "exported")]
    with on_devices(1):
        assert main(words) == 0
    assert main(["export", "--model", str(tmp_path / "run"), "--out", str(tmp_path / "later")]) == 0
    for name in ("model.safetensors", "config.json", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "exported" / name).read_bytes() == (tmp_path / "later" / name).read_bytes()
    # A folder that is not free is refused before anything is trained.
    words[words.index(str(tmp_path / "run"))] = str(tmp_path / "other")
    assert main(words) == 2
    assert "already holds a model" in capsys.readouterr().err and not (tmp_path / "other").exists()


TASK = """
task: pairs
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: "{{[chosen, rejected]}}"
doc_to_target: 0
metric_list: [{metric: acc}]
"""


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed (extra `parity`)")
def test_lm_evaluation_harness_reads_an_export(dpo_run, eval_file, tmp_path, one_device_only):
    """Its log-likelihoods of both responses to each prompt are the sums of ours, without EOS, which it does not add."""
    exported, task, results, scores = (tmp_path / name for name in ("exported", "task", "results", "scores"))
    assert main(["export", "--model", str(dpo_run), "--out", str(exported)]) == 0
    task.mkdir()
    (task / "pairs.yaml").write_text(TASK.replace("DATA", str(eval_file)))
    words = ["--model", "hf", "--model_args", f"pretrained={exported},dtype=float32", "--device", "cpu"]
    words += ["--tasks", "pairs", "--include_path", task, "--batch_size", "4"]
    words += ["--log_samples", "--output_path", results]
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-m", "lm_eval", *words], env=offline, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (samples,) = results.rglob("samples_pairs_*.jsonl")
    theirs = {}
    for sample in map(json.loads, samples.read_text().splitlines()):
        theirs[sample["doc_id"]] = [float(logp) for logp, _ in sample["filtered_resps"]]
    words = ["--model", dpo_run, "--data.eval", eval_file, "--out", scores, "--alternatives", "0", "--show", "0"]
    assert main(["score", *map(str, words)]) == 0
    ours = {}
    for record in map(json.loads, (scores / "scores.jsonl").read_text().splitlines()):
        ours.setdefault(record["row"], {})[record["role"]] = sum(record["logp"][:-1])
    assert len(theirs) == len(ours) == 11
    for row, logps in theirs.items():
        np.testing.assert_allclose([ours[row]["chosen"], ours[row]["rejected"]], logps, rtol=1e-5, atol=1e-5)
    (result,) = (json.loads(path.read_text())["results"]["pairs"] for path in results.rglob("results_*.json"))
    assert result["acc,none"] == pytest.approx(np.mean([logp["chosen"] > logp["rejected"] for logp in ours.values()]))
