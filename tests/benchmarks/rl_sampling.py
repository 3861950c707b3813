"""Samples of `qstar rl` beside those of `qstar generate`: the same prompts and keys, both measured in one run, in turn.

    python tests/benchmarks/rl_sampling.py [--model FOLDER] [--prompts 16] [--samples 4] [--rounds 5]

Prints JSON: median tokens per second of both, the median of their ratios, and the ratio of their fastest rounds, which
other work on the machine disturbs least; and the same per second of processor time.
`qstar rl` rearranges the policy's parameters before it draws, as they are new at each step; `qstar generate` does so
once.
"""

import json
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np
from jsonargparse import auto_cli

from qstar_jax.config import ComputeOptions, DecodeOptions, MeshOptions
from qstar_jax.data.tokenization import Example
from qstar_jax.decoding import SampleOptions
from qstar_jax.decoding.eos import eos_token_ids
from qstar_jax.decoding.generate import prepare
from qstar_jax.decoding.options import interpret
from qstar_jax.sharding import make_mesh, use_mesh
from qstar_jax.store.open import load_model
from qstar_jax.tasks.tiny_tldr import BASE
from qstar_jax.training.rl.sampling import PolicySampler, sample_keys


def main(
    model: str = str(BASE),
    prompts: int = 16,
    prompt_tokens: int = 64,
    samples: int = 4,
    max_new_tokens: int = 48,
    rounds: int = 5,
):
    """Draws samples in turn.

    Args:
        model: Hugging Face folder, hub name or run folder; the demo's base model by default.
        prompts: Prompts at once.
        prompt_tokens: Tokens of each.
        samples: Samples of each.
        max_new_tokens: Longest sample.
        rounds: Rounds.
    """
    mesh = make_mesh()
    with use_mesh(mesh, "float32"):
        loaded = load_model(model, ComputeOptions(), mesh, MeshOptions())
        rng = np.random.default_rng(0)
        ids = rng.integers(3, loaded.model.config.vocab_size, (prompts, prompt_tokens), dtype=np.int32)
        examples = [Example(row, False, (), number) for number, row in enumerate(ids)]
        options = DecodeOptions(method="sample", return_sequences=samples, max_new_tokens=max_new_tokens)
        decoder = prepare(loaded, interpret(options), mesh)
        drawing = SampleOptions(max_new_tokens, eos_token_ids(loaded), num_samples=samples)
        sampler = PolicySampler.of(loaded.model, drawing, mesh, [prompt_tokens])

        def generated() -> int:
            return sum(one.length for several in decoder(list(ids)) for one in several)

        def drawn() -> int:
            found = sampler(loaded.params, examples, sample_keys(0, 0, prompts))
            jax.block_until_ready(found.logp)
            return sum(len(one.ids) for several in found.responses for one in several)

        ways: dict[str, Callable[[], int]] = {"generate": generated, "rl": drawn}
        for way in ways.values():
            way()  # compiles
        clocks = {"second": time.perf_counter, "cpu_second": time.process_time}
        rates: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in ways} for clock in clocks}
        for _ in range(rounds):
            for name, way in ways.items():
                began = {clock: read() for clock, read in clocks.items()}
                tokens = way()
                for clock, read in clocks.items():
                    rates[clock][name].append(tokens / (read() - began[clock]))
    for clock, of_clock in rates.items():
        medians = {name: round(statistics.median(values), 1) for name, values in of_clock.items()}
        ratio = statistics.median(rl / other for rl, other in zip(of_clock["rl"], of_clock["generate"], strict=True))
        fastest = max(of_clock["rl"]) / max(of_clock["generate"])
        ratios = {"ratio": round(ratio, 3), "ratio_of_fastest": round(fastest, 3)}
        print(json.dumps({f"tokens_per_{clock}": medians, **ratios}))


if __name__ == "__main__":
    auto_cli(main)
