"""DPO steps of this library and of TRL on one accelerator, in turn; an adapter of an 8B shape; where the time goes.

    python tests/accelerator/training.py [--tiny true] [--limit 190] [--groups '[0, 2]']

Weights are random, in the shapes of real models; parameters and optimizer are float32, matrix products bfloat16, the
reference runs at each step. Prints a line of JSON per record, the most important first. What does not fit into the time
is skipped by name.
"""

import importlib.util
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from jsonargparse import auto_cli

HERE = Path(__file__).parent
BENCHMARKS = HERE.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from contests import GROUPS, TINY_GROUPS, Contest  # noqa: E402
from dpo_vs_trl import random_pairs  # noqa: E402
from worker import Worker  # noqa: E402

PATIENCE = 120.0  # seconds until a library counts as hung


class Records:
    """Prints records, and remembers whether one failed.

    Args:
        limit: Seconds from now on after which nothing more may run.
    """

    def __init__(self, limit: float):
        self._began, self._limit, self.failed = time.perf_counter(), limit, False

    @property
    def left(self) -> float:
        """Seconds that are left; at least a moment, so that it can serve as a timeout."""
        return max(self._limit - (time.perf_counter() - self._began), 0.1)

    def say(self, name: str, ok: bool = True, **fields: object):
        """Prints a record, and the seconds since the beginning."""
        self.failed |= not ok
        clock = {"clock_seconds": round(time.perf_counter() - self._began, 1)}
        print(json.dumps({"name": name, "ok": ok, **fields, **clock}), flush=True)

    def skip(self, name: str, reason: str):
        """Prints what was not measured, and why."""
        self.say(name, skipped=reason)

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Turns an error into a record that failed, so that it does not take the others with it."""
        try:
            yield
        except Exception as error:
            self.say(name, ok=False, error=f"{type(error).__name__}: {error}")


def start(contest: Contest, folder: Path, records: Records) -> dict[str, Worker]:
    """Starts the libraries, all at once: ours compiles while the other is imported."""
    config = folder / "config.json"
    config.write_text(json.dumps(contest.config), encoding="utf-8")
    files = []
    for shape, tokens in contest.shapes.items():
        files.append(str(folder / f"{shape}.npz"))
        np.savez(files[-1], **random_pairs(*tokens, 4 * contest.batch, contest.config["vocab_size"]))
    common = ["--model", str(config), "--batch", str(contest.batch)]
    workers = {}
    if contest.accumulate:
        ours = [*common, "--pairs", json.dumps(files), "--accumulate", json.dumps(contest.accumulate)]
        ours += ["--compute.dtype", "bfloat16", *contest.options]
        workers["ours"] = Worker([str(BENCHMARKS / "dpo_ours.py"), *ours], environment=contest.environment, wait=False)
    if contest.trl_accumulate and not importlib.util.find_spec("trl"):
        records.skip(f"{contest.name}: trl", "trl is not installed")
    elif contest.trl_accumulate:
        parts = [str(number) for number in contest.trl_accumulate]
        trl = ["trl", *common, "--pairs", *files, "--accumulate", *parts, "--dtype", "bfloat16"]
        trl += ["--optim", "adamw_torch_fused"]
        environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "HF_HUB_OFFLINE": "1"}
        workers["trl"] = Worker([str(BENCHMARKS / "dpo_peers.py"), *trl], environment=environment, wait=False)
    return workers


def ask_all(workers: dict[str, Worker], request: str, label: str, records: Records) -> dict[str, dict]:
    """Asks the libraries one after the other; no request waits until they are ready.

    One that fails, or takes over `PATIENCE`, is dropped from `workers`.
    """
    answers = {}
    for name, worker in list(workers.items()):
        patience = min(records.left, PATIENCE)
        if patience < 1:
            records.skip(f"{label}: {name}", "no time is left")
        else:
            with records.attempt(f"{label}: {name}"):
                answers[name] = worker.ask(request, patience) if request else worker.wait_ready(patience)
        if name not in answers:
            workers.pop(name).kill()
    return answers


def compete(contest: Contest, index: int, workers: dict[str, Worker], rounds: int, steps: int, records: Records):
    """Measures the libraries in turn, on pairs of the shape number `index`."""
    shape, tokens = list(contest.shapes.items())[index]
    label = f"{contest.name} {shape}"
    turns = {name: [turn] for name, turn in ask_all(workers, f"begin {index}", label, records).items()}
    for _ in range(rounds):
        for name, turn in ask_all(workers, f"step {steps}", label, records).items():
            turns[name].append(turn)
    results = {name: summary(contest, tokens, turns[name]) for name in workers}
    if "trl" in results:
        results["trl"]["micro_batches"] = contest.trl_accumulate[index]
    if "ours" in results:
        results["ours"] |= settings(workers["ours"].ready, index)
        for name in results:
            results[name] |= utilization(turns["ours"][-1], workers["ours"].ready, results[name], name)
    for name, result in results.items():
        records.say(f"{label}: {name}", **result)
    if len(results) == 2:
        records.say(f"{label}: ours / trl", **ratios(results["ours"], results["trl"]))


def summary(contest: Contest, tokens: tuple[int, int], turns: list[dict]) -> dict:
    """Speed and memory of a library, from its turns after the first, in which it gets warm; whether losses are right.

    The policy begins as its reference, so the first loss is ln 2; two programs may round log-probabilities differently.
    Our peak memory is that of all shapes so far, and `compiled_gib` what the program of this one needs.
    """
    losses = [loss for turn in turns for loss in turn["losses"]]
    pairs_per_second = statistics.median(turn["pairs"] / turn["seconds"] for turn in turns[1:])
    return {
        "ok": abs(losses[0] - math.log(2)) < 0.02 and all(map(math.isfinite, losses)),
        "pairs_per_second": pairs_per_second,
        # of the layout that repeats a prompt for each response, so that it means the same for all
        "tokens_per_second": pairs_per_second * 2 * sum(tokens),
        "step_seconds": contest.batch / pairs_per_second,
        "peak_memory_gib": turns[-1]["peak_memory_bytes"] / 2**30,
        "pairs_per_step": contest.batch,
        "first_losses": losses[:3],
    }


def utilization(turn: dict, ready: dict, result: dict, name: str) -> dict:
    """MFU: the FLOPs that the library's layout of the pairs needs, over those of large matrix products."""
    steps = turn["pairs"] / result["pairs_per_step"]
    flops = turn["flops" if name == "ours" else "plain_flops"] / steps / result["step_seconds"]
    shares = {"mfu": flops / turn["matmul_flops"], "matmul_tflops_per_second": turn["matmul_flops"] / 1e12}
    if ready["datasheet_flops"]:
        shares["mfu_of_data_sheet"] = flops / ready["datasheet_flops"]
    return shares


def settings(ready: dict, index: int) -> dict:
    """What we ran with."""
    return {
        "attention": ready["attention"][index],
        "remat": ready["compute"]["remat"],
        "compiled_gib": ready["step_bytes"][index] / 2**30,
        "micro_batches": ready["accumulate"][index],
    }


def ratios(ours: dict, trl: dict) -> dict[str, float]:
    """How often faster we are, and in which share of the memory."""
    return {
        "speed_ratio": ours["pairs_per_second"] / trl["pairs_per_second"],
        "memory_ratio": ours["peak_memory_gib"] / trl["peak_memory_gib"],
    }


def trace(name: str, worker: Worker, records: Records):
    """Traces a step, and sums up what ran in it."""
    with records.attempt(name), tempfile.TemporaryDirectory() as folder:
        turn = worker.ask(f"step 1 {folder}", records.left)
        command = [sys.executable, str(HERE / "step_trace.py"), folder]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=records.left)
        shares = json.loads(output.stdout)
        kernels = shares.pop("longest")
        records.say(name, step_seconds=turn["seconds"], **shares)
        for number, kernel in enumerate(kernels, 1):
            records.say(f"{name}, kernel {number}", **kernel)


def measure(group: list[Contest], records: Records, rounds: int, steps: int):
    """Measures the contests of a group that fit into the time that is left, the first ones first."""
    left, fitting = records.left, []
    for contest in group:
        if contest.seconds < left:
            fitting.append(contest)
            left -= contest.seconds
        else:
            records.skip(contest.name, f"needs about {contest.seconds:.0f} seconds, and {left:.0f} are left")
    with ExitStack() as stack:
        started = []
        for contest in fitting:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            started.append((contest, start(contest, folder, records)))
            stack.callback(stop, started[-1][1])
        for contest, workers in started:
            ask_all(workers, "", contest.name, records)
        for contest, workers in started:
            for index, shape in enumerate(contest.shapes):
                label = f"{contest.name} {shape}"
                if records.left < contest.seconds / 4:
                    records.skip(label, f"{records.left:.0f} seconds are left")
                    continue
                with records.attempt(label):
                    compete(contest, index, workers, rounds, steps, records)
                if contest.traced and "ours" in workers:
                    trace(f"{label}: trace", workers["ours"], records)
            stop(workers)


def stop(workers: dict[str, Worker]):
    """Ends the libraries, so that the next ones have the memory to themselves."""
    while workers:
        workers.popitem()[1].kill()


def main(tiny: bool = False, limit: float = 190.0, groups: list[int] | None = None):
    """Measures everything, and exits with 1 if something failed.

    Args:
        tiny: Whether to run the same on tiny models, to see that it works.
        limit: Seconds that it may take.
        groups: Numbers of the groups of contests, from 0; all by default.
    """
    records = Records(limit)
    chosen, rounds, steps = (TINY_GROUPS, 2, 1) if tiny else (GROUPS, 3, 2)
    for group in chosen if groups is None else [chosen[number] for number in groups]:
        measure(group, records, rounds, steps)
    sys.exit(records.failed)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
