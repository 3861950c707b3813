"""A trace of some steps, for the viewer xprof: which operation takes how long."""

import re
from pathlib import Path
from typing import Any

import jax

from qstar_jax.errors import InputError


class StepProfile:
    """Traces steps first, first + 1, ..., last - 1; a context manager, which ends a trace that is not complete.

    Args:
        folder: Where the traces go; each process of a job writes its own.
        first: First step of the trace, counted from 0 as in metrics.jsonl.
        last: The step after its last one.
    """

    def __init__(self, folder: Path, first: int, last: int):
        self._folder, self._first, self._last = folder, first, last
        self._is_tracing = False

    def __enter__(self) -> "StepProfile":
        """Returns itself."""
        return self

    def __exit__(self, *_):
        """Ends the trace if the loop ended in it."""
        self._end()

    def before(self, step: int, state: Any):
        """Begins the trace where a step is its first one, or the first of a resumed run inside of it."""
        if self._first <= step < self._last and not self._is_tracing:
            jax.block_until_ready(state)  # or the trace would begin with earlier steps
            jax.profiler.start_trace(str(self._folder))
            self._is_tracing = True

    def after(self, done: int, state: Any):
        """Ends the trace after its last step, once the devices are done with it."""
        if done == self._last and self._is_tracing:
            jax.block_until_ready(state)
            self._end()

    def _end(self):
        if self._is_tracing:
            self._is_tracing = False
            jax.profiler.stop_trace()


def profile_range(text: str | None) -> tuple[int, int] | None:
    """Reads `train.profile`: the first step and the one after the last, as in a slice of Python.

    Raises:
        InputError: If it is no such range.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,15}):(\d{1,15})", text)
    if match is None or not int(match[1]) < int(match[2]):
        raise InputError(
            f"train.profile {text}: expected FIRST:LAST, such as 10:13 for a trace of the steps 10, 11 and 12"
        )
    return int(match[1]), int(match[2])


def make_profile(text: str | None, out: Path, steps: int) -> StepProfile | None:
    """Makes the profile of a run, in the folder `profile` of the run; None if there is to be none.

    Raises:
        InputError: If the run has no such steps.
    """
    span = profile_range(text)
    if span is None:
        return None
    if span[1] > steps:
        raise InputError(
            f"train.profile {text}: the run has {steps} steps, 0 to {steps - 1}; expected a part of 0:{steps}"
        )
    return StepProfile(out / "profile", *span)
