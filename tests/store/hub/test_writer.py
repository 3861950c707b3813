import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from qstar_jax.config import MeshOptions
from qstar_jax.errors import InputError
from qstar_jax.models import CausalLM
from qstar_jax.sharding import make_mesh
from qstar_jax.store import hub
from qstar_jax.store.hub.shards import INDEX
from qstar_jax.store.open import param_shardings

EIGHT = MeshOptions(data=1, fsdp=4, tensor=2, min_shard_size=1)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_written_is_read_back(tied, dtype, tiny_config, tiny_tokenizer, tmp_path, one_device):
    model = CausalLM.from_hf(tiny_config | {"tie_word_embeddings": tied})
    params = jax.jit(model.init)(jax.random.key(3))
    folder = tmp_path / "deep" / "folder"
    hub.write_folder(folder, model, params, tiny_tokenizer, dtype)
    again = CausalLM.from_hf(hub.read_config(folder))
    assert again == model
    actual = hub.read_params(folder, again, param_shardings(again, one_device, MeshOptions()))
    expected = jax.tree.map(lambda x: x.astype(dtype).astype("float32"), params)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_files_of_a_size_are_read_back(tiny_model, tiny_params, tiny_tokenizer, tmp_path, one_device, hf_folder):
    """Whatever the devices, and the same bytes each time."""
    spread = jax.device_put(tiny_params, param_shardings(tiny_model, make_mesh(EIGHT), EIGHT))
    assert len(spread["layers"]["mlp"]["up"]["kernel"].sharding.device_set) == 8
    contents = []
    for name, params in (("one", tiny_params), ("two", spread)):
        hub.write_folder(tmp_path / name, tiny_model, params, tiny_tokenizer, "float32", max_shard_size="20KB")
        contents.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert contents[0] == contents[1]
    actual = hub.read_params(tmp_path / "one", tiny_model, param_shardings(tiny_model, one_device, MeshOptions()))
    jax.tree.map(np.testing.assert_array_equal, actual, tiny_params)
    shards = [load_file(path) for path in sorted((tmp_path / "one").glob("*.safetensors"))]
    assert len(shards) == 5 and all(sum(map(np.size, shard.values())) * 4 <= 20_000 for shard in shards)
    together = {name: tensor for shard in shards for name, tensor in shard.items()}
    whole = load_file(hf_folder / "model.safetensors")
    assert together.keys() == whole.keys()
    jax.tree.map(np.testing.assert_array_equal, together, whole)


@pytest.mark.parity
@pytest.mark.parametrize("tied", [False, True])
def test_torch_reads_files_of_a_size(tied, tiny_config, tiny_tokenizer, tmp_path):
    """And the index says what that of transformers says."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = CausalLM.from_hf(tiny_config | {"tie_word_embeddings": tied})
    params = jax.jit(model.init)(jax.random.key(3))
    hub.write_folder(tmp_path / "ours", model, params, tiny_tokenizer, "float32", max_shard_size="20KB")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    ours, expected = (json.loads((tmp_path / name / INDEX).read_text()) for name in ("ours", "theirs"))
    assert ours["metadata"] == expected["metadata"] and ours["weight_map"].keys() == expected["weight_map"].keys()
    tokens = np.random.default_rng(0).integers(3, 60, (2, 9))
    with torch.no_grad():
        logits = theirs(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(jax.jit(model.logits)(params, jnp.asarray(tokens)), logits, atol=1e-5)


def test_a_folder_in_which_writing_was_interrupted_is_no_model(
    tiny_model, tiny_params, tiny_tokenizer, tmp_path, monkeypatch
):
    def fail(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr("qstar_jax.store.hub.writer.write_tokenizer", fail)
    with pytest.raises(OSError, match="full"):
        hub.write_folder(tmp_path, tiny_model, tiny_params, tiny_tokenizer, "float32")
    assert (tmp_path / "model.safetensors").exists()
    with pytest.raises(InputError, match=r"no config\.json, so this is not a Hugging Face model folder"):
        hub.read_config(tmp_path)


def test_names_types_and_ids_are_those_of_transformers(hf_folder):
    tensors = load_file(hf_folder / "model.safetensors")
    assert tensors["lm_head.weight"].shape == (60, 32)
    assert tensors["model.layers.1.self_attn.k_proj.weight"].shape == (16, 32)
    assert len(tensors) == 3 + 2 * 9
    config = json.loads((hf_folder / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 0)
    assert config["model_type"] == "llama" and config["dtype"] == "float32"


def test_tokenizer_survives(hf_folder, tiny_tokenizer):
    again = hub.read_tokenizer(hf_folder)
    assert again("w3 w55 nothing").input_ids == tiny_tokenizer("w3 w55 nothing").input_ids
    assert again.eos_token_id == 2 and again.pad_token_id == 0
