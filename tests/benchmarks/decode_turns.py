"""What the workers of beam_vs_hf.py have in common: the same prompts, and answers to `beams K`, `sample N` and `stop`.

It needs numpy only, because the libraries live in several environments. A worker decodes once for each request to come,
and prints a line of JSON with "ready" and the best answers of its beams. Then it answers requests with "seconds",
"tokens" and "peak_memory_bytes". All else that libraries print goes to standard error.
"""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from worker import process_peak_bytes


def random_prompts(batch: int, length: int, vocabulary: int) -> np.ndarray:
    """Random tokens [batch, length], none of them among the first three, which are often special."""
    return np.random.default_rng(0).integers(3, vocabulary, (batch, length), dtype=np.int32)


def reset_process_peak():
    """Lets the peak that Linux keeps of this process's memory begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def serve(
    run: Callable[[str, int], np.ndarray],
    settings: Sequence[str],
    *,
    count: Callable[[], dict] = dict,
    close: Callable[[], dict] = dict,
    peak: Callable[[], int] = process_peak_bytes,
    reset_peak: Callable[[], None] = reset_process_peak,
    **about: object,
):
    """Answers requests until there are no more.

    Args:
        run: Decodes with so many beams, or draws so many samples: (`beams` or `sample`, number) -> tokens, shape
            [batch, T] or [batch * N, T].
        settings: Requests that there will be, such as `beams 5`.
        count: Numbers that are said after the warm-up and after each turn.
        close: What is said at the end; what it takes does not count as the memory of decoding.
        peak: Reads the largest memory so far, in bytes.
        reset_peak: Lets it begin anew.
        **about: Said once, when ready.
    """
    answers_to = sys.stdout

    def say(**answer):
        print(json.dumps(answer), file=answers_to, flush=True)

    with contextlib.redirect_stdout(sys.stderr):
        answers = {}
        for setting in settings:
            kind, number = setting.split()
            found = np.asarray(run(kind, int(number)))
            if kind == "beams":
                answers[setting] = found.tolist()
        say(ready=True, answers=answers, **about, **count())
        for line in sys.stdin:
            if line.split()[:1] in ([], ["stop"]):
                break
            kind, number = line.split()
            reset_peak()
            start = time.perf_counter()
            found = np.asarray(run(kind, int(number)))
            seconds = time.perf_counter() - start
            say(seconds=seconds, tokens=found.size, peak_memory_bytes=peak(), **count())
        say(**close())
