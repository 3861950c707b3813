"""Beams and samples of this library and of transformers' `generate` on one accelerator, in turn.

    python tests/accelerator/decoding.py [--tiny true] [--limit 85]

Eight prompts at once, in bfloat16; weights are random, in the shapes of real models, and no token ends a response.
Prints a line of JSON per record, the most important first. What does not fit into the time is skipped by name.
"""

import importlib.util
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from contests import ONE_B, SMALL, shrunk
from jsonargparse import auto_cli
from training import BENCHMARKS, Records, ask_all, stop
from worker import Worker

SETTINGS = ["beams 5", "beams 1", "beams 10", "sample 8"]  # one beam is greedy decoding


@dataclass(frozen=True)
class Decoding:
    """A model's decoding.

    Attributes:
        name: The model's.
        config: Its config.json.
        prompt_tokens: Tokens of each prompt.
        new_tokens: Tokens of each response.
        batch: Prompts.
        seconds: What it takes on an H100, roughly.
    """

    name: str
    config: dict
    prompt_tokens: int = 512
    new_tokens: int = 128
    batch: int = 8
    seconds: float = 40


DECODINGS = [Decoding(contest.name, contest.config) for contest in (ONE_B, SMALL)]
TINY = [Decoding(ONE_B.name, shrunk(ONE_B).config, prompt_tokens=24, new_tokens=8, batch=2, seconds=0)]


def start(decoding: Decoding, folder: Path, records: Records) -> dict[str, Worker]:
    """Starts the libraries side by side: ours compiles while the other is imported."""
    (folder / "config.json").write_text(json.dumps(decoding.config), encoding="utf-8")
    words = ["--model", str(folder), "--prompt_tokens", str(decoding.prompt_tokens), "--batch", str(decoding.batch)]
    words += ["--new_tokens", str(decoding.new_tokens), "--settings", json.dumps(SETTINGS), "--dtype", "bfloat16"]
    # Neither takes the whole card.
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "HF_HUB_OFFLINE": "1"}
    ours = [str(BENCHMARKS / "beam_ours.py"), *words, "--quick", "true"]
    workers = {"ours": Worker(ours, environment=environment, wait=False)}
    if importlib.util.find_spec("torch"):
        hf = Worker([str(BENCHMARKS / "beam_hf.py"), *words], environment=environment, wait=False)
        workers["transformers"] = hf
    else:
        records.skip(f"{decoding.name}: transformers", "torch is not installed")
    return workers


def compete(decoding: Decoding, workers: dict[str, Worker], rounds: int, records: Records):
    """Measures the libraries in turn, setting by setting."""
    ask_all(workers, "", decoding.name, records)
    medians = {}
    for setting in SETTINGS:
        label = f"{decoding.name}, {setting}"
        turns = {name: [] for name in workers}
        for _ in range(rounds):
            for name, turn in ask_all(workers, setting, label, records).items():
                turns[name].append(turn)
        results = {name: summary(decoding, turns[name]) for name in workers if turns[name]}
        for name, result in results.items():
            records.say(f"{label}: {name}", **result)
        if len(results) == 2:
            speeds = [results[name]["tokens_per_second"] for name in ("ours", "transformers")]
            records.say(f"{label}: ours / transformers", speed_ratio=speeds[0] / speeds[1])
        if "ours" in results:
            medians[setting] = results["ours"]["step_seconds"]
    if "ours" in workers:
        say_floors(decoding.name, workers["ours"], medians, records)


def summary(decoding: Decoding, turns: list[dict]) -> dict[str, float]:
    """Speed, in new tokens of the best responses or of all samples, and memory.

    A step includes its share of the prompts' computation.
    """
    seconds = statistics.median(turn["seconds"] for turn in turns)
    return {
        "tokens_per_second": turns[-1]["tokens"] / seconds,
        "step_seconds": seconds / decoding.new_tokens,
        "peak_memory_gib": turns[-1]["peak_memory_bytes"] / 2**30,
    }


def say_floors(name: str, worker: Worker, medians: dict[str, float], records: Records):
    """Compares our steps with the time of reading weights and cache once, or of their products."""
    with records.attempt(f"{name}: floors"):
        limits = worker.ask("stop", records.left)
        bandwidth = limits["read_gigabytes_per_second"]
        for setting, seconds in medians.items():
            limit = limits["limits"][setting]
            floor = limit["floor_step_seconds"]
            shares = {"floor_step_seconds": floor, "share_of_floor": floor / seconds, "bound_by": limit["bound_by"]}
            records.say(f"{name}, {setting}: floor", **shares, read_gigabytes_per_second=bandwidth)


def main(tiny: bool = False, limit: float = 85.0):
    """Measures everything, and exits with 1 if something failed.

    Args:
        tiny: Whether to run the same on a tiny model, to see that it works.
        limit: Seconds that it may take.
    """
    records = Records(limit)
    for decoding in TINY if tiny else DECODINGS:
        if records.left < decoding.seconds:
            records.skip(decoding.name, f"needs about {decoding.seconds:.0f} seconds, {records.left:.0f} are left")
            continue
        with tempfile.TemporaryDirectory() as folder, records.attempt(decoding.name):
            workers = start(decoding, Path(folder), records)
            try:
                compete(decoding, workers, 2 if tiny else 3, records)
            finally:
                stop(workers)
    # The machine that is lent has no vLLM, so there is no worker for it yet.
    records.skip("vllm", "not compared" if importlib.util.find_spec("vllm") else "vllm is not installed")
    sys.exit(records.failed)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
