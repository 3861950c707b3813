"""Commands of `qstar` in forked processes, which have JAX already; what they say goes to a file."""

import atexit
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

LIMIT_SECONDS = 300


def start(words: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> int:
    """Starts `qstar WORDS`; returns the id of its process."""

    def run() -> int:
        from qstar_jax.cli.main import main

        try:
            return main(list(words))
        except SystemExit as error:
            return error.code if isinstance(error.code, int) else 1

    return _fork(run, log, environment or {})


def in_child(function: Callable[[], None], log: Path):
    """Calls a function that starts threads, after which a process must not fork, in a process of its own."""
    (code,) = wait([_fork(lambda: function() or 0, log, {})])
    if code != 0:
        raise RuntimeError(log.read_text())


def _fork(run: Callable[[], int], log: Path, environment: Mapping[str, str]) -> int:
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 77
    try:
        os.environ.update(environment)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        code = run()
    except BaseException:
        traceback.print_exc()
    # As at the end of an interpreter: JAX leaves a job of several processes here.
    sys.stdout.flush()
    sys.stderr.flush()
    threading._shutdown()
    atexit._run_exitfuncs()
    os._exit(code)


def wait(children: Sequence[int], limit: float = LIMIT_SECONDS, until: Callable[[], bool] | None = None) -> list:
    """Waits for processes to end; those that do not are killed.

    Args:
        children: Their ids.
        limit: Seconds.
        until: Stops waiting, and kills nothing, as soon as it says so.

    Returns:
        Their exit codes; None for a process that was killed here, or that goes on.
    """
    codes: dict[int, int] = {}
    end = time.monotonic() + limit
    while len(codes) < len(children) and time.monotonic() < end and not (until and until()):
        for child in children:
            if child not in codes:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    codes[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    if time.monotonic() >= end:
        end_all([child for child in children if child not in codes])
    return [codes.get(child) for child in children]


def end_all(children: Sequence[int]):
    """Kills processes, and waits for their end."""
    for child in children:
        os.kill(child, signal.SIGKILL)
    for child in children:
        os.waitpid(child, 0)


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
