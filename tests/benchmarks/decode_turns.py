"""What the workers of beam_vs_hf.py have in common: the same prompts, and answers to `beams K`, `sample N` and `stop`.

It needs numpy only, for the libraries live in several environments. A worker decodes once for each request that it will
get, and prints a line of JSON with "ready" and the best answers of its beams. Then it answers requests with "seconds",
"tokens" and "peak_memory_bytes". All else that libraries print goes to standard error.
"""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np


def random_prompts(batch: int, length: int, vocabulary: int) -> np.ndarray:
    """Random tokens [batch, length], none of them among the first three, which are often special."""
    return np.random.default_rng(0).integers(3, vocabulary, (batch, length), dtype=np.int32)


def memory_bytes(field: str) -> int:
    """Reads what Linux counts of this process's memory: VmHWM is the peak, VmRSS the present."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024


def serve(
    run: Callable[[str, int], np.ndarray],
    settings: Sequence[str],
    measure: Callable[[str, int], dict] = lambda kind, count: {},
    **about: object,
):
    """Answers requests until there are no more.

    Args:
        run: Decodes with so many beams, or draws so many samples: (`beams` or `sample`, number) -> tokens, shape
            [batch, T] or [batch * N, T].
        settings: Requests that there will be, such as `beams 5`.
        measure: Further numbers, taken before each turn and outside of its time.
        **about: Said once.
    """
    answers_to = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        baseline = memory_bytes("VmRSS")
        answers = {}
        for setting in settings:
            kind, count = setting.split()
            found = np.asarray(run(kind, int(count)))
            if kind == "beams":
                answers[setting] = found.tolist()
        about |= {"ready": True, "answers": answers, "loaded_bytes": baseline}
        print(json.dumps(about), file=answers_to, flush=True)
        for line in sys.stdin:
            if line.split()[:1] in ([], ["stop"]):
                break
            kind, count = line.split()
            more = measure(kind, int(count))
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
            start = time.perf_counter()
            found = np.asarray(run(kind, int(count)))
            seconds = time.perf_counter() - start
            more |= {"seconds": seconds, "tokens": found.size, "peak_memory_bytes": memory_bytes("VmHWM")}
            print(json.dumps(more), file=answers_to, flush=True)
