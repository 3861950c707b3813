"""PEFT's file format, in and out."""

import copy
import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qstar_jax.config import ComputeOptions, MeshOptions
from qstar_jax.data import patterns
from qstar_jax.decoding.eos import eos_token_ids
from qstar_jax.errors import InputError
from qstar_jax.models.lora import attach_adapter, merge_adapter
from qstar_jax.sharding import make_mesh
from qstar_jax.store import hub
from qstar_jax.store.open import load_model, param_shardings


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


def read(folder, model):
    """What becomes of the weights of a model."""
    return hub.read_edits(folder, hub.read_adapter_config(folder), model)


def product(edits, module):
    """What an adapter adds to a weight, as it lies here."""
    return np.float64(edits[module].right.T) @ edits[module].left.T


def test_what_is_written_is_read_back(folder, model, adapter, tiny_model):
    again, edits = read(folder, tiny_model)
    assert again == tiny_model and len(edits) == 4
    for layer in range(2):
        for path, module in (("attention", "self_attn.q_proj"), ("mlp", "mlp.down_proj")):
            lora = adapter["layers"][path][module.split(".")[1].removesuffix("_proj")]["lora"]
            expected = model.lora.scale * np.float64(lora["lora_a"][layer]) @ np.float64(lora["lora_b"][layer])
            np.testing.assert_allclose(product(edits, f"model.layers.{layer}.{module}"), expected, atol=1e-6)


def test_what_is_written_is_merged_as_it_was_trained(folder, model, adapter, tiny_params, one_device):
    loaded = load_model(folder, ComputeOptions(), one_device, MeshOptions())
    expected = merge_adapter(attach_adapter(tiny_params, adapter), model.lora)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), loaded.params, expected)


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
    actual = model.logits(attach_adapter(tiny_params, adapter), jnp.asarray(tokens))
    np.testing.assert_allclose(actual, expected, atol=1e-4)


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
        ({"peft_type": "IA3"}, r"peft_type is 'IA3'; only 'LORA'"),
        ({"peft_type": "PROMPT_TUNING"}, r"peft_type is 'PROMPT_TUNING'"),
        ({"task_type": "SEQ_CLS"}, r"task_type is 'SEQ_CLS'"),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights is 'pissa', which changed the weights of the base"),
        ({"init_lora_weights": "pissa_niter_16"}, r"init_lora_weights is 'pissa_niter_16', which changed"),
        ({"init_lora_weights": "olora"}, r"path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "corda"}, r"init_lora_weights is 'corda'"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, r"init_lora_weights is 'loftq'"),
        ({"init_lora_weights": "lora_ga"}, r"init_lora_weights is 'lora_ga'"),
        ({"init_lora_weights": "new"}, r"init_lora_weights is 'new'; expected one of true, false, "),
        ({"use_qalora": True}, r"use_qalora is True, which is not supported"),
        ({"lora_bias": True}, r"lora_bias is True"),
        ({"layer_replication": [[0, 2], [1, 2]]}, r"layer_replication is"),
        ({"target_parameters": ["q_proj.weight"]}, r"target_parameters is"),
        ({"alora_invocation_tokens": [5]}, r"alora_invocation_tokens is \[5\]"),
        ({"use_bdlora": {"nblocks": 2}}, r"use_bdlora is"),
        ({"a_key_of_tomorrow": 1}, r"a_key_of_tomorrow is 1, .*merge_and_unload"),
        ({"bias": "some"}, r"bias is 'some'; expected none, all or lora_only"),
        ({"use_dora": True}, r"q_proj\.lora_magnitude_vector: no such tensor; expected shape \(32,\)"),
        ({"use_dora": "yes"}, r"use_dora is 'yes'; expected true or false"),
        ({"rank_pattern": {"q_proj": 2}}, r"q_proj\.lora_A\.weight: shape \(3, 32\); expected shape \(2, 32\)"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern is .*whole numbers of at least 1"),
        ({"alpha_pattern": {"q_proj": "2"}}, r"alpha_pattern is .*numbers"),
        ({"alpha_pattern": {"q_proj(": 2}}, r"q_proj\(.*: no regular expression"),
        ({"alpha_pattern": {"((a{999}){999}){999}": 2}}, r"997,002,999 repeats in all; expected at most 1,000,000"),
        ({"alpha_pattern": {"(" * 4000 + ")" * 4000: 2}}, r"nested too deeply"),
        ({"lora_alpha": None}, r"lora_alpha is None; expected a number"),
        ({"r": 0}, r"r is 0; expected a whole number of at least 1"),
        ({"modules_to_save": ["lm_head"]}, r"no lm_head\.weight, which modules_to_save selects"),
        ({"trainable_token_indices": [3]}, r"embed_tokens\.token_adapter\.trainable_tokens_delta: no such tensor"),
        ({"trainable_token_indices": [60]}, r"trainable_token_indices has 60; the base has 60 tokens"),
        ({"trainable_token_indices": {"wte": [3]}}, r"trainable_token_indices names 'wte'"),
        ({"layers_to_transform": [0]}, r"holds 4 tensors that adapter_config\.json does not mention"),
        ({"layers_to_transform": "0"}, r"layers_to_transform is '0'; expected whole numbers"),
        ({"layers_pattern": "layers"}, r"layers_pattern \['layers'\] without layers_to_transform"),
        ({"exclude_modules": ["q_proj"]}, r"holds 4 tensors that adapter_config\.json does not mention"),
        ({"target_modules": ["c_attn"]}, r"among q_proj, .*found: 'c_attn'"),
        ({"target_modules": None}, r"found: none at all"),
        ({"target_modules": "q_proj"}, r"among q_proj, .*found: 'q_proj'"),  # PEFT: an expression over whole names
        ({"r": 5}, r"lora_A\.weight: shape \(3, 32\); expected shape \(5, 32\)"),
        ({"target_modules": ["q_proj", "k_proj"]}, r"k_proj\.lora_A\.weight: no such tensor"),
        ({"target_modules": ".*q_proj"}, r"holds 4 tensors that adapter_config\.json does not mention"),
    ],
    ids=str,
)
def test_what_is_not_built_is_refused_by_name(change, message, folder, tiny_model):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message):
        read(folder, tiny_model)


@pytest.mark.parametrize(
    "change",
    [
        {"rank_pattern": {r"((\w|\w\w|\.)*)*\d{4}": 3}},
        {"alpha_pattern": {r"((\w|\w\w|\.)*)*\d{4}": 3}},
        {"target_modules": r"((\w|\w\w|\.)*)*\d{4}"},
        {"exclude_modules": r"((\w|\w\w|\.)*)*\d{4}"},
    ],
    ids=str,
)
def test_an_expression_without_an_end_is_refused(change, folder, tiny_model, monkeypatch):
    monkeypatch.setattr(patterns, "MAX_SECONDS", 0.05)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=r"adapter_config\.json: .*: still searching after 0\.05 s in a text of"):
        read(folder, tiny_model)


def test_missing_keys_and_bases(folder, tiny_model, one_device):
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(InputError, match=r"base_model_name_or_path is None"):
        load_model(folder, ComputeOptions(), one_device, MeshOptions())
    path.write_text(json.dumps(config | {"base_model_name_or_path": "./gone"}))
    with pytest.raises(InputError, match=r"adapter_config\.json: base_model_name_or_path: .*'\./gone'"):
        load_model(folder, ComputeOptions(), one_device, MeshOptions())
    del config["r"]
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"no key 'r'"):
        read(folder, tiny_model)


def test_adapters_that_are_each_others_base(folder, tmp_path, one_device):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    for one, base in ((folder, other), (other, folder)):
        config = json.loads((one / "adapter_config.json").read_text())
        (one / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    with pytest.raises(InputError, match=r"base_model_name_or_path leads back to"):
        load_model(folder, ComputeOptions(), one_device, MeshOptions())


def test_an_adapter_of_an_adapter_and_one_in_the_folder_of_its_base(
    folder, model, adapter, tiny_params, hf_folder, tmp_path, one_device
):
    once = merge_adapter(attach_adapter(tiny_params, adapter), model.lora)
    twice = merge_adapter(attach_adapter(once, adapter), model.lora)
    hub.write_adapter(tmp_path / "second", model, adapter, str(folder))
    shutil.copytree(hf_folder, tmp_path / "both")
    hub.write_adapter(tmp_path / "both", model, adapter, str(tmp_path / "both"))
    for name, expected in (("second", twice), ("both", once)):
        actual = load_model(tmp_path / name, ComputeOptions(), one_device, MeshOptions()).params
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), actual, expected)


def test_pickles_and_broken_files(folder, tiny_model):
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:40])
    with pytest.raises(InputError, match=r"not a readable safetensors file"):
        read(folder, tiny_model)
    weights.unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(InputError, match=r"no adapter_model\.safetensors; adapter_model\.bin is a pickle"):
        read(folder, tiny_model)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_files_are_read(dtype, folder, tiny_model):
    _, expected = read(folder, tiny_model)
    path = folder / "adapter_model.safetensors"
    save_file({name: x.astype(jnp.dtype(dtype)) for name, x in load_file(path).items()}, path)
    _, actual = read(folder, tiny_model)
    for module in expected:
        np.testing.assert_allclose(product(actual, module), product(expected, module), atol=0.1, rtol=0.02)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("self_attn.q_proj.lora_A.weight", np.zeros((3, 32), np.int8), r"lora_A\.weight has numbers of type I8"),
        ("self_attn.q_proj.bias", np.zeros(32, np.float32), r"holds 1 tensors .*q_proj\.bias; the base has no biases"),
        ("self_attn.q_proj.lora_B.bias", np.zeros(32, np.float32), r"holds 1 tensors .*lora_B\.bias"),
    ],
)
def test_tensors_that_have_no_place(name, value, message, folder, tiny_model):
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path) | {f"base_model.model.model.layers.0.{name}": value}, path)
    with pytest.raises(InputError, match=message):
        read(folder, tiny_model)


def test_merging_on_many_devices_in_bfloat16(folder, model, adapter, tiny_params):
    mesh = make_mesh(MeshOptions(data=2, fsdp=2, tensor=2))
    options = MeshOptions(data=2, fsdp=2, tensor=2, min_shard_size=1)
    loaded = load_model(folder, ComputeOptions(param_dtype="bfloat16"), mesh, options)
    shardings = param_shardings(loaded.model, mesh, options)
    assert all(jax.tree.leaves(jax.tree.map(lambda x, s: x.sharding == s, loaded.params, shardings)))
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny_params)
    expected = merge_adapter(attach_adapter(base, adapter), model.lora)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(*map(np.float32, (a, b)), rtol=1e-2), loaded.params, expected)


def test_what_lies_beside_an_adapter_goes_before_what_its_base_has(folder, hf_folder, tiny_tokenizer, one_device):
    """Tokenizer, chat template and generation_config.json of the folder; the base's where it has none."""

    def load():
        return load_model(folder, ComputeOptions(), one_device, MeshOptions())

    before = load()
    assert before.tokenizer.eos_token == "[EOS]" and before.tokenizer.chat_template is None
    assert eos_token_ids(before) == (2,)
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }} w1")
    with_template = load().tokenizer
    assert with_template.apply_chat_template([{"content": "w5"}], tokenize=False) == "w5 w1"
    assert with_template.eos_token == "[EOS]"
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 7], "temperature": 0.5}')
    assert eos_token_ids(load()) == (2, 5, 7) and load().generation["temperature"] == 0.5
    own = copy.deepcopy(tiny_tokenizer)
    own.eos_token = "w9"
    own.save_pretrained(folder)
    assert load().tokenizer.eos_token == "w9"
    assert eos_token_ids(load()) == (5, 7, own.convert_tokens_to_ids("w9"))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"holds only a part of a tokenizer \(tokenizer_config\.json\)"):
        load()
