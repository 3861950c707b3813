"""Numbers that options of all variants may have: declared on their fields, checked here."""

from dataclasses import field, fields, is_dataclass
from typing import Any

from qstar_jax.config.variants import inside
from qstar_jax.errors import InputError

SEEDS = "[-9e18, 9e18]"  # JAX takes 64 bits


def ranged(default: Any, bounds: str) -> Any:
    """Declares an option that may have the numbers of an interval, such as "[0, 0.5)"; null is always allowed."""
    return field(default=default, metadata={"bounds": bounds})


def check_ranges(options: Any, block: str = ""):
    """Refuses numbers out of range.

    Args:
        options: A configuration, or a block of one.
        block: Dotted name of the block; the blocks inside it are checked too.

    Raises:
        InputError: If one is; it names the option, its value, and what is allowed.
    """
    for option in fields(options):
        name = f"{block}.{option.name}" if block else option.name
        value, bounds = getattr(options, option.name), option.metadata.get("bounds")
        if is_dataclass(value):
            check_ranges(value, name)
        elif bounds and value is not None and not inside(value, bounds):
            raise InputError(f"--{name} is {value!r}; expected a number in {bounds}")
