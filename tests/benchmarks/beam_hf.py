"""Transformers' `generate` as a worker of beam_vs_hf.py (see decode_turns.py)."""

from importlib.metadata import version

import numpy as np
import torch
from decode_turns import random_prompts, serve
from jsonargparse import auto_cli
from transformers import AutoModelForCausalLM, GenerationConfig


def main(model: str, prompt_tokens: int, new_tokens: int, batch: int, settings: list[str], threads: int = 2):
    """Waits for requests and decodes.

    Args:
        model: Hugging Face folder.
        prompt_tokens: Length of each prompt.
        new_tokens: Length of each answer.
        batch: Prompts.
        settings: Requests that there will be.
        threads: Threads of torch.
    """
    torch.set_num_threads(threads)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    loaded.generation_config = GenerationConfig()  # no EOS, so that nothing ends early
    prompts = torch.tensor(random_prompts(batch, prompt_tokens, loaded.config.vocab_size), dtype=torch.long)
    mask = torch.ones_like(prompts)

    def run(kind: str, count: int) -> np.ndarray:
        how = {"num_beams": count, "do_sample": False}
        if kind == "sample":
            how = {"num_return_sequences": count, "do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
        config = GenerationConfig(max_new_tokens=new_tokens, pad_token_id=0, **how)
        with torch.inference_mode():
            found = loaded.generate(prompts, attention_mask=mask, generation_config=config)
        assert found.shape[1] == prompt_tokens + new_tokens, f"answers of {found.shape[1] - prompt_tokens} tokens"
        return found[:, prompt_tokens:].numpy()

    serve(run, settings, versions={name: version(name) for name in ("torch", "transformers")})


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
