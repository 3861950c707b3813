"""Tiny random models of every family, as transformers writes them; a new family is one entry of `FAMILIES`.

    python tests/tiny_families.py write OUT     writes a folder of each family, and its logits
    python tests/tiny_families.py read FOLDERS  writes the logits of each folder in there, or why there are none

Runs with transformers 4 and 5, so configurations use spellings that both read. Sizes are chosen to expose mix-ups: keys
and values have fewer heads than queries, head_dim differs from hidden_size / heads wherever a family allows it, windows
are shorter than sequences, and no constant is a default.
"""

import json
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Tensors = dict[str, Any]  # name -> torch.Tensor


@dataclass(frozen=True)
class Tiny:
    """A tiny model.

    Attributes:
        config: Its configuration; `model_type` names the family.
        rewrite: Turns (config.json, tensors) as written by transformers into a variant found in the wild.
    """

    config: dict[str, Any]
    rewrite: Callable[[dict[str, Any], Tensors], tuple[dict[str, Any], Tensors]] | None = None


SHAPE = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WINDOW = 5
RMS = SHAPE | {"rms_norm_eps": 1e-3, "rope_theta": 700.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24}
YARN_RAMP = YARN | {"beta_fast": 4.0, "beta_slow": 0.5}
LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.3, 1.7], "long_factor": [2.0, 3.5, 5.0]}
PHI3 = RMS | {"model_type": "phi3"}
LONG_PHI3 = PHI3 | {"rope_scaling": LONGROPE, "partial_rotary_factor": 0.75}
GEMMA = RMS | {"head_dim": 12}
GEMMA2 = GEMMA | {"model_type": "gemma2", "sliding_window": WINDOW, "query_pre_attn_scalar": 24}
GEMMA3 = GEMMA2 | {"model_type": "gemma3_text", "rope_local_base_freq": 90.0, "num_hidden_layers": 4}
GPT_NEOX = {name: value for name, value in SHAPE.items() if name != "num_key_value_heads"} | {
    "model_type": "gpt_neox",
    "hidden_size": 48,
    "layer_norm_eps": 1e-3,
    "rotary_pct": 0.5,
    "rotary_emb_base": 700,
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 67,
    "n_embd": 32,
    "n_inner": 48,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 96,
    "layer_norm_epsilon": 1e-3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
IMAGES = {"mm_tokens_per_image": 4, "boi_token_index": 64, "eoi_token_index": 65, "image_token_index": 66}


def without_window(config: dict[str, Any], tensors: Tensors):
    """Leaves out the window, so the default of the class applies."""
    return {name: value for name, value in config.items() if name != "sliding_window"}, tensors


def hub_gpt2(config: dict[str, Any], tensors: Tensors):
    """The original GPT-2 on the hub: no prefix, and a causal mask per layer."""
    import torch

    tensors = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    mask = torch.ones(96, 96).tril()[None, None]
    return config | {"n_ctx": 96}, tensors | {f"h.{layer}.attn.bias": mask.clone() for layer in range(3)}


def hub_pythia(config: dict[str, Any], tensors: Tensors):
    """Pythia on the hub: boolean causal masks, and other buffers that transformers once stored."""
    import torch

    for layer in range(3):
        attention = f"gpt_neox.layers.{layer}.attention."
        tensors[attention + "bias"] = torch.ones(1, 1, 96, 96, dtype=torch.bool).tril()
        tensors[attention + "masked_bias"] = torch.tensor(-1e9)
        tensors[attention + "rotary_emb.inv_freq"] = torch.ones(3)
    return config, tensors


FAMILIES = {
    "llama": Tiny(RMS | {"model_type": "llama"}),
    "llama_biases": Tiny(RMS | {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "head_dim": 12}),
    "llama3_tied": Tiny(RMS | {"model_type": "llama", "rope_scaling": LLAMA3, "tie_word_embeddings": True}),
    "llama_linear": Tiny(RMS | {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 4.0}}),
    "llama_yarn": Tiny(RMS | {"model_type": "llama", "rope_scaling": YARN_RAMP, "head_dim": 16}),
    "llama_one_key": Tiny(RMS | {"model_type": "llama", "num_key_value_heads": 1}),
    "llama_all_keys": Tiny(RMS | {"model_type": "llama", "num_key_value_heads": 4}),
    "mistral": Tiny(RMS | {"model_type": "mistral", "sliding_window": WINDOW, "head_dim": 12}),
    "mistral_no_window": Tiny(RMS | {"model_type": "mistral", "sliding_window": None}),
    "mistral_silent": Tiny(RMS | {"model_type": "mistral", "sliding_window": 4096}, without_window),
    "qwen2": Tiny(RMS | {"model_type": "qwen2", "tie_word_embeddings": True}),
    "qwen2_window": Tiny(
        RMS | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
    ),
    "qwen2_yarn": Tiny(RMS | {"model_type": "qwen2", "rope_scaling": YARN}),
    "qwen3": Tiny(RMS | {"model_type": "qwen3", "head_dim": 12}),
    "qwen3_biases": Tiny(RMS | {"model_type": "qwen3", "head_dim": 12, "attention_bias": True}),
    "gemma": Tiny(GEMMA | {"model_type": "gemma", "hidden_act": "gelu_pytorch_tanh"}),
    "gemma2": Tiny(GEMMA2 | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma2_uncapped": Tiny(GEMMA2 | {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma3": Tiny(GEMMA3 | {"sliding_window_pattern": 3}),
    "gemma3_scaled": Tiny(
        GEMMA3
        | {
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        }
    ),
    "gemma3_images": Tiny(
        {
            "model_type": "gemma3",
            "text_config": GEMMA3 | {"sliding_window_pattern": 2},
            "vision_config": VISION,
            **IMAGES,
        }
    ),
    "phi3": Tiny(PHI3 | {"sliding_window": WINDOW}),
    "phi3_short": Tiny(LONG_PHI3 | {"original_max_position_embeddings": 64}),
    "phi3_long": Tiny(LONG_PHI3 | {"original_max_position_embeddings": 2, "max_position_embeddings": 8}),
    "olmo2": Tiny(RMS | {"model_type": "olmo2"}),
    "smollm3": Tiny(RMS | {"model_type": "smollm3", "num_hidden_layers": 4}),
    "smollm3_window": Tiny(
        RMS
        | {"model_type": "smollm3", "no_rope_layers": [0, 1, 1], "use_sliding_window": True, "sliding_window": WINDOW}
    ),
    "gpt_neox": Tiny(GPT_NEOX),
    "gpt_neox_sequential": Tiny(GPT_NEOX | {"use_parallel_residual": False, "attention_bias": False}),
    "pythia": Tiny(GPT_NEOX | {"hidden_size": 64, "rotary_pct": 0.25}, hub_pythia),
    "gpt2": Tiny(GPT2),
    "gpt2_hub": Tiny(GPT2, hub_gpt2),
}


def make(name: str, folder: Path, seed: int = 0):
    """Writes a model with random parameters, without a tokenizer.

    Norms and biases are random too: at transformers' initial 1 and 0, swapped or lost ones would go unnoticed.

    Args:
        name: One of `FAMILIES`.
        folder: Folder to write.
        seed: Seed of the parameters.
    """
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    tiny = FAMILIES[name]
    config = transformers.AutoConfig.for_model(**json.loads(json.dumps(tiny.config)))
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter + 0.4 * noise if parameter.ndim == 1 else 0.3 * noise)
    model.save_pretrained(folder)
    if tiny.rewrite is None:
        return
    path = folder / "config.json"
    written = json.loads(path.read_text()), load_file(folder / "model.safetensors")
    config, tensors = tiny.rewrite(*written)
    path.write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def open_torch(folder: Path):
    """Opens a folder with transformers in float32 with eager attention."""
    import torch
    import transformers

    types = {"dtype": torch.float32, "attn_implementation": "eager"}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **types).eval()


def rows(count: int = 3, length: int = 24) -> np.ndarray:
    """Token ids that are special in no family. Shape [count, length]."""
    return np.random.default_rng(7).integers(3, 60, (count, length))


def logits(folder: Path) -> np.ndarray:
    """Logits of `rows()` by transformers. Shape [N, S, V]."""
    import torch

    with torch.no_grad():
        return open_torch(folder)(torch.tensor(rows())).logits.numpy()


if __name__ == "__main__":
    verb, place = sys.argv[1], Path(sys.argv[2])
    for name in FAMILIES:
        if verb == "write":
            make(name, place / name)
        try:
            np.save(place / f"{name}.npy", logits(place / name))
        except Exception as error:  # one folder that cannot be read must not hide the others
            (place / f"{name}.txt").write_text(f"{type(error).__name__}: {error}")
