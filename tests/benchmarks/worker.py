"""A library that is measured, as a process of its own that stays alive and answers lines with lines of JSON."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TextIO

# A step allocates gigabytes anew, and in pages of 4 KiB a million page faults cost up to a sixth of its time.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


class Worker:
    """A library in a process of its own.

    Args:
        words: Its command line.
        python: The interpreter that has the library.
        environment: Variables that it gets besides ours.
        wait: Whether to wait until it is ready; else `ready` has to be read from `wait_ready`.
    """

    def __init__(
        self, words: list[str], python: str = sys.executable, environment: Mapping[str, str] = {}, *, wait: bool = True
    ):
        self._process = subprocess.Popen(
            [python, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env=os.environ | HUGE_PAGES | environment,
        )
        self.ready = self.wait_ready() if wait else {}

    def wait_ready(self, timeout: float | None = None) -> dict:
        """Waits for the first answer, which says that the worker is ready; at most `timeout` seconds."""
        self.ready = self._read(timeout)
        return self.ready

    def _read(self, timeout: float | None = None) -> dict:
        late = threading.Event()

        def stop():
            late.set()
            self._process.kill()

        timer = threading.Timer(timeout or 0, stop)
        if timeout is not None:
            timer.start()
        try:
            answer = next((json.loads(line) for line in self._process.stdout if line.startswith("{")), None)
        finally:
            timer.cancel()
        program = Path(self._process.args[1]).name
        if late.is_set():
            raise TimeoutError(f"{program} gave no answer within {timeout:.0f} seconds")
        if answer is None:
            raise RuntimeError(f"{program} ended without an answer (exit code {self._process.wait()})")
        if "error" in answer:
            raise RuntimeError(f"{program}: {answer['error']}")
        return answer

    def ask(self, request: str, timeout: float | None = None) -> dict:
        """Sends a request and waits for the answer, at most `timeout` seconds."""
        self._process.stdin.write(request + "\n")
        self._process.stdin.flush()
        return self._read(timeout)

    def kill(self):
        """Ends the process, if it still runs, and waits until what it held is free."""
        self._process.kill()
        self._process.wait()


def process_peak_bytes() -> int:
    """Reads the peak that Linux keeps of this process's memory."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


class Turns:
    """The other end of a `Worker` that trains: it takes the steps that its parent asks for, and says how they went.

    `begin I` asks for a fresh model and one step on the pairs of the I-th file, `step N` for N more steps, `step N
    FOLDER` for a trace of them, `stop` for the end. The answers to the first two have the fields `seconds`, `pairs`,
    `losses`, `peak_memory_bytes`, the sums of what the steps counted, and `facts`.

    Attributes:
        facts: Said with each answer.

    Args:
        answers: Where the answers go.
        peak_memory_bytes: Tells the largest memory so far.
        trace: Records what runs inside it into a folder.
        **about: Said once, when ready.
    """

    def __init__(
        self,
        answers: TextIO,
        peak_memory_bytes: Callable[[], int] = process_peak_bytes,
        trace: Callable[[str], contextlib.AbstractContextManager] | None = None,
        **about: object,
    ):
        self._answers, self._peak_memory_bytes, self._trace = answers, peak_memory_bytes, trace
        self._tracing = contextlib.ExitStack()
        self.facts: dict[str, object] = {}
        self.answer(ready=True, **about)
        self._read_request()

    def answer(self, **fields: object):
        """Says something to the parent."""
        print(json.dumps(fields), file=self._answers, flush=True)

    def begun(self) -> Iterator[int]:
        """Yields the index of the file of each `begin`; a step that goes on after it has to call `wants_more`."""
        while self._request[:1] == ["begin"]:
            index = int(self._request[1])
            self._start(steps=1)
            yield index
        if self._request not in ([], ["stop"]):
            sys.exit(f"unknown request {' '.join(self._request)!r}; expected begin I, step N [FOLDER] or stop")
        self.answer(stopped=True)

    def wants_more(self, loss: float, pairs: int, **counts: float) -> bool:
        """Takes the loss and the counts of a complete step; answers and waits if it was the last one asked for."""
        self._losses.append(loss)
        self._counts.update(counts | {"pairs": pairs})
        if len(self._losses) < self._steps:
            return True
        seconds = time.perf_counter() - self._began
        self._tracing.close()
        peak = self._peak_memory_bytes()
        self.answer(seconds=seconds, losses=self._losses, peak_memory_bytes=peak, **self._counts, **self.facts)
        return self._read_request()

    def _start(self, steps: int):
        self._steps, self._losses, self._counts, self._began = steps, [], Counter(), time.perf_counter()

    def _read_request(self) -> bool:
        """Reads the next request; False if it is not about more steps."""
        self._request = sys.stdin.readline().split()
        match self._request:
            case ["step", steps, *folder] if steps.isdecimal() and int(steps) > 0:
                if folder:
                    self._tracing.enter_context(self._trace(folder[0]))
                self._start(int(steps))
                return True
        return False


@contextlib.contextmanager
def answering(answers: TextIO) -> Iterator[None]:
    """Keeps standard output for answers: all else that libraries print goes to standard error, an error is answered."""
    with contextlib.redirect_stdout(sys.stderr):
        try:
            yield
        except Exception as error:
            print(json.dumps({"error": f"{type(error).__name__}: {error}"[:1000]}), file=answers, flush=True)
            raise
