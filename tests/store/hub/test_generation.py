import json
import shutil

import pytest

from qstar_jax.cli.main import main
from qstar_jax.config import ComputeOptions, MeshOptions
from qstar_jax.decoding.eos import eos_token_ids
from qstar_jax.errors import InputError
from qstar_jax.store import hub
from qstar_jax.store.open import load_model


def test_what_ends_an_answer_is_the_same_in_folder_run_and_export(
    hf_folder, train_file, tmp_path, one_device_only, one_device
):
    folder, run, export = shutil.copytree(hf_folder, tmp_path / "model"), tmp_path / "run", tmp_path / "export"
    given = {"eos_token_id": [9, 5], "temperature": 0.6, "stop_strings": ["w3"], "_from_model_config": True}
    (folder / "generation_config.json").write_text(json.dumps(given))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": [7, 2]}))
    words = ["--data.train", str(train_file), "--train.steps", "1", "--train.batch_size", "2"]
    assert main(["sft", "--model", str(folder), "--out", str(run), *words]) == 0
    assert main(["export", "--model", str(run), "--out", str(export)]) == 0
    for source in (folder, run, export):
        loaded = load_model(source, ComputeOptions(), one_device, MeshOptions())
        assert eos_token_ids(loaded) == (2, 5, 7, 9), source
    written = json.loads((export / "generation_config.json").read_text())
    assert given | {"eos_token_id": [2, 5, 7, 9]} == {name: written[name] for name in given}
    assert json.loads((export / "config.json").read_text())["eos_token_id"] == [2, 5, 7, 9]


def test_an_adapter_takes_its_own_ends_along(hf_folder, train_file, tmp_path, one_device_only):
    folder, run, export = shutil.copytree(hf_folder, tmp_path / "model"), tmp_path / "run", tmp_path / "adapter"
    (folder / "generation_config.json").write_text('{"eos_token_id": 9, "top_k": 3}')
    words = ["--data.train", str(train_file), "--train.steps", "1", "--train.batch_size", "2", "--lora.rank", "1"]
    assert main(["sft", "--model", str(folder), "--out", str(run), *words]) == 0
    assert main(["export", "--model", str(run), "--out", str(export), "--part", "adapter"]) == 0
    assert json.loads((export / "generation_config.json").read_text()) == {"eos_token_id": [2, 9], "top_k": 3}


def test_settings_that_are_not_read_are_told():
    generation = {"_from_model_config": True, "eos_token_id": [2], "top_p": None, "do_sample": True, "top_k": 20}
    written_by_transformers = {"output_attentions": False, "output_hidden_states": False}
    assert hub.other_settings(generation | written_by_transformers) == {"do_sample": True, "top_k": 20}


@pytest.mark.parametrize("ids", ["2", [2, "5"], 1.5, True, {"a": 1}])
def test_ids_that_are_none_are_refused(ids, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    with pytest.raises(InputError, match=r"generation_config\.json: eos_token_id is .*expected a token id or a list"):
        hub.read_generation_config(tmp_path)


def test_padding_beyond_the_embedding_is_not_written(tiny_model, tiny_params, hf_folder, tmp_path):
    tokenizer = hub.read_tokenizer(hf_folder)
    tokenizer.add_special_tokens({"pad_token": "[NEW]"})
    hub.write_folder(tmp_path, tiny_model, tiny_params, tokenizer, "float32")
    for name in ("config.json", "generation_config.json"):
        actual = json.loads((tmp_path / name).read_text())
        assert actual["pad_token_id"] is None and actual["bos_token_id"] == 1
