"""Where the wall time of a loop goes."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import jax

_COMPILATION = "/jax/core/compile/"  # events of JAX: tracing, lowering, and the compiler or its cache
PARTS = ("steps", "compilation", "data", "evaluation", "saving")


class WallTime:
    """Seconds that each part of a loop took; a context manager, entered where the loop begins.

    It is the clock of the host. What the devices do meanwhile costs nothing: data that are made while they compute are
    `data`, and `steps` is what the host waits for them, or does between the other parts.
    """

    def __init__(self):
        self._start()

    def _start(self):
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._part, self._since = "steps", time.perf_counter()
        self._compilations: list[tuple[float, float]] = []
        self._thread = threading.get_ident()

    def __enter__(self) -> "WallTime":
        """Starts the clock, and listens to what JAX says of its compilations."""
        self._start()
        jax.monitoring.register_event_duration_secs_listener(self._hear)
        return self

    def __exit__(self, *_):
        """Stops listening."""
        jax.monitoring.unregister_event_duration_listener(self._hear)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts what happens inside of the context as another part."""
        before = self._part
        self._enter(name)
        try:
            yield
        finally:
            self._enter(before)

    def shares(self) -> dict[str, float]:
        """Returns the share of each part in the time so far, `perf/time_...`; their sum is 1."""
        self._enter(self._part)
        total = sum(self._seconds.values())
        return {f"perf/time_{name}": seconds / total for name, seconds in self._seconds.items()}

    def _enter(self, part: str):
        """Ends the current part: its time is its own, less what was compiled in it."""
        now = time.perf_counter()
        compilation = sum(end - max(begin, self._since) for begin, end in self._compilations)
        self._seconds["compilation"] += compilation
        self._seconds[self._part] += now - self._since - compilation
        self._part, self._since, self._compilations = part, now, []

    def _hear(self, event: str, seconds: float, **_):
        if not event.startswith(_COMPILATION) or threading.get_ident() != self._thread:
            return
        end = time.perf_counter()
        begin = end - seconds
        # Events nest: the outer one comes last, and takes the place of those inside of it.
        while self._compilations and self._compilations[-1][0] >= begin:
            self._compilations.pop()
        if self._compilations:
            begin = max(begin, self._compilations[-1][1])
        self._compilations.append((begin, end))
