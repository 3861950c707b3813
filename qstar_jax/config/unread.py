"""Options that nothing reads, because of what others say: refused where they were given."""

from collections.abc import Iterable
from operator import attrgetter
from typing import Any

from qstar_jax.errors import InputError


def check_unread(given: Any, unset: Any, names: Iterable[str], why: str):
    """Refuses options that were given and would not be read.

    Args:
        given: A configuration.
        unset: One with the defaults of these options.
        names: Their dotted names.
        why: Why they have no effect, and what to do: what follows in "--seed 3 has no effect without --samples".

    Raises:
        InputError: If one of them is not its default.
    """
    for name in names:
        value, default = (attrgetter(name)(options) for options in (given, unset))
        if value != default:
            raise InputError(f"--{name} {value} has no effect {why}")
