import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from qstar_jax import hub
from qstar_jax.config import MeshOptions
from qstar_jax.loading import param_shardings
from qstar_jax.models import CausalLM


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_written_is_read_back(tied, dtype, tiny_config, tiny_tokenizer, tmp_path, one_device):
    model = CausalLM.from_hf(tiny_config | {"tie_word_embeddings": tied})
    params = jax.jit(model.init)(jax.random.key(3))
    folder = tmp_path / "deep" / "folder"
    hub.write_folder(folder, model, params, tiny_tokenizer, dtype)
    again = CausalLM.from_hf(hub.read_config(folder))
    assert again == model
    found = hub.read_params(folder, again, param_shardings(again, one_device, MeshOptions()))
    expected = jax.tree.map(lambda x: x.astype(dtype).astype("float32"), params)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


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
