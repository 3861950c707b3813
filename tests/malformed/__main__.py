"""Tries all malformed inputs, each in a process of its own: `python -m tests.malformed --seed 0`.

Prints those that are answered wrongly, and how many were tried and right.
"""

import argparse
import contextlib
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parent))

from case import LIMIT_BYTES, LIMIT_SECONDS, Case, Place, problem
from table import CASES

_ROOM = 6 * 2**30  # bytes of data at which the system refuses more, to protect the machine


def attempt(case: Case, seed: int, folder: Path) -> tuple[str | None, float, int]:
    """Runs the command of a case in a forked process.

    Returns:
        What is wrong (None: nothing), and the seconds and the bytes that it took.
    """
    place = Place(folder / "place")
    place.folder.mkdir()
    words = case.write(place, Random(f"{seed} {case.name}"))
    out, err, start = folder / "stdout", folder / "stderr", time.monotonic()
    child = os.fork()
    if child == 0:
        os._exit(_run(words, out, err))
    late = False
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() - start > LIMIT_SECONDS:
            late = True
            os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    seconds, size = time.monotonic() - start, usage.ru_maxrss * 1024
    if late:
        return f"a hang of more than {LIMIT_SECONDS} s", seconds, size
    if size > LIMIT_BYTES:
        return f"{size / 2**30:.1f} GiB of memory", seconds, size
    code = os.waitstatus_to_exitcode(status)
    message = err.read_text(encoding="utf-8", errors="replace")
    shown = out.read_text(encoding="utf-8", errors="replace")
    wrong = problem(None if code in (77, *range(-64, 0)) else code, message, case.says)
    return wrong or (problem(2, message + shown, "") and f"its output {problem(2, shown, '')}"), seconds, size


def _run(words: list[str], out: Path, err: Path) -> int:
    """Runs the command in this process; returns its exit code, or 77 after a traceback."""
    from qstar_jax.cli.main import main

    resource.setrlimit(resource.RLIMIT_DATA, (_ROOM, _ROOM))
    with out.open("w") as sys.stdout, err.open("w") as sys.stderr:
        try:
            return main(words)
        except SystemExit as error:
            return error.code if isinstance(error.code, int) else 1
        except BaseException:
            with contextlib.suppress(BaseException):
                traceback.print_exc()
            return 77


def main() -> int:
    """Returns 0 if all are answered rightly."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the random choices of each case")
    parser.add_argument("--only", default="", help="part of the names of the cases to try")
    parser.add_argument("--heavy", action="store_true", help="only those that need limits on time or memory")
    parser.add_argument("--verbose", action="store_true", help="name all cases, with seconds and memory")
    options = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Imported once, before any thread is started, so that each case can fork.
    import transformers  # noqa: F401

    import qstar_jax.cli.data
    import qstar_jax.cli.dpo
    import qstar_jax.cli.export  # noqa: F401

    tried, right, slowest, largest = Counter(), Counter(), 0.0, 0
    for case in CASES:
        if options.only not in case.name or (options.heavy and not case.heavy):
            continue
        kind = case.name.partition(":")[0]
        with tempfile.TemporaryDirectory() as folder:
            wrong, seconds, size = attempt(case, options.seed, Path(folder))
        tried[kind] += 1
        right[kind] += wrong is None
        slowest, largest = max(slowest, seconds), max(largest, size)
        if wrong or options.verbose:
            print(f"{case.name!a}: {wrong or 'right'} ({seconds:.1f} s, {size / 2**20:.0f} MiB)", flush=True)
    for kind in tried:
        print(f"{kind:<24}{tried[kind]:4} tried {right[kind]:4} right")
    print(f"{'all':<24}{tried.total():4} tried {right.total():4} right")
    print(f"at most {slowest:.1f} s and {largest / 2**20:.0f} MiB each")
    return 0 if tried == right else 1


if __name__ == "__main__":
    sys.exit(main())
