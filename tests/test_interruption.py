"""Errors of the network between processes of a job."""

import jax
import pytest

from qstar_jax.errors import InputError
from qstar_jax.interruption import naming_a_lost_partner

GLOO = "INTERNAL: Gloo all-reduce failed: Connection closed by peer [127.0.0.1]:40125\nmore"


@pytest.mark.parametrize(
    ("partners", "error", "says"),
    [
        (True, RuntimeError(GLOO), r"another process of this job has ended.*closed by peer .*--resume auto"),
        (True, ValueError("UNAVAILABLE: Task 1 heartbeat timeout."), "another process of this job has ended"),
        (False, RuntimeError(GLOO), "^INTERNAL: Gloo"),
        (True, RuntimeError("RESOURCE_EXHAUSTED: out of memory"), "^RESOURCE_EXHAUSTED"),
        (True, InputError("mirror: gloo is no optimizer"), "^mirror: gloo"),
    ],
)
def test_the_end_of_another_process_is_named(partners, error, says, monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: partners)
    with pytest.raises((RuntimeError, ValueError), match=says), naming_a_lost_partner():
        raise error
