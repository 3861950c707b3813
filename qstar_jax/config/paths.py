"""Options that name files: paths of this machine, or addresses elsewhere, which commands replace by paths."""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, is_dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

from qstar_jax.errors import InputError

WRITTEN = ("out", "export", "reference.cache", "judge.cache")  # options that name a folder to write

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/.*", re.DOTALL)  # two letters at least: C:/ is a drive
_COPY = re.compile(r".*/qstar_jax/cloud/(?:copies|folders)/([^/]+)/(.*)", re.DOTALL)  # see `store.cloud`


def check_paths(options: Any):
    """Refuses addresses such as gs://bucket/run where a path is expected, or they would become folder names.

    Raises:
        InputError: If an option that is declared as a path is one.
    """
    for name, value in addresses(options):
        raise InputError(
            f"--{name} {value}: expected a path on this machine (or a hub name, where models and data are read); "
            "commands open such addresses, and in Python `with qstar_jax.store.cloud.at_hand(config) as config`"
        )


def check_written(options: Any):
    """Refuses a folder to write (`WRITTEN`) where no folder can be, before anything is loaded.

    Raises:
        InputError: If one is empty, or a file, or inside of one.
    """
    for option in WRITTEN:
        folder = reduce(lambda part, name: getattr(part, name, None), option.split("."), options)
        if not isinstance(folder, str):  # not given, or a flag of the same name
            continue
        if not folder.strip():
            raise InputError(f"--{option} is empty; name a folder to write")
        path = Path(folder).expanduser().absolute()
        nearest = next((place for place in (path, *path.parents) if os.path.lexists(place)), None)
        if nearest and not nearest.is_dir():
            raise InputError(f"--{option} {folder}: {nearest} is no folder; name another, or remove it")


def addresses(options: Any) -> Iterator[tuple[str, str]]:
    """Yields dotted name and value of each option that is an address; the members of a list share its name."""
    found: list[tuple[str, str]] = []
    replace_addresses(options, lambda name, value: found.append((name, value)) or value)
    yield from found


def replace_addresses(options: Any, change: Callable[[str, str], str]) -> Any:
    """Replaces the addresses among the options that are declared as paths.

    Args:
        options: A configuration.
        change: `(dotted name, address)` returns what takes its place.
    """
    return _replaced(options, change, "", False)


def _replaced(value: Any, change: Callable[[str, str], str], name: str, is_path: bool) -> Any:
    if isinstance(value, str) and is_path and _ADDRESS.fullmatch(value):
        return change(name, value)
    if isinstance(value, list | tuple):
        members = [_replaced(member, change, name, is_path) for member in value]
        return members if isinstance(value, list) else tuple(members)
    if not is_dataclass(value):
        return value
    changed = {}
    for option in fields(value):
        dotted = f"{name}.{option.name}" if name else option.name
        before = getattr(value, option.name)
        after = _replaced(before, change, dotted, option.metadata.get("path", False))
        if after != before:
            changed[option.name] = after
    return replace(value, **changed) if changed else value


def recorded(options: Any) -> dict[str, Any]:
    """Returns a configuration as nested dictionaries for files, in which copies have the addresses of their originals.

    So it means the same on every machine.
    """
    return _recorded(asdict(options))


def _recorded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _recorded(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_recorded, value))
    copy = _COPY.fullmatch(value) if isinstance(value, str) else None
    return f"{copy[1]}://{copy[2]}" if copy else value
