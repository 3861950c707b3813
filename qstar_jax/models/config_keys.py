"""Keys of config.json: those that a family does not read must be known to change no logit, or they are refused.

A key that is passed over may be a window, a scale or a quantisation, and the model would speak fluently with wrong
numbers. So there is no list of what is refused: there is one of what is harmless.
"""

from collections.abc import Collection, Mapping
from typing import Any

from qstar_jax.errors import InputError

# What transformers writes into any config.json and no logit depends on. Dropout is off here, as in TRL's trainers.
HARMLESS = frozenset(
    """
    architectures model_type name_or_path transformers_version torch_dtype dtype use_cache use_return_dict return_dict
    return_dict_in_generate output_attentions output_hidden_states output_scores torchscript use_bfloat16
    initializer_range pretraining_tp attention_dropout hidden_dropout embd_pdrop resid_pdrop attn_pdrop
    bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id cls_token_id mask_token_id decoder_start_token_id
    tokenizer_class id2label label2id num_labels problem_type finetuning_task task_specific_params prefix
    attn_implementation experts_implementation chunk_size_feed_forward tf_legacy_loss max_window_layers
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences forced_bos_token_id forced_eos_token_id remove_invalid_values suppress_tokens
    begin_suppress_tokens exponential_decay_length_penalty
    is_decoder is_llama_config transformers.js_config unsloth_version unsloth_fixed
    """.split()
)
_NOTHING = (None, False, 0, "", [], {})


def check_keys(config: Mapping[str, Any], *, read: Collection[str], built: Mapping[str, Collection[Any]]):
    """Refuses keys of a config.json that might change numbers and are not read.

    Args:
        config: The dictionary of the config.json.
        read: Keys that the family reads.
        built: Key -> the values that are built, for parts that exist in one form only; null stands for them too.

    Raises:
        InputError: If a part has another form, weights are quantised, code of the model's own is named, or a key that
            is not known says anything at all.
    """
    model_type = config.get("model_type")
    for key, value in config.items():
        if key in built and value is not None and value not in built[key]:
            values = " or ".join(map(repr, built[key]))
            raise InputError(f"config.json: {key} is {value!r}; {model_type} models are built with {values} only")
        if key in read or key in built or key in HARMLESS or key.startswith("_") or value in _NOTHING:
            continue
        if key in ("quantization_config", "compression_config"):
            method = value.get("quant_method") if isinstance(value, dict) else value
            raise InputError(
                f"config.json: {key} (method {method!r}) says that the weights are quantised; expected float32, "
                "float16 or bfloat16: name the model from which they were made, or dequantise it with transformers "
                "(model.dequantize().save_pretrained(FOLDER))"
            )
        if key == "auto_map":
            if not any(name.startswith("AutoModel") for name in value):
                continue  # of a tokenizer or a configuration
            raise InputError(
                f"config.json: auto_map names code of the model's own ({value}), which is never run, so its numbers "
                f"may not be those of a {model_type} model; remove auto_map if they are"
            )
        raise InputError(
            f"config.json: {key} is {value!r}, a key that is not known here for model_type {model_type!r} and may "
            "change numbers; if it does not, remove it from config.json"
        )
