"""Transformers' `generate` as a worker of beam_vs_hf.py (see decode_turns.py)."""

from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from decode_turns import random_prompts, reset_process_peak, serve
from jsonargparse import auto_cli
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from worker import process_peak_bytes

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_model(model: str, dtype: str) -> PreTrainedModel:
    """Reads a model, or draws its weights if there are none."""
    kind = {"dtype": getattr(torch, dtype), "attn_implementation": "sdpa"}
    if any(Path(model).glob("*.safetensors")):
        return AutoModelForCausalLM.from_pretrained(model, **kind).to(DEVICE).eval()
    torch.manual_seed(0)
    with DEVICE:
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model), **kind).eval()


def main(
    model: str,
    prompt_tokens: int,
    new_tokens: int,
    batch: int,
    settings: list[str],
    threads: int = 2,
    dtype: Literal["float32", "bfloat16"] = "float32",
):
    """Waits for requests and decodes.

    Args:
        model: Hugging Face folder; without weights they are drawn.
        prompt_tokens: Length of each prompt.
        new_tokens: Length of each answer.
        batch: Prompts.
        settings: Requests that there will be.
        threads: Threads of torch.
        dtype: Type of weights and activations.
    """
    torch.set_num_threads(threads)
    loaded = load_model(model, dtype)
    loaded.generation_config = GenerationConfig()  # no EOS, so that nothing ends early
    prompts = torch.tensor(
        random_prompts(batch, prompt_tokens, loaded.config.vocab_size), dtype=torch.long, device=DEVICE
    )
    mask = torch.ones_like(prompts)

    def run(kind: str, count: int) -> np.ndarray:
        how = {"num_beams": count, "do_sample": False}
        if kind == "sample":
            how = {"num_return_sequences": count, "do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
        config = GenerationConfig(max_new_tokens=new_tokens, pad_token_id=0, **how)
        with torch.inference_mode():
            found = loaded.generate(prompts, attention_mask=mask, generation_config=config)
        assert found.shape[1] == prompt_tokens + new_tokens, f"answers of {found.shape[1] - prompt_tokens} tokens"
        return found[:, prompt_tokens:].cpu().numpy()

    memory = {"peak": process_peak_bytes, "reset_peak": reset_process_peak}
    if DEVICE.type == "cuda":
        memory = {"peak": torch.cuda.max_memory_allocated, "reset_peak": torch.cuda.reset_peak_memory_stats}
    serve(run, settings, versions={name: version(name) for name in ("torch", "transformers")}, **memory)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
