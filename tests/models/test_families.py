"""Keys of config.json and tensors: read, known to change nothing, or refused by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qstar_jax.errors import InputError
from qstar_jax.models import CausalLM
from qstar_jax.store import hub


@pytest.fixture
def written(family, families, tiny_tokenizer, tmp_path):
    """A folder of a family, all of whose numbers are 1."""
    model = CausalLM.from_hf(families.FAMILIES[family].config)
    params = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), model.abstract_params())
    hub.write_folder(tmp_path, model, params, tiny_tokenizer, "float32")
    return tmp_path


ONE_EACH = {tiny: None for tiny in ("llama_biases", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3")} | {
    tiny: None for tiny in ("olmo2", "smollm3", "gpt_neox", "gpt2", "mistral")
}


@pytest.mark.parametrize("family", ONE_EACH)
def test_tensors_that_are_missing_or_have_no_place_are_named(family, written, read_family):
    path = written / "model.safetensors"
    tensors = load_file(path)
    for missing in [name for name in tensors if ".0." in name or ".2." not in name][::3]:
        save_file({name: value for name, value in tensors.items() if name != missing}, path)
        with pytest.raises(InputError, match=f"no tensor '{missing}'"):
            read_family(written)
    for name in tensors:
        added = name.replace(".0.", ".7.") if ".0." in name else name.removesuffix("weight") + "scale"
        if name.endswith("weight") and added != name:
            save_file(tensors | {added: np.ones(3, np.float32)}, path)
            with pytest.raises(InputError, match=f"hold '{added}'.*does not use"):
                read_family(written)


QUANTISED = {"quantization_config": {"quant_method": "gptq", "bits": 4}}


@pytest.mark.parametrize("family", ONE_EACH)
def test_quantized_folders_and_unknown_keys_are_refused(family, families):
    config = families.FAMILIES[family].config
    with pytest.raises(InputError, match=r"method 'gptq'.*quantized.*dequantize"):
        CausalLM.from_hf(config | QUANTISED)
    with pytest.raises(InputError, match=rf"attention_sink_scale is 2\.0, .*model_type '{config['model_type']}'"):
        CausalLM.from_hf(config | {"attention_sink_scale": 2.0})


@pytest.mark.parametrize("family", [name for name in ONE_EACH if name != "gpt2"])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_unknown_kinds_of_scaling_are_refused(key, family, families):
    dynamic = {"rope_type": "dynamic", "factor": 2.0}
    if family == "gemma3" and key == "rope_parameters":
        dynamic = {"full_attention": dynamic}
    with pytest.raises(InputError, match="scaling of type 'dynamic'; expected default, linear, llama3"):
        CausalLM.from_hf(families.FAMILIES[family].config | {key: dynamic})


EXPERTS = {
    "mixtral": {"num_local_experts": 8},
    "qwen3_moe": {"num_experts": 128},
    "qwen2_moe": {"num_experts": 60},
    "gpt_oss": {"num_local_experts": 32},
    "deepseek_v3": {"n_routed_experts": 256},
    "olmoe": {"num_experts": 64},
}


@pytest.mark.parametrize("model_type", EXPERTS)
def test_mixtures_of_experts_are_refused(model_type):
    (experts,) = EXPERTS[model_type].items()
    with pytest.raises(InputError, match=rf"'{model_type}'.*mixture of experts.*{experts[0]} {experts[1]}.*known: gem"):
        CausalLM.from_hf({"model_type": model_type} | EXPERTS[model_type])


SLIDES, FULL = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is False"),
        ("gpt2", {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn is True"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True"),
        ("gpt2", {"n_head": 5}, "5 n_head do not divide n_embd 32"),
        ("gpt2", {"n_embd": None}, "no key 'n_embd'"),
        ("gpt_neox", {"rotary_pct": 0.3}, r"3 of 12 dimensions of a head are rotated.*expected an even number"),
        ("gpt_neox", {"rotary_pct": 1.5}, r"partial_rotary_factor is 1\.5; expected at most 1"),
        ("gpt_neox", {"rotary_emb_base": 10, "rope_theta": 20}, "rotary_emb_base 10, rope_theta 20 differ"),
        ("gpt_neox", {"use_parallel_residual": "yes"}, "use_parallel_residual is 'yes'; expected true or false"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        (
            "gemma",
            {"hidden_activation": "gelu", "hidden_act": "silu"},
            "hidden_activation 'gelu' and hidden_act 'silu'",
        ),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("gemma2", {"layer_types": [SLIDES, FULL]}, r"layer_types is .*expected 3 \(num_hidden_layers\)"),
        ("gemma2", {"sliding_window": None}, "layer_types has sliding_attention, but"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping is 50\.0"),
        ("gemma3", {"layer_types": [SLIDES, "chunked_attention"] * 2}, "chunked_attention.*expected 4"),
        ("gemma3", {"rope_parameters": {"rope_type": "default"}}, "rope_parameters is .*expected an object with"),
        (
            "gemma3",
            {"rope_parameters": {FULL: {"rope_theta": 5.0}}},
            r"rope_theta is 700\.0 and differs from",
        ),
        ("gemma3_images", {"text_config": None}, "text_config is None; expected the configuration of"),
        ("gemma3_images", {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, "keep one"),
        ("qwen2_window", {"layer_types": [FULL]}, "layer_types is"),
        (
            "qwen2",
            {"layer_types": [FULL, SLIDES, FULL]},
            "layer_types has sliding_attention, but",
        ),
        ("qwen3", {"attention_bias": 1}, "attention_bias is 1; expected true or false"),
        ("mistral", {"sliding_window": 0}, "sliding_window is 0; expected a whole number"),
        ("mistral", {"layer_types": [SLIDES] * 3}, "layer_types is"),
        ("phi3_short", {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 3}}, "has no long_factor"),
        (
            "phi3_short",
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0] * 3}},
            "short_factor of longrope has 4 numbers; expected 3",
        ),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers is .*each of 4 layers"),
        ("smollm3", {"no_rope_layers": [1, 2, 1, 0]}, "no_rope_layers is"),
        ("olmo2", {"clip_qkv": 8.0}, r"clip_qkv is 8\.0"),
        ("llama_yarn", {"rope_scaling": {"rope_type": "yarn", "factor": "4"}}, "factor is '4'; expected a number"),
        ("llama", {"hidden_act": "laplace"}, "hidden_act is 'laplace'"),
        ("llama", {"rms_norm_eps": float("inf")}, "rms_norm_eps is inf; expected a number above 0"),
        ("llama", {"model_type": ["llama"]}, r"unknown architecture, model_type \['llama'\]"),
        ("llama3_tied", {"original_max_position_embeddings": 7}, "original_max_position_embeddings is 7, but"),
        ("qwen2_window", {"max_window_layers": "2"}, "max_window_layers is '2'; expected a whole number of at least 0"),
        ("qwen2_window", {"layer_types": [[FULL]] * 4}, "layer_types is"),
        ("smollm3", {"no_rope_layers": [[1]] * 4}, "no_rope_layers is"),
        ("gemma3_images", {"text_config": {"model_type": "gemma2"}}, "expected the configuration of a gemma3_text"),
    ],
)
def test_what_is_not_built_is_refused_by_name(family, changes, named, families):
    with pytest.raises(InputError, match=named):
        CausalLM.from_hf(families.FAMILIES[family].config | changes)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "mamba", "architectures": ["MambaLM"]}, r"model_type 'mamba'.*MambaLM.*known: .*llama"),
        ({"model_type": None}, r"model_type None"),
        ({"hidden_act": "mish"}, "hidden_act is 'mish'; supported are silu"),
        ({"rope_scaling": {"rope_type": "ntk", "factor": 2.0}}, "'ntk'; expected default, linear, llama3, yarn"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "'dynamic'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {k: v for k, v in LLAMA3.items() if k != "high_freq_factor"}}, "has no high_freq_factor"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0, "mscale": 0.7}},
            r"has mscale 0\.7, which is not",
        ),
        ({"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, r"partial_rotary_factor is 0\.5"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            r"rope_theta .*500000\.0, rope_theta 10000\.0",
        ),
        ({"rope_parameters": {"rope_type": "default"}, "rope_scaling": LLAMA3}, "rope_parameters .* differ"),
        ({"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "differ"),
        ({"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"rope_theta": "10000"}, "rope_theta is '10000'; expected a number above 0"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'; expected a number above 0"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; expected true or false"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; expected an object"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "method 'gptq'.*quantized.*dequantize"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}, "auto_map names the model's own code"),
        ({"sliding_window": 4096}, "sliding_window is 4096, an unknown key"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is"),
        ({"final_logit_softcapping": 30.0}, r"final_logit_softcapping is 30\.0"),
        ({"embedding_multiplier": 12.0}, r"embedding_multiplier is 12\.0"),
        ({"rope_interleaved": True}, "rope_interleaved is True"),
        ({"num_key_value_heads": 3}, "3 num_key_value_heads do not divide 4"),
        ({"hidden_size": 30}, "4 num_attention_heads do not divide hidden_size 30"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2'; expected a whole number"),
    ],
)
def test_what_no_llama_has_is_refused_by_name(changes, named, tiny_config):
    with pytest.raises(InputError, match=named):
        CausalLM.from_hf(tiny_config | changes)


def test_keys_that_change_nothing_are_passed_over(tiny_config, tiny_model):
    harmless = {
        "_name_or_path": "x/y",
        "transformers_version": "5.1",
        "torch_dtype": "bfloat16",
        "attention_dropout": 0.1,
        "eos_token_id": [1, 2],
        "sliding_window": None,
        "use_sliding_window": False,
        "rope_scaling": None,
        "hidden_act": "swish",
        "auto_map": {"AutoTokenizer": ["x.Y", None]},
    }
    assert CausalLM.from_hf(tiny_config | harmless) == tiny_model


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_attention_heads", "num_hidden_layers"])
def test_missing_keys_are_named(key, tiny_config):
    with pytest.raises(InputError, match=f"no key '{key}'"):
        CausalLM.from_hf({name: value for name, value in tiny_config.items() if name != key})


def test_both_places_of_theta_are_read(tiny_config):
    old = tiny_config | {"rope_theta": 500.0}
    new = {k: v for k, v in tiny_config.items() if k != "rope_theta"}
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 500.0}
    assert CausalLM.from_hf(old) == CausalLM.from_hf(new)
    assert [rope.theta for rope in CausalLM.from_hf(new).config.ropes] == [500.0]
