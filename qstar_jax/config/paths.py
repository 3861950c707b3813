"""Options that name files lie on this machine. Addresses elsewhere are refused, or they would become folder names."""

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from qstar_jax.errors import InputError

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/.*", re.DOTALL)  # two letters at least: C:/ is a drive


def check_paths(options: Any):
    """Refuses addresses such as gs://bucket/run where a path is expected.

    Raises:
        InputError: If an option that is declared as a path is one.
    """
    for name, value in _paths(options):
        if _ADDRESS.fullmatch(value):
            scheme = value.partition(":")[0]
            raise InputError(
                f"--{name} {value}: expected a path on this machine (or a hub name, where models and data are read), "
                f"and {scheme}:// addresses are not opened yet; copy or mount it and give that path"
            )


def _paths(value: Any, name: str = "", is_path: bool = False) -> Iterator[tuple[str, str]]:
    """Yields dotted name and value of each path among options; the members of a list share its name."""
    if isinstance(value, str) and is_path:
        yield name, value
    elif isinstance(value, list | tuple):
        for member in value:
            yield from _paths(member, name, is_path)
    elif is_dataclass(value):
        for option in fields(value):
            dotted = f"{name}.{option.name}" if name else option.name
            yield from _paths(getattr(value, option.name), dotted, option.metadata.get("path", False))
