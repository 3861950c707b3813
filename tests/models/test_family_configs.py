"""Configurations of every family, and of models on the hub: transformers' own reading of them is the oracle."""

import json

import jax
import pytest

from qstar_jax.errors import InputError
from qstar_jax.models import CausalLM
from qstar_jax.models.families import FAMILIES

LLAMA3 = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LONGROPE = {
    "long_factor": [1.0 + 0.5 * i for i in range(48)],
    "short_factor": [1.0 + 0.05 * i for i in range(48)],
    "type": "longrope",
}


def sizes(vocabulary, width, inner, layers, heads, groups, context):
    """The keys that most config.json have."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "max_position_embeddings": context,
    }


LLAMA = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "pretraining_tp": 1}
QWEN = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": True}
GEMMA = {"head_dim": 256, "rms_norm_eps": 1e-6, "attention_bias": False, "attention_dropout": 0.0}
PHI3 = {
    "model_type": "phi3",
    "architectures": ["Phi3ForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
    },
    "attention_bias": False,
    "embd_pdrop": 0.0,
    "hidden_act": "silu",
    "original_max_position_embeddings": 4096,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
NEOX = {
    "model_type": "gpt_neox",
    "bos_token_id": 0,
    "eos_token_id": 0,
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}

# config.json of models on the hub, as they are there.
HUB = {
    "Llama-3.2-1B-Instruct": LLAMA
    | sizes(128256, 2048, 8192, 16, 32, 8, 131072)
    | {
        "eos_token_id": [128001, 128008, 128009],
        "head_dim": 64,
        "mlp_bias": False,
        "rms_norm_eps": 1e-5,
        "rope_scaling": LLAMA3,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    },
    "SmolLM2-135M": LLAMA
    | sizes(49152, 576, 1536, 30, 9, 3, 8192)
    | {
        "is_llama_config": True,
        "rms_norm_eps": 1e-5,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    },
    "Falcon3-1B-Instruct": LLAMA
    | sizes(131072, 2048, 8192, 18, 8, 4, 8192)
    | {"activation": "swiglu", "head_dim": 256, "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 1000042},
    "vicuna-7b-v1.3": LLAMA
    | sizes(32000, 4096, 11008, 32, 32, 32, 2048)
    | {"max_sequence_length": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False},
    "Mistral-7B-v0.1": sizes(32000, 4096, 14336, 32, 32, 8, 32768)
    | {"model_type": "mistral", "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "sliding_window": 4096},
    "Mistral-7B-Instruct-v0.3": sizes(32768, 4096, 14336, 32, 32, 8, 32768)
    | {"model_type": "mistral", "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "sliding_window": None},
    "Mistral-Nemo-Base-2407": sizes(131072, 5120, 14336, 40, 32, 8, 128000)
    | {"model_type": "mistral", "head_dim": 128, "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "sliding_window": None},
    "Qwen2.5-0.5B-Instruct": QWEN
    | sizes(151936, 896, 4864, 24, 14, 2, 32768)
    | {"model_type": "qwen2", "max_window_layers": 21, "sliding_window": 32768, "use_sliding_window": False},
    "Qwen2.5-7B-Instruct for long texts": QWEN
    | sizes(152064, 3584, 18944, 28, 28, 4, 32768)
    | {
        "model_type": "qwen2",
        "max_window_layers": 28,
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
        "sliding_window": 131072,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
    },
    "Qwen3-0.6B": QWEN
    | sizes(151936, 1024, 3072, 28, 16, 8, 40960)
    | {
        "model_type": "qwen3",
        "attention_bias": False,
        "head_dim": 128,
        "max_window_layers": 28,
        "rope_scaling": None,
        "sliding_window": None,
        "use_sliding_window": False,
    },
    "gemma-2b": GEMMA
    | sizes(256000, 2048, 16384, 18, 8, 1, 8192)
    | {"model_type": "gemma", "hidden_act": "gelu", "rope_scaling": None, "rope_theta": 10000.0},
    "gemma-2-9b": GEMMA
    | sizes(256000, 3584, 14336, 42, 16, 8, 8192)
    | {
        "model_type": "gemma2",
        "attn_logit_softcapping": 50.0,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": 30.0,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "sliding_window_size": 4096,
    },
    "gemma-3-1b-it": GEMMA
    | sizes(262144, 1152, 6912, 26, 4, 1, 32768)
    | {
        "model_type": "gemma3_text",
        "attn_logit_softcapping": None,
        "cache_implementation": "hybrid",
        "eos_token_id": [1, 106],
        "final_logit_softcapping": None,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
    },
    "gemma-3-4b-it": {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "eos_token_id": [1, 106],
        "image_token_index": 262144,
        "initializer_range": 0.02,
        "mm_tokens_per_image": 256,
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "torch_dtype": "bfloat16",
        "vision_config": {
            "hidden_size": 1152,
            "image_size": 896,
            "intermediate_size": 4304,
            "model_type": "siglip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 27,
            "patch_size": 14,
            "vision_use_head": False,
        },
    },
    "Phi-3-mini-4k-instruct": PHI3
    | sizes(32064, 3072, 8192, 32, 32, 32, 4096)
    | {"rope_scaling": None, "sliding_window": 2047},
    "Phi-3.5-mini-instruct": PHI3
    | sizes(32064, 3072, 8192, 32, 32, 32, 131072)
    | {"rope_scaling": LONGROPE, "sliding_window": 262144},
    "Phi-4-mini-instruct": PHI3
    | sizes(200064, 3072, 8192, 32, 24, 8, 131072)
    | {
        "full_attn_mod": 1,
        "interpolate_factor": 1,
        "lm_head_bias": False,
        "mlp_bias": False,
        "partial_rotary_factor": 0.75,
        "rope_scaling": LONGROPE,
        "sliding_window": 262144,
        "tie_word_embeddings": True,
    },
    "OLMo-2-0425-1B": sizes(100352, 2048, 8192, 16, 16, 16, 4096)
    | {
        "model_type": "olmo2",
        "attention_bias": False,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 500000,
    },
    "SmolLM3-3B": sizes(128256, 2048, 11008, 36, 16, 4, 65536)
    | {
        "model_type": "smollm3",
        "attention_bias": False,
        "layer_types": ["full_attention"] * 36,
        "max_window_layers": 28,
        "mlp_bias": False,
        "no_rope_layer_interval": 4,
        "no_rope_layers": [1, 1, 1, 0] * 9,
        "pretraining_tp": 2,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 5000000.0,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
    },
    "pythia-2.8b": NEOX
    | {
        "hidden_act": "gelu",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "use_parallel_residual": True,
        "vocab_size": 50304,
    },
    "gpt-neox-20b": NEOX
    | {
        "attention_probs_dropout_prob": 0,
        "hidden_act": "gelu_fast",
        "hidden_dropout_prob": 0,
        "hidden_size": 6144,
        "intermediate_size": 24576,
        "num_attention_heads": 64,
        "num_hidden_layers": 44,
        "vocab_size": 50432,
    },
    "gpt2-medium": {
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "attn_pdrop": 0.1,
        "bos_token_id": 50256,
        "embd_pdrop": 0.1,
        "eos_token_id": 50256,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-5,
        "n_ctx": 1024,
        "n_embd": 1024,
        "n_head": 16,
        "n_layer": 24,
        "n_positions": 1024,
        "n_special": 0,
        "output_past": True,
        "predict_special_tokens": True,
        "resid_pdrop": 0.1,
        "summary_activation": None,
        "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True,
        "summary_type": "cls_index",
        "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        "vocab_size": 50257,
    },
}


def as_transformers_writes(config):
    """The config.json that transformers writes of what it reads."""
    from transformers import AutoConfig

    return json.loads(AutoConfig.for_model(**json.loads(json.dumps(config))).to_json_string())


def shape_of(config):
    return CausalLM.from_hf(config).config


def test_older_keys_say_what_newer_ones_do(family, families):
    config = families.FAMILIES[family].config
    assert shape_of(config) == shape_of(as_transformers_writes(config))


@pytest.mark.parametrize("name", HUB)
def test_models_of_the_hub_are_read_as_by_transformers(name):
    assert shape_of(HUB[name]) == shape_of(as_transformers_writes(HUB[name]))


def test_the_first_name_of_longrope_is_known():
    config = HUB["Phi-3.5-mini-instruct"]
    assert shape_of(config | {"rope_scaling": LONGROPE | {"type": "su"}}) == shape_of(config)


def agreed(config):
    """Whether we and transformers read the same; what either refuses is not misread."""
    try:
        theirs = as_transformers_writes(config)
    except Exception:  # of whichever of its checks
        return True
    try:
        return shape_of(config) == shape_of(theirs)
    except InputError:
        return True


@pytest.mark.parametrize("absent", [True, False], ids=["absent", "null"])
def test_a_key_that_says_nothing_means_what_it_means_to_transformers(absent, family, families):
    config = families.FAMILIES[family].config
    inner = config.get("text_config", config)
    cases = {}
    for key in inner.keys() - {"model_type", "hidden_size", "num_hidden_layers"}:
        changed = {name: value for name, value in inner.items() if name != key} | ({} if absent else {key: None})
        cases[key] = config | {"text_config": changed} if "text_config" in config else changed
    assert not [key for key, changed in cases.items() if not agreed(changed)]


SMALLEST = {"hidden_size": 512, "intermediate_size": 64, "num_attention_heads": 32, "num_hidden_layers": 6}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_defaults_are_those_of_transformers(model_type):
    smallest = {"n_embd": 512, "n_head": 32, "n_layer": 6} if model_type == "gpt2" else SMALLEST
    config = smallest | {"model_type": model_type, "vocab_size": 64}
    assert shape_of(config) == shape_of(as_transformers_writes(config))


@pytest.mark.parametrize("name", HUB)
def test_what_is_written_of_them_is_read_back(name):
    model = CausalLM.from_hf(HUB[name])
    assert shape_of(model.to_hf()) == model.config == shape_of(as_transformers_writes(model.to_hf()))


def test_config_survives_writing_and_reading(family, families):
    model = CausalLM.from_hf(families.FAMILIES[family].config)
    assert shape_of(model.to_hf()) == model.config == shape_of(as_transformers_writes(model.to_hf()))


def test_every_parameter_has_its_tensor(family, families):
    model = CausalLM.from_hf(families.FAMILIES[family].config)
    paths = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(model.abstract_params())
    }
    assert paths == set(model.tensors)
