"""PEFT's file format, in and out."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qstar_jax import hub
from qstar_jax.config import ComputeOptions, MeshOptions
from qstar_jax.errors import InputError
from qstar_jax.loading import load_model, param_shardings
from qstar_jax.models.lora import attach_adapter, split_adapter


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model.with_lora(3, 12.0, ["q_proj", "down_proj"])


@pytest.fixture(scope="module")
def adapter(model):
    fresh = jax.jit(model.init_adapter)(jax.random.key(1))
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(2), x.shape), fresh)


@pytest.fixture
def folder(model, adapter, hf_folder, tmp_path):
    hub.write_adapter(tmp_path / "deep" / "adapter", model, adapter, str(hf_folder))
    return tmp_path / "deep" / "adapter"


def read(folder, tiny_model, mesh):
    model = replace(tiny_model, lora=hub.read_lora(folder, tiny_model))
    return model, hub.read_adapter(folder, model, split_adapter(param_shardings(model, mesh, MeshOptions()))[1])


def test_what_is_written_is_read_back(folder, model, adapter, tiny_model, one_device):
    again, found = read(folder, tiny_model, one_device)
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, found, adapter)


def test_names_and_shapes_are_those_of_peft(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.1."
    assert tensors[prefix + "self_attn.q_proj.lora_A.weight"].shape == (3, 32)
    assert tensors[prefix + "mlp.down_proj.lora_B.weight"].shape == (32, 3)
    assert len(tensors) == 2 * 2 * 2


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_computes_the_same(rslora, model, adapter, folder, hf_folder, tiny_params):
    """Out: PEFT with torch reads our file and has our logits."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    if rslora:
        model = replace(model, lora=replace(model.lora, rank_stabilised=True))
        hub.write_adapter(folder, model, adapter, str(hf_folder))
    tokens = np.random.default_rng(0).integers(3, 60, (2, 9))
    plain = AutoModelForCausalLM.from_pretrained(hf_folder, dtype=torch.float32)
    with torch.no_grad():
        expected = peft.PeftModel.from_pretrained(plain, folder)(torch.from_numpy(tokens)).logits.numpy()
    found = model.logits(attach_adapter(tiny_params, adapter), jnp.asarray(tokens))
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_file_of_peft_is_opened_as_a_model(hf_folder, tmp_path, one_device, adapter):
    """In: a folder that PEFT has written; merged, the logits are PEFT's."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(hf_folder, dtype=torch.float32)
    options = peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights=False)
    theirs = peft.get_peft_model(plain, options)
    theirs.save_pretrained(tmp_path)
    tokens = np.random.default_rng(0).integers(3, 60, (2, 9))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    loaded = load_model(tmp_path, ComputeOptions(), one_device, MeshOptions())
    assert loaded.model.lora is None and loaded.tokenizer.eos_token_id == 2
    np.testing.assert_allclose(loaded.model.logits(loaded.params, jnp.asarray(tokens)), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, r"peft_type is 'IA3'; .*'LORA' only"),
        ({"use_dora": True}, r"use_dora is True"),
        ({"bias": "all"}, r"bias is 'all'"),
        ({"rank_pattern": {"q_proj": 2}}, r"rank_pattern is"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is"),
        ({"target_modules": ["c_attn"]}, r"some of q_proj, .*found: 'c_attn'"),
        ({"r": 5}, r"lora_A\.weight: shape \(3, 32\); expected shape \(5, 32\)"),
        ({"target_modules": ["q_proj", "k_proj"]}, r"k_proj\.lora_A\.weight: no such tensor"),
        ({"target_modules": "q_proj"}, r"holds 4 tensors that adapter_config\.json does not speak of"),
    ],
    ids=str,
)
def test_what_is_not_built_is_refused_by_name(change, message, folder, tiny_model, one_device):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message):
        read(folder, tiny_model, one_device)


def test_missing_keys_and_bases(folder, tiny_model, one_device):
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(InputError, match=r"base_model_name_or_path is None"):
        load_model(folder, ComputeOptions(), one_device, MeshOptions())
    del config["r"]
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"no key 'r'"):
        hub.read_lora(folder, tiny_model)


def test_pickles_and_broken_files(folder, tiny_model, one_device):
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:40])
    with pytest.raises(InputError, match=r"not a readable safetensors file"):
        read(folder, tiny_model, one_device)
    weights.unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(InputError, match=r"no adapter_model\.safetensors; adapter_model\.bin is a pickle"):
        read(folder, tiny_model, one_device)


def test_half_precision_files_are_read(folder, adapter, tiny_model, one_device):
    path = folder / "adapter_model.safetensors"
    save_file({name: x.astype(np.float16) for name, x in load_file(path).items()}, path)
    _, found = read(folder, tiny_model, one_device)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), found, adapter)
