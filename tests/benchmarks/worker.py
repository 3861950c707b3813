"""A library that is measured, as a process of its own that stays alive and answers lines with lines of JSON."""

import json
import os
import subprocess
import sys
from pathlib import Path

# A step allocates gigabytes anew, and in pages of 4 KiB a million page faults cost up to a sixth of its time.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


class Worker:
    """A library in a process of its own.

    Args:
        words: Its command line.
        python: The interpreter that has the library.
    """

    def __init__(self, words: list[str], python: str = sys.executable):
        self._process = subprocess.Popen(
            [python, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env=os.environ | HUGE_PAGES,
        )
        self.ready = self._read()

    def _read(self) -> dict:
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"{self._process.args[1]} ended without an answer (exit code {self._process.wait()})")

    def ask(self, request: str) -> dict:
        """Sends a request and waits for the answer."""
        self._process.stdin.write(request + "\n")
        self._process.stdin.flush()
        return self._read()
