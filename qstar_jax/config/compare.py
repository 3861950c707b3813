"""Options in files: reading those that earlier versions wrote, and comparing them with those of today."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from qstar_jax.config import VARIANT_BLOCKS, DataOptions
from qstar_jax.config.variants import declarations, filled_in, variant_of


def drop_unread_defaults(tree: dict) -> dict:
    """Drops options that a block's variant does not read if they have their default: config.yaml may spell out all.

    Returns:
        The others. An option that is not read and differs from its default stays, and is refused later.
    """
    blocks = _variant_blocks(tree)
    return tree | {name: _drop_unread_defaults(tree[name], block) for name, block in blocks.items()}


def _drop_unread_defaults(values: dict, block: type) -> dict:
    variant, declared = variant_of(values, block), declarations(block)

    def is_needed(name: str, value: Any) -> bool:
        if name not in declared or variant in declared[name].defaults:
            return True
        return any(default != value for default in declared[name].defaults.values())

    return {name: value for name, value in values.items() if is_needed(name, value)}


def keep_date(options: DataOptions, stored: dict) -> DataOptions:
    """Takes over the date that chat templates were told when a run or folder was begun, unless the options name one."""
    return options if options.date is not None else replace(options, date=(stored.get("data") or {}).get("date"))


def first_difference(stored: dict, given: dict, free: Collection[str] = ()) -> tuple[str, Any, Any] | None:
    """Finds the first option whose value differs; an option that is not given has the default of its variant.

    Args:
        stored: Options as nested dictionaries.
        given: Others.
        free: Dotted names of options, or of groups of them, that may differ.

    Returns:
        Dotted name, stored value, given value; None where an option is missing. None if all are equal.
    """
    stored, given = _flatten(_complete(stored)), _flatten(_complete(given))
    for name in sorted(stored.keys() | given.keys()):
        is_free = any(name == option or name.startswith(option + ".") for option in free)
        if not is_free and stored.get(name) != given.get(name):
            return name, stored.get(name), given.get(name)
    return None


def _complete(tree: dict) -> dict:
    """Fills in defaults; versions that stored those of options which the variant does not read are compared as well."""
    return tree | {name: tree[name] | filled_in(tree[name], block) for name, block in _variant_blocks(tree).items()}


def _variant_blocks(tree: dict) -> dict[str, type]:
    return {name: block for name, block in VARIANT_BLOCKS.items() if isinstance(tree.get(name), dict)}


def _flatten(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
