"""`qstar export`, beyond what tests/training/test_lora_runs.py has of adapters."""

import json

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
