"""Tunix's sampler as a worker of beam_vs_hf.py (see decode_turns.py).

Runs in an environment of its own (see beam_vs_hf.py). The sampler has no option for samples per prompt, so prompts are
repeated.
"""

from importlib.metadata import version

import numpy as np
from decode_turns import random_prompts, serve
from dpo_tunix import load_model
from jsonargparse import auto_cli
from tunix.generate.sampler import CacheConfig, Sampler


class Ids:
    """A tokenizer whose texts are token ids; 0 is padding."""

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> int:
        return 0  # the sampler puts none then

    def eos_id(self) -> int:
        return -1

    def pad_id(self) -> int:
        return 0


def main(model: str, prompt_tokens: int, new_tokens: int, batch: int, settings: list[str]):
    """Waits for requests and decodes.

    Args:
        model: Hugging Face folder of a Llama.
        prompt_tokens: Length of each prompt.
        new_tokens: Length of each answer.
        batch: Prompts.
        settings: Requests that there will be.
    """
    network = load_model(model)
    config, tokenizer = network.config, Ids()
    cache = CacheConfig(prompt_tokens + new_tokens, config.num_layers, config.num_kv_heads, config.head_dim)
    sampler = Sampler(network, tokenizer, cache)
    texts = [tokenizer.decode(prompt) for prompt in random_prompts(batch, prompt_tokens, config.vocab_size)]

    def run(kind: str, count: int) -> np.ndarray:
        how = {"beam_size": count} if kind == "beams" else {"temperature": 1.0, "top_p": 1.0}
        found = sampler(
            texts if kind == "beams" else [text for text in texts for _ in range(count)],
            max_generation_steps=new_tokens,
            max_prompt_length=prompt_tokens,
            eos_tokens=[-1],  # nothing ends early
            **how,
        )
        tokens = np.stack(found.tokens)
        assert tokens.shape[1] == new_tokens, f"answers of {tokens.shape[1]} tokens"
        return tokens

    serve(run, settings, versions={name: version(name) for name in ("google-tunix", "jax", "flax")})


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
