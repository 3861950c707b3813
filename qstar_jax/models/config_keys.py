"""The keys of a config.json: each is read by a family, known to change no logit, or refused.

A key that is passed over may be a window, a scale or a quantisation, and the model would speak fluently with wrong
numbers. So there is no list of what is refused: there is one of what is harmless.
"""

import math
from collections.abc import Mapping
from typing import Any

from qstar_jax.errors import InputError

# What transformers writes into any config.json and no logit depends on. Dropout is off here, as in TRL's trainers.
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
_NOTHING = (None, False, 0, "", [], {})

# transformers' names of activation functions -> those of `block.ACTIVATIONS`
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
    """Returns transformers' name of one of our activation functions, of which `gelu_tanh` has several."""
    names = {ours: name for name, ours in reversed(_ACTIVATIONS.items())} | {"gelu_tanh": gelu_tanh}
    return names[activation]


def check_number(name: str, found: Any):
    """Refuses what is no number above 0.

    Raises:
        InputError: If it is not.
    """
    if type(found) not in (int, float) or not 0 < found < math.inf:
        raise InputError(f"config.json: {name} is {found!r}; expected a number above 0")


class Keys:
    """A config.json that remembers what was read of it.

    A key that is missing or null has its default; one without a default must be there.

    Args:
        config: The dictionary of the config.json.
    """

    def __init__(self, config: Mapping[str, Any]):
        self.model_type = config.get("model_type")
        self._config, self._read, self._kept = config, set(), set()

    def get(self, name: str, default: Any = None) -> Any:
        """Reads a key as it stands there."""
        self._read.add(name)
        found = self._config.get(name)
        return default if found is None else found

    def says(self, name: str) -> bool:
        """Whether the key is there, be it as null."""
        return name in self._config

    def size(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        """Reads a whole number of at least `least`.

        Raises:
            InputError: If it is something else, or missing.
        """
        found = self._needed(name, default)
        if type(found) is not int or found < least:
            raise InputError(f"config.json: {name} is {found!r}; expected a whole number of at least {least}")
        return found

    def number(self, name: str, default: float | None = None) -> float:
        """Reads a number above 0.

        Raises:
            InputError: If it is something else, or missing.
        """
        found = self._needed(name, default)
        check_number(name, found)
        return found

    def flag(self, name: str, default: bool) -> bool:
        """Reads true or false.

        Raises:
            InputError: If it is something else.
        """
        found = self.get(name, default)
        if type(found) is not bool:
            raise InputError(f"config.json: {name} is {found!r}; expected true or false")
        return found

    def activation(self, name: str, default: str) -> str:
        """Reads the name of an activation function, and returns ours.

        Raises:
            InputError: If it is not known.
        """
        found = self.get(name, default)
        if not isinstance(found, str) or found not in _ACTIVATIONS:
            raise InputError(f"config.json: {name} is {found!r}; built are {', '.join(_ACTIVATIONS)}")
        return _ACTIVATIONS[found]

    def keep(self, name: str):
        """Lets a key be that changes nothing in this model; it is among `others`."""
        self._kept.add(name)

    def only(self, name: str, *values: Any):
        """Checks a key of a part that is built in one form only; null stands for it too. It is among `others`.

        Raises:
            InputError: If it has another form.
        """
        self.keep(name)
        found = self._config.get(name)
        if found is not None and found not in values:
            allowed = " or ".join(map(repr, values))
            raise InputError(
                f"config.json: {name} is {found!r}; {self.model_type} models are built with {allowed} only"
            )

    def code(self, known: str):
        """Reads `auto_map` where all code of models that it names is a class that transformers has taken over.

        Args:
            known: The class, as "module.Class".
        """
        auto_map = self._config.get("auto_map")
        if isinstance(auto_map, dict):
            models = [value for entry, value in auto_map.items() if entry.startswith("AutoModel")]
            if all(str(value).split("--")[-1] == known for value in models):  # it may follow the name of a repository
                self._read.add("auto_map")

    def others(self) -> dict[str, Any]:
        """Checks that nothing was passed over that may change numbers.

        Returns:
            The keys that were not read, which a folder that is written from the model has again.

        Raises:
            InputError: If weights are quantised, code of the model's own is named, or a key that is not known says
                anything at all.
        """
        left = {name: value for name, value in self._config.items() if name not in self._read}
        for name, value in left.items():
            known = name in HARMLESS or name in self._kept or name.startswith("_")
            if not known and value not in _NOTHING:
                self._refuse(name, value)
        return {name: value for name, value in left.items() if name != "auto_map"}  # its code does not go along

    def _needed(self, name: str, default: Any) -> Any:
        found = self.get(name, default)
        if found is None:
            raise InputError(f"config.json: no key {name!r} (found: {', '.join(sorted(self._config))})")
        return found

    def _refuse(self, name: str, value: Any):
        if name in ("quantization_config", "compression_config"):
            method = value.get("quant_method") if isinstance(value, dict) else value
            raise InputError(
                f"config.json: {name} (method {method!r}) says that the weights are quantised; expected float32, "
                "float16 or bfloat16: name the model from which they were made, or dequantise it with transformers "
                "(model.dequantize().save_pretrained(FOLDER))"
            )
        if name == "auto_map":
            if not any(entry.startswith("AutoModel") for entry in value):
                return  # of a tokenizer or a configuration
            raise InputError(
                f"config.json: auto_map names code of the model's own ({value}), which is never run, so its numbers "
                f"may not be those of a {self.model_type} model; remove auto_map if they are"
            )
        raise InputError(
            f"config.json: {name} is {value!r}, a key that is not known here for model_type {self.model_type!r} and "
            "may change numbers; if it does not, remove it from config.json"
        )
