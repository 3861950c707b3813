"""DPO steps of this library beside TRL's, Tunix's and a hand-written torch step, on the same pairs, in turn.

    python tests/benchmarks/dpo_vs_trl.py --model FOLDER [--shape tldr|chat|FILE.jsonl.gz] [--reference live|cached]

Each library runs in its own long-lived process; they take steps in turn for several rounds, and medians count. All of
them ask the kernel for huge pages (see worker.py). Prints JSON: pairs per second, tokens of prompts and responses per
second, peak memory, first losses, and ratios of speed. The model's folder needs config.json and safetensors; a FILE of
pairs needs its tokenizer too. Extras `parity` and `bench`.

Tunix has dependencies of its own, so it runs only if asked for, in an environment of its own, float32 and live:

    python -m venv TUNIX && TUNIX/bin/pip install google-tunix==0.1.7 jax==0.10.2 jsonargparse
    python tests/benchmarks/dpo_vs_trl.py --model FOLDER --libraries '[tunix, ours]' --tunix_python TUNIX/bin/python
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal

import numpy as np
from jsonargparse import auto_cli
from worker import Worker

HERE = Path(__file__).parent
SHAPES = {"tldr": (384, 48), "chat": (64, 192)}  # tokens of a prompt, and of each answer


def random_pairs(prompt: int, answer: int, count: int, vocabulary: int) -> dict[str, np.ndarray]:
    """Pairs of random tokens, all of one length."""
    rng = np.random.default_rng(0)
    return {
        "prompts": rng.integers(3, vocabulary, count * prompt, dtype=np.int32),
        "prompt_lengths": np.full(count, prompt, np.int32),
        "answers": rng.integers(3, vocabulary, count * 2 * answer, dtype=np.int32),
        "answer_lengths": np.full((count, 2), answer, np.int32),
        "pad_id": np.int32(0),
    }


# In a process of its own: what a parent holds counts as its children's peak memory.
TOKENIZE = """
import sys
import numpy as np
from qstar_jax.config import DataOptions
from qstar_jax.data.loading import load_examples
from qstar_jax.store.hub import read_tokenizer
from pathlib import Path
file, model, count, out = sys.argv[1:]
options = DataOptions(as_chat=True, max_length=512, max_prompt_length=256)
examples = load_examples(file, "", "preferences", read_tokenizer(Path(model)), options, int(count)).examples
answers = [r.ids for e in examples for r in e.responses]
np.savez(
    out,
    prompts=np.concatenate([e.prompt for e in examples]),
    prompt_lengths=np.array([len(e.prompt) for e in examples]),
    answers=np.concatenate(answers),
    answer_lengths=np.array([len(a) for a in answers]).reshape(-1, 2),
    pad_id=np.int32(0),
)
"""


def main(
    model: str,
    shape: str = "tldr",
    reference: Literal["live", "cached"] = "live",
    libraries: list[str] = ["trl", "torch", "ours"],  # noqa: B006
    batch: int = 4,
    steps: int = 1,
    rounds: int = 3,
    threads: int = 2,
    dtype: Literal["float32", "bfloat16"] = "float32",
    tunix_python: str = "",
):
    """Measures the libraries in turn.

    Args:
        model: Hugging Face folder.
        shape: tldr, chat, or a file of pairs.
        reference: A second model at each step, or its log-probabilities computed before.
        libraries: trl, torch, tunix, ours; behind a slash micro-batches per step, as in ours/4 (not for tunix).
        batch: Pairs per step.
        steps: Steps a turn.
        rounds: Turns of each library.
        threads: Threads of torch; XLA takes the cores that the process may use.
        dtype: Type of activations.
        tunix_python: Interpreter of the environment that has google-tunix.
    """
    if "tunix" in libraries:
        if not tunix_python:
            sys.exit("tunix needs --tunix_python, the interpreter of an environment that has google-tunix")
        if reference != "live" or dtype != "float32":
            sys.exit("tunix runs with --reference live and --dtype float32 only")
        tunix_python = str(Path(tunix_python).absolute())  # workers run in the root of the repository
    vocabulary = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    count = batch * (steps * rounds + 1)
    with tempfile.TemporaryDirectory() as folder:
        pairs = str(Path(folder) / "pairs.npz")
        if shape in SHAPES:
            np.savez(pairs, **random_pairs(*SHAPES[shape], count, vocabulary))
        else:
            subprocess.run([sys.executable, "-c", TOKENIZE, shape, model, str(count), pairs], check=True)
        with np.load(pairs) as file:
            tokens = float((2 * file["prompt_lengths"] + file["answer_lengths"].sum(1)).mean())
        common = ["--model", model, "--batch", str(batch)]
        ours = [*common, "--pairs", json.dumps([pairs]), "--reference", reference, "--compute.dtype", dtype]
        torch = [*common, "--pairs", pairs, "--reference", reference, "--dtype", dtype]
        torch += ["--threads", str(threads), "--optim", "adamw_torch_fused"]
        peers = str(HERE / "dpo_peers.py")
        words = {
            "trl": [peers, "trl", *torch],
            "torch": [peers, "torch", *torch],
            "tunix": [str(HERE / "dpo_tunix.py"), *common, "--pairs", json.dumps([pairs])],
            "ours": [str(HERE / "dpo_ours.py"), *ours],
        }
        pythons = {"tunix": tunix_python}
        workers = {}
        for name in libraries:
            library, _, accumulate = name.partition("/")
            parts = f"[{accumulate}]" if library == "ours" else accumulate
            more = ["--accumulate", parts] if accumulate else []
            workers[name] = Worker([*words[library], *more], pythons.get(library, sys.executable))
        turns = {name: [worker.ask("begin 0")] for name, worker in workers.items()}
        for _ in range(rounds):
            for name, worker in workers.items():
                turns[name].append(worker.ask(f"step {steps}"))
        for worker in workers.values():
            worker.ask("stop")
    result = {"model": Path(model).name, "shape": shape, "reference": reference, "batch": batch, "dtype": dtype}
    for name in libraries:
        result[name] = summary(turns[name], tokens)
    for own in libraries:
        for name in libraries:
            if own.startswith("ours") and not name.startswith("ours"):
                result[f"{own} : {name}"] = {
                    "speed": result[own]["pairs_per_second"] / result[name]["pairs_per_second"],
                    "memory": result[own]["peak_memory_gib"] / result[name]["peak_memory_gib"],
                }
    print(json.dumps(result, indent=2))


def summary(turns: list[dict], tokens: float) -> dict:
    """Medians over the turns of a library after the first, in which it gets warm; `tokens` per pair."""
    timed = turns[1:]
    speed = statistics.median(turn["pairs"] / turn["seconds"] for turn in timed)
    result = {
        "pairs_per_second": speed,
        "tokens_per_second": speed * tokens,  # of the plain layout, so that it means the same for all
        "peak_memory_gib": max(turn["peak_memory_bytes"] for turn in turns) / 2**30,
        "losses": [loss for turn in turns for loss in turn["losses"]][:4],
    }
    if "matmul_flops" in timed[0]:
        peak = timed[0]["matmul_flops"]
        flops = statistics.median(turn["flops"] / turn["seconds"] for turn in timed)
        result |= {
            "padding": statistics.median(1 - turn["tokens"] / turn["slots"] for turn in timed),
            "share_of_matmul_peak": flops / peak,
            "matmul_gflops": peak / 1e9,
        }
    return result


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
