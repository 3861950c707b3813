"""Ends commands at random moments, lets them go on, and compares what they leave with an uninterrupted run.

`python -m tests.faults --kills 50 --seed 0` prints how many were tried and exact, and why one was not.
"""

import argparse
import contextlib
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parent))

from damage import damage
from jobs import JOBS, Job, prepare
from processes import end_all, free_port, in_child, start, wait

KINDS = ("kill", "term", "one-of-two", "damage")
SURVIVOR_SECONDS = 60
IMPORTED = (
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.configuration_llama",
    "tensorboardX",
    "qstar_jax.cli.export",
    "qstar_jax.cli.generate",
    "qstar_jax.cli.main",
    "qstar_jax.cli.score",
    "qstar_jax.cli.sweep",
    "qstar_jax.evaluation.judges.reward_model",
    "qstar_jax.report.curves",
    "qstar_jax.training.run",
)


class Bench:
    """A place with models and data in which commands of one job run, one after the other."""

    def __init__(self, job: Job, place: Path):
        self.job, self.place, self.run = job, place, place / "run"
        self._number = 0

    def begin(self) -> list[int]:
        """Starts the command; returns the ids of its processes."""
        self._number += 1
        count, words, children = self.job.processes, self.job.words(self.place), []
        environment = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": str(count)}
        for number in range(count):
            environment["JAX_PROCESS_ID"] = str(number)
            children.append(start(words, self.log(number), environment if count > 1 else {}))
        return children

    def log(self, process: int) -> Path:
        """What a process of the newest command says."""
        return self.place / "logs" / f"{self._number}-{process}.txt"

    def clear(self):
        """Removes what earlier commands have left."""
        for name in ("run", "logs", "caches"):
            shutil.rmtree(self.place / name, ignore_errors=True)
        (self.place / "logs").mkdir()

    def complete(self) -> str | None:
        """Runs the command to its end; returns what went wrong."""
        codes = wait(self.begin())
        if set(codes) == {0}:
            return None
        return f"exit codes {codes}: {' | '.join(self.said(number) for number in range(len(codes)))}"

    def said(self, process: int) -> str:
        """The end of what a process of the newest command says."""
        return self.log(process).read_text(errors="replace").strip()[-600:]

    def result(self) -> dict:
        """What the job has left in its folder."""
        path = self.place / "result.json"
        in_child(lambda: path.write_text(json.dumps(self.job.result(self.run))) and None, self.place / "result.log")
        return json.loads(path.read_text())

    def time(self) -> tuple[float, float]:
        """Runs the command uninterrupted: seconds until there is something to go on from, and until the end."""
        began = time.monotonic()
        children = self.begin()
        if any(code is not None for code in wait(children, until=(self.run / self.job.begins).exists)):
            raise RuntimeError(f"{self.job.verb} fails: {self.said(0)}")
        first = time.monotonic() - began
        if set(codes := wait(children)) != {0}:
            raise RuntimeError(f"{self.job.verb} fails: {codes} {self.said(0)}")
        return first, time.monotonic() - began


def interrupt(bench: Bench, kind: str, moment: float, rng: Random) -> str | None:
    """Runs the command until something happens to it; returns what was wrong with its answer."""
    children = bench.begin()
    end = time.monotonic() + moment
    codes = wait(children, until=lambda: time.monotonic() >= end)
    running = [child for child, code in zip(children, codes, strict=True) if code is None]
    if not running:
        return None  # it was faster than expected
    if kind == "kill":
        end_all(running)
        return None
    victim = rng.choice(running)
    others = [child for child in running if child != victim]
    if kind == "term":
        os.kill(victim, signal.SIGTERM)
        codes = wait([victim])
        if met := bench.run.exists():
            codes += wait(others)
        else:  # nobody tells them
            end_all(others)
        good = [{0}, {75}] if met else [{0}, {75}, {-signal.SIGTERM}]
        if set(codes) not in good:
            return f"SIGTERM: exit codes {codes}: {' | '.join(bench.said(i) for i in range(len(children)))}"
        return None
    end_all([victim])
    began = time.monotonic()
    codes = wait(others, SURVIVOR_SECONDS)
    for child, code in zip(others, codes, strict=True):
        said = bench.log(children.index(child)).read_text(errors="replace")
        if code is None:
            return f"waits for ever after its partner's end: {said[-600:]}"
        if code not in (0, 75) and not ("another process" in said or "another task" in said):
            return f"exit code {code} after {time.monotonic() - began:.0f} s, and does not say why: {said[-600:]}"
    return None


def attempt(bench: Bench, kind: str, rng: Random, expected: dict, times: tuple[float, float]) -> tuple[str | None, str]:
    """Interrupts one run, lets it go on, and compares.

    Returns:
        What is wrong (None: nothing), and what was done.
    """
    if kind == "damage":
        done = f"damage: {damage(newest(bench.run), rng.randrange(2**32))}"
        wrong = None
    else:
        bench.clear()
        first, last = times
        moment = rng.uniform(rng.choice((0, first)), last)
        done = f"{kind} after {moment:.2f} s of {last:.2f}"
        wrong = interrupt(bench, kind, moment, rng)
    wrong = wrong or bench.complete()
    if wrong is None:
        actual = bench.result()
        names = [name for name in expected | actual if expected.get(name) != actual.get(name)]
        if names:
            one, other = (json.dumps(result.get(names[0]))[:300] for result in (actual, expected))
            wrong = f"{len(names)} differ, first {names[0]}: {one} instead of {other}"
    return wrong, done


def newest(run: Path) -> Path:
    """The newest checkpoint of a run."""
    return max((run / "checkpoints").iterdir(), key=lambda path: int(path.name) if path.name.isdigit() else -1)


def main() -> int:
    """Returns 0 if all are exact."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="how many to try")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--verb", default="dpo", choices=JOBS, help="the command")
    parser.add_argument("--kind", default="kill", choices=KINDS, help="what happens to it")
    parser.add_argument("--keep", type=Path, help="folder for what runs leave that are not exact")
    parser.add_argument("--verbose", action="store_true", help="name all moments")
    options = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="faults-"))  # a `TemporaryDirectory` ends with the first forked process
    try:
        return try_all(options, place)
    finally:
        shutil.rmtree(place)


def try_all(options: argparse.Namespace, place: Path) -> int:
    """See `main`."""
    job, counts = JOBS[options.verb], Counter()
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COMPILATION_CACHE_DIR": str(place / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XDG_CACHE_HOME": str(place / "caches"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    if job.processes > 1:  # cached programs may deadlock on several devices (`store.user_cache.keep_programs`)
        del os.environ["JAX_COMPILATION_CACHE_DIR"]
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    in_child(lambda: prepare(place), place / "prepare.log")
    # Imported once, before any thread is started, so that each run can fork.
    for name in IMPORTED:
        importlib.import_module(name)

    bench = Bench(job, place)
    for _ in range(2 if job.processes == 1 else 1):  # the second time, programs are compiled
        bench.clear()
        times = bench.time()
    expected = bench.result()
    shutil.copytree(bench.run, place / "whole")
    print(f"{options.verb}: {times[1]:.1f} s uninterrupted, {times[0]:.1f} s until it can go on", flush=True)
    for number in range(options.kills):
        rng = Random(f"{options.seed} {options.verb} {options.kind} {number}")
        if options.kind == "damage":
            bench.clear()
            shutil.copytree(place / "whole", bench.run)
        wrong, done = attempt(bench, options.kind, rng, expected, times)
        counts["exact" if wrong is None else "wrong"] += 1
        if wrong or options.verbose:
            print(f"{number}: {done}: {wrong or 'exact'}", flush=True)
        if wrong and options.keep:
            with contextlib.suppress(FileNotFoundError):
                shutil.copytree(bench.run, options.keep / f"{options.verb}-{options.kind}-{number}")
            shutil.copytree(place / "logs", options.keep / f"{options.verb}-{options.kind}-{number}-logs")
    print(f"{options.verb}, {options.kind}: {counts.total()} tried, {counts['exact']} exact")
    return 0 if counts["wrong"] == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
