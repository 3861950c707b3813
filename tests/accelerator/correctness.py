"""What this library computes on the accelerator, against what it computes on the CPU.

    python tests/accelerator/correctness.py [--tiny true] [--limit 105]

Prints a line of JSON per check. Both sides run in one process, the CPU's in float32. Compilation takes most of the
time, so the checks are spread over several processes, which share a GPU; what has not begun when time is up is reported
as such.
"""

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

from jsonargparse import auto_cli

FLAGS = {
    # Trying all algorithms for each of hundreds of small matrix products would take all the time.
    False: "--xla_gpu_autotune_level=0",
    # On a CPU nothing here runs long enough to be optimized.
    True: "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1",
}


def checks(tiny: bool) -> dict[str, Callable[[], dict[str, Any]]]:
    """All checks by their names, those that must begin a process first."""
    import check_attention as attention
    import check_families as families
    import check_storage as storage

    memory = {"vocabulary": 4096, "lengths": (256, 1024)} if tiny else {"vocabulary": 32768, "lengths": (512, 4096)}
    found = {"memory of the log-prob kernel": partial(storage.check_logprob_memory, **memory)}
    found["checkpoint"] = partial(storage.check_checkpoint, "qwen3")
    for case in attention.TINY_CASES if tiny else attention.CASES:
        for option, dtypes in attention.options().items():
            for dtype in dtypes:
                label = f"{option} {dtype} {case.width}"
                found[f"attention {label}"] = partial(attention.check_attention, option, dtype, case)
                found[f"unseen tokens {label}"] = partial(attention.check_unseen, option, dtype, case)
    names = families.TINY_NAMES if tiny else families.NAMES
    return found | {f"family {name}": partial(families.check_family, name) for name in names}


def work(tiny: bool, share: int, of: int, limit: float):
    """Runs every `of`-th check from number `share` on, and prints its record; skips what cannot begin in time."""
    began = time.monotonic()
    for number, (name, check) in enumerate(checks(tiny).items()):
        if number % of != share:
            continue
        start = time.monotonic()
        if start - began > limit:
            record = {"name": name, "ok": False, "error": f"not begun within {limit:g} seconds"}
        else:
            try:
                record = check()
            except Exception as error:  # the other checks go on
                record = {"name": name, "ok": False, "error": f"{type(error).__name__}: {error}"}
        print(json.dumps(record | {"seconds": round(time.monotonic() - start, 1)}), flush=True)


def main(tiny: bool = False, limit: float = 105.0, processes: int = 0, share: int = -1):
    """Runs all checks in several processes, and exits with 1 if one failed.

    Args:
        tiny: Whether to check few families and short sequences.
        limit: Seconds after which no check begins.
        processes: Number of processes; by default one per core, at most 12, and 1 on a TPU, which serves only one.
        share: Which share of the checks this process runs; by default it starts a process for each.
    """
    processes = processes or (1 if find_spec("libtpu") else min(os.cpu_count() or 1, 12))
    if share >= 0:
        work(tiny, share, processes, limit)
        return
    words = [sys.executable, __file__, f"--tiny={str(tiny).lower()}", f"--limit={limit}", f"--processes={processes}"]
    flags = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS[tiny]}"
    environment = os.environ | {"XLA_FLAGS": flags, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    workers = [
        subprocess.Popen([*words, f"--share={number}"], stdout=subprocess.PIPE, text=True, env=environment)
        for number in range(processes)
    ]
    passed = True
    for line in lines_of(workers):
        print(line, end="", flush=True)
        passed &= line.startswith("{") and json.loads(line)["ok"]
    codes = [worker.wait() for worker in workers]
    for number, code in enumerate(codes):
        if code:
            error = f"ended with exit code {code}; its other checks are lost"
            print(json.dumps({"name": f"process {number}", "ok": False, "error": error}), flush=True)
    sys.exit(not passed or any(codes))


def lines_of(workers: list[subprocess.Popen]) -> Iterator[str]:
    """Yields the lines that all processes print, as they come."""
    lines = queue.SimpleQueue()

    def read(worker: subprocess.Popen):
        for line in worker.stdout:
            lines.put(line)
        lines.put(None)

    for worker in workers:
        threading.Thread(target=read, args=(worker,), daemon=True).start()
    running = len(workers)
    while running:
        if (line := lines.get()) is None:
            running -= 1
        else:
            yield line


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
