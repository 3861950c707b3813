"""Keys of config.json: each is read by a family, known to change no logit, or refused.

A key that is silently ignored may be a window, a scale or a quantization, and the model would compute fluent but wrong
numbers. So this module lists the keys that are harmless, not those that are refused.
"""

import math
from collections.abc import Mapping
from typing import Any

from qstar_jax.errors import InputError

# Keys that transformers writes into any config.json and that change no logit. Dropout is off, as in TRL's trainers.
HARMLESS = frozenset(
    """
    architectures model_type name_or_path transformers_version torch_dtype dtype use_cache use_return_dict return_dict
    return_dict_in_generate output_attentions output_hidden_states output_scores torchscript use_bfloat16
    initializer_range pretraining_tp attention_dropout hidden_dropout classifier_dropout embd_pdrop resid_pdrop
    attn_pdrop summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
    bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id cls_token_id mask_token_id decoder_start_token_id
    tokenizer_class id2label label2id num_labels problem_type finetuning_task task_specific_params prefix
    attn_implementation experts_implementation cache_implementation chunk_size_feed_forward tf_legacy_loss
    max_window_layers max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences forced_bos_token_id forced_eos_token_id
    remove_invalid_values suppress_tokens begin_suppress_tokens exponential_decay_length_penalty
    is_decoder is_llama_config transformers.js_config unsloth_version unsloth_fixed custom_pipelines
    gradient_checkpointing output_past predict_special_tokens max_sequence_length n_ctx sliding_window_size
    """.split()
)
_MAX_SIZE, _MAX_LAYERS = 2**31 - 1, 2**14  # a width fits 32 bits, and a tuple of layers fits the memory
_EMPTY = (None, False, 0, "", [], {})

# Names of activation functions in transformers -> in `block.ACTIVATIONS`
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "relu": "relu",
}


def activation_name(activation: str, gelu_tanh: str = "gelu_pytorch_tanh") -> str:
    """Returns the name in transformers of one of our activation functions; `gelu_tanh` has several."""
    names = {ours: name for name, ours in reversed(_ACTIVATIONS.items())} | {"gelu_tanh": gelu_tanh}
    return names[activation]


def check_number(name: str, value: Any):
    """Checks that a value is a positive number.

    Raises:
        InputError: If it is not.
    """
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise InputError(f"config.json: {name} is {value!r}; expected a number above 0")


class Keys:
    """A config.json that tracks which of its keys have been read.

    A key that is missing or null takes its default; without a default it is required.
    """

    def __init__(self, config: Mapping[str, Any]):
        self.model_type = config.get("model_type")
        self._config, self._read, self._allowed = config, set(), set()

    def get(self, name: str, default: Any = None) -> Any:
        """Reads a key without checking its type."""
        self._read.add(name)
        value = self._config.get(name)
        return default if value is None else value

    def has(self, name: str) -> bool:
        """Whether the key is present, even if null."""
        return name in self._config

    def size(self, name: str, default: int | None = None, *, least: int = 1, most: int = _MAX_SIZE) -> int:
        """Reads a whole number from `least` to `most`.

        Raises:
            InputError: If it is something else, or missing.
        """
        value = self._required(name, default)
        if type(value) is not int or value < least:
            raise InputError(f"config.json: {name} is {value!r}; expected a whole number of at least {least}")
        if value > most:
            raise InputError(f"config.json: {name} is {value!r}; expected a whole number of at most {most:,}")
        return value

    def layers(self, name: str = "num_hidden_layers", default: int | None = None) -> int:
        """Reads a number of layers; errors as for `size`."""
        return self.size(name, default, most=_MAX_LAYERS)

    def number(self, name: str, default: float | None = None) -> float:
        """Reads a positive number.

        Raises:
            InputError: If it is something else, or missing.
        """
        value = self._required(name, default)
        check_number(name, value)
        return value

    def flag(self, name: str, default: bool) -> bool:
        """Reads true or false.

        Raises:
            InputError: If it is something else.
        """
        value = self.get(name, default)
        if type(value) is not bool:
            raise InputError(f"config.json: {name} is {value!r}; expected true or false")
        return value

    def activation(self, name: str, default: str) -> str:
        """Reads the name of an activation function, and returns our name for it.

        Raises:
            InputError: If it is unknown.
        """
        value = self.get(name, default)
        if not isinstance(value, str) or value not in _ACTIVATIONS:
            raise InputError(f"config.json: {name} is {value!r}; supported are {', '.join(_ACTIVATIONS)}")
        return _ACTIVATIONS[value]

    def allow(self, name: str):
        """Allows any value of a key that changes nothing in this model; the key is `remaining`."""
        self._allowed.add(name)

    def expect(self, name: str, *values: Any):
        """Checks a key of a feature that is supported with these values (or null) only; the key is `remaining`.

        Raises:
            InputError: If it has another value.
        """
        self.allow(name)
        value = self._config.get(name)
        if value is not None and value not in values:
            expected = " or ".join(map(repr, values))
            raise InputError(
                f"config.json: {name} is {value!r}; {self.model_type} models are supported with {expected} only"
            )

    def allow_code(self, name: str):
        """Allows an `auto_map` whose only model class is one that transformers has adopted."""
        auto_map = self._config.get("auto_map")
        if isinstance(auto_map, dict):
            models = [value for entry, value in auto_map.items() if entry.startswith("AutoModel")]
            # The class may be prefixed by the name of a repository.
            if all(str(value).split("--")[-1] == name for value in models):
                self._read.add("auto_map")

    def remaining(self) -> dict[str, Any]:
        """Checks that no key was ignored that may change numbers.

        Returns:
            The keys that were not read, to be written back with the model.

        Raises:
            InputError: If weights are quantized, the model brings its own code, or an unknown key is set to anything.
        """
        unread = {name: value for name, value in self._config.items() if name not in self._read}
        for name, value in unread.items():
            harmless = name in HARMLESS or name in self._allowed or name.startswith("_")
            if not harmless and value not in _EMPTY:
                self._refuse(name, value)
        # auto_map names code that is not copied with the model.
        return {name: value for name, value in unread.items() if name != "auto_map"}

    def _required(self, name: str, default: Any) -> Any:
        value = self.get(name, default)
        if value is None:
            raise InputError(f"config.json: no key {name!r} (found: {', '.join(sorted(self._config))})")
        return value

    def _refuse(self, name: str, value: Any):
        if name in ("quantization_config", "compression_config"):
            method = value.get("quant_method") if isinstance(value, dict) else value
            raise InputError(
                f"config.json: {name} (method {method!r}) says that the weights are quantized; expected float32, "
                "float16 or bfloat16: use the original model, or dequantize it with transformers "
                "(model.dequantize().save_pretrained(FOLDER))"
            )
        if name == "auto_map":
            if isinstance(value, dict) and not any(entry.startswith("AutoModel") for entry in value):
                return  # code of a tokenizer or a configuration
            raise InputError(
                f"config.json: auto_map names the model's own code ({value}), which is never run, so the model may "
                f"compute other numbers than a {self.model_type} model; remove auto_map if it does not"
            )
        raise InputError(
            f"config.json: {name} is {value!r}, an unknown key for model_type {self.model_type!r} that may change "
            "numbers; if it does not, remove it from config.json"
        )
