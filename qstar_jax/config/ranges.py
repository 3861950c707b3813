"""Numbers that options of all variants may have: declared on their fields, checked here."""

from dataclasses import field, fields, is_dataclass
from functools import partial
from typing import Any

from qstar_jax.config.variants import inside
from qstar_jax.errors import InputError

SEEDS = "[-9e18, 9e18]"  # JAX takes 64 bits


def ranged(default: Any, bounds: str) -> Any:
    """Declares an option that may have the numbers of an interval, such as "[0, 0.5)", or a list of such numbers.

    Null is always allowed.
    """
    if isinstance(default, list):
        return field(default_factory=partial(list, default), metadata={"bounds": bounds})
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
            continue
        numbers = {f"{name}[{n}]": each for n, each in enumerate(value)} if isinstance(value, list) else {name: value}
        for place, number in numbers.items():
            if bounds and number is not None and not inside(number, bounds):
                raise InputError(f"--{place} is {number!r}; expected a number in {bounds}")
