"""Ends a run where it can go on: at a scheduler's SIGTERM, at Ctrl-C, and at a cloud's notice of maintenance."""

import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from types import FrameType
from typing import Any

from qstar_jax.errors import InputError

TEMPORARY = 75  # EX_TEMPFAIL of sysexits.h: start the same command again
CTRL_C = 130  # 128 + SIGINT, as shells have it

# Numbers of this process's questions whether to stop. At a signal, JAX answers yes to the one that follows the last of
# any process, and to no other: to 1 if there was none yet. Steps would not do, as a resumed run does not begin at 1.
_questions = count(1)


class Stopped(KeyboardInterrupt):
    """A run was asked to stop, and did.

    It is a `KeyboardInterrupt`, so that nothing takes it for a failure.

    Attributes:
        code: Exit code: 75 if a scheduler asked, 130 if it was Ctrl-C.
    """

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


class StopSignals:
    """Listens for SIGTERM and Ctrl-C; a context manager, which does nothing outside of the main thread.

    At first either raises `Stopped` at once, as there is nothing to save. After `defer`, they are noted for
    `requested`, and a second Ctrl-C ends the process without further ado, even inside of a compiler.
    """

    def __init__(self):
        self._deferred = False
        self._code: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        """Begins to listen."""
        if threading.current_thread() is threading.main_thread():
            # Among several processes, JAX listens for SIGTERM, and tells the others.
            heard = (signal.SIGINT,) if _has_partners() else (signal.SIGINT, signal.SIGTERM)
            self._before = {number: signal.signal(number, self._hear) for number in heard}
        return self

    def __exit__(self, *_):
        """Restores what listened before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def defer(self):
        """From now on `requested` is asked, often enough."""
        self._deferred = True

    def requested(self) -> bool:
        """Returns whether to stop now; all processes of a job ask together, and get the same answer."""
        if not _has_partners():
            return self._code is not None
        from jax.experimental.multihost_utils import reached_preemption_sync_point

        return reached_preemption_sync_point(next(_questions))

    def stopped(self, message: str) -> Stopped:
        """What to raise once everything is saved."""
        return Stopped(message, self._code or TEMPORARY)

    def _hear(self, number: int, _: FrameType | None):
        code = CTRL_C if number == signal.SIGINT else TEMPORARY
        if not self._deferred:
            raise Stopped("stopped", code)
        self._code = self._code or code
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if sys.stdout.isatty():
                sys.stdout.write("\x1b[?25h")  # a progress bar hides the cursor, and the next Ctrl-C ends without it
            if _has_partners():
                os.kill(os.getpid(), signal.SIGTERM)  # JAX tells the other processes


# What XLA, Gloo, NCCL and JAX's coordination service say when a partner no longer answers.
_LOST = re.compile(
    r"gloo|nccl|connection (closed|reset|refused)|broken pipe|socket closed|heartbeat|unavailable|coordination service"
    r"|barrier .*(fail|timed out)|another task died",
    re.IGNORECASE,
)


@contextmanager
def naming_a_lost_partner() -> Iterator[None]:
    """Says that another process of the job has ended, where that is the cause of an error.

    Raises:
        RuntimeError: Instead of the error of the transport.
    """
    try:
        yield
    except (RuntimeError, OSError, ValueError) as error:
        if isinstance(error, InputError) or not (_has_partners() and _LOST.search(str(error))):
            raise
        line = str(error).splitlines()[0][:200]
        raise RuntimeError(
            f"another process of this job has ended, or cannot be reached ({line}); its own output says why. Start all "
            "of them again with --resume auto"
        ) from error


def _has_partners() -> bool:
    """Whether this process has joined others."""
    if "jax" not in sys.modules:
        return False
    import jax

    return jax.distributed.is_initialized()
