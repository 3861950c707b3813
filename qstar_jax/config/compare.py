"""Comparing the settings of two runs, so that one goes on only with what it began with."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from qstar_jax.config.data import DataOptions


def keep_date(options: DataOptions, stored: dict) -> DataOptions:
    """Takes over the date that chat templates were told when something was begun, where the options name none.

    Args:
        options: Those of now.
        stored: All options of then, as nested dictionaries.
    """
    return options if options.date is not None else replace(options, date=(stored.get("data") or {}).get("date"))


def first_difference(stored: dict, given: dict, free: Collection[str] = ()) -> tuple[str, Any, Any] | None:
    """Finds the first option whose value differs.

    Args:
        stored: Options as nested dictionaries.
        given: Others.
        free: Dotted names of options, or of groups of them, that may differ.

    Returns:
        Dotted name, stored value, given value; None where an option is missing. None if all are equal.
    """
    stored, given = _flatten(stored), _flatten(given)
    for name in sorted(stored.keys() | given.keys()):
        is_free = any(name == option or name.startswith(option + ".") for option in free)
        if not is_free and stored.get(name) != given.get(name):
            return name, stored.get(name), given.get(name)
    return None


def _flatten(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
