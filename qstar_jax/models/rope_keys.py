"""Rotary positions in config.json, in the format of transformers 5 (`rope_parameters`) and in older formats."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from types import MappingProxyType
from typing import Any

from qstar_jax.errors import InputError
from qstar_jax.models.config_keys import Keys, check_number
from qstar_jax.models.rope import SCALINGS, LongRope, Rope, Scaling


def read_rope(
    keys: Keys,
    *,
    theta: float,
    theta_keys: Sequence[str] = ("rope_theta",),
    fraction: float = 1.0,
    fraction_keys: Sequence[str] = (),
    original: int | None = None,
    aliases: Mapping[str, str] = MappingProxyType({}),
) -> Rope:
    """Reads the rotary positions of a model in which all layers share them.

    Args:
        keys: The config.json.
        theta: Default base.
        theta_keys: Older keys of the base, at the top level.
        fraction: Default fraction of rotated dimensions.
        fraction_keys: Older keys of that fraction; empty: the family always rotates all dimensions.
        original: Default of the context before scaling; None: `max_position_embeddings`.
        aliases: Other names of scaling types.

    Raises:
        InputError: If older and newer keys contradict each other, or the scaling is unknown, lacks a parameter or has
            an unknown one.
    """
    old, new = (rope_dictionary(keys, name, aliases) for name in ("rope_scaling", "rope_parameters"))
    parameters = merge_formats(old, new, "rope_scaling", "rope_parameters")
    share = _pop_value(parameters, "partial_rotary_factor", keys, fraction_keys or ("partial_rotary_factor",), fraction)
    if share != 1 and not fraction_keys:
        raise InputError(
            f"config.json: partial_rotary_factor is {share!r}; {keys.model_type} models rotate all dimensions of a head"
        )
    base = _pop_value(parameters, "rope_theta", keys, theta_keys, theta)
    return make_rope(keys, parameters, theta=base, fraction=share, original=original)


def make_rope(
    keys: Keys, parameters: Mapping[str, Any], *, theta: float, fraction: float = 1.0, original: int | None = None
) -> Rope:
    """Makes rotary positions from a dictionary returned by `rope_dictionary`.

    Args:
        keys: The config.json, whose other keys determine context lengths.
        parameters: The dictionary; its `rope_theta` takes precedence over `theta`.
        theta: The base.
        fraction: Fraction of rotated dimensions.
        original: See `read_rope`.

    Raises:
        InputError: If the scaling is unknown, lacks a parameter or has an unknown one.
    """
    parameters = dict(parameters)
    theta = parameters.pop("rope_theta", theta)
    check_number("rope_theta", theta)
    check_number("partial_rotary_factor", fraction)
    if fraction > 1:
        raise InputError(f"config.json: partial_rotary_factor is {fraction!r}; expected at most 1")
    return Rope(theta, fraction, _scaling(parameters, keys, original))


def write_rope(
    rope: Rope, *, theta_keys: Sequence[str] = ("rope_theta",), fraction_keys: Sequence[str] = ()
) -> dict[str, Any]:
    """Returns the keys that `read_rope` reads, in the older format and in that of transformers 5."""
    scaling = scaling_keys(rope.scaling)
    new = (scaling or {"rope_type": "default"}) | {"rope_theta": rope.theta}
    if fraction_keys:
        new["partial_rotary_factor"] = rope.fraction
    old = dict.fromkeys(theta_keys, rope.theta) | dict.fromkeys(fraction_keys, rope.fraction)
    return old | {"rope_scaling": scaling, "rope_parameters": new}


def scaling_keys(scaling: Scaling | None) -> dict[str, Any] | None:
    """Returns a scaling in the format of config.json."""
    if scaling is None:
        return None
    kind = next(kind for kind, cls in SCALINGS.items() if isinstance(scaling, cls))
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(scaling).items()}
    return {"rope_type": kind} | {name: value for name, value in values.items() if value is not None}


def rope_dictionary(keys: Keys, name: str, aliases: Mapping[str, str] = MappingProxyType({})) -> dict[str, Any]:
    """Reads `rope_scaling` or `rope_parameters` without its null values; empty if the key is missing.

    Raises:
        InputError: If it is not an object.
    """
    value = keys.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InputError(f"config.json: {name} is {value!r}; expected an object such as {{'rope_type': 'default'}}")
    rope = {key: value for key, value in value.items() if value is not None}
    old_type = rope.pop("type", None)  # the name of `rope_type` before transformers 4.45
    kind = rope.get("rope_type", old_type)
    if kind is None:
        return rope
    if not isinstance(kind, str):
        raise InputError(f"config.json: {name} has the rope_type {kind!r}; expected default, {', '.join(SCALINGS)}")
    return rope | {"rope_type": aliases.get(kind, kind)}


def merge_formats(old: dict[str, Any], new: dict[str, Any], old_name: str, new_name: str) -> dict[str, Any]:
    """Merges the dictionaries of the older and the newer format.

    Raises:
        InputError: If they contradict each other.
    """
    if any(new.get(key, value) != value for key, value in old.items()):
        raise InputError(f"config.json: {new_name} {new} and {old_name} {old} differ; keep one of them")
    return old | new


def _pop_value(parameters: dict[str, Any], name: str, keys: Keys, old_keys: Sequence[str], default: float) -> Any:
    """Takes a value out of `rope_parameters`, or reads it from older keys; all that are set must agree."""
    places = {name + " inside rope_parameters": parameters.pop(name, None)} | {key: keys.get(key) for key in old_keys}
    values = {place: value for place, value in places.items() if value is not None}
    for place, value in values.items():
        check_number(place, value)
    if len(set(map(float, values.values()))) > 1:
        listing = ", ".join(f"{place} {value!r}" for place, value in values.items())
        raise InputError(f"config.json: {listing} differ; keep one of them")
    return next(iter(values.values()), default)


def _scaling(parameters: dict[str, Any], keys: Keys, original: int | None) -> Scaling | None:
    kind = parameters.pop("rope_type", "default")
    if kind != "default" and kind not in SCALINGS:
        raise InputError(f"config.json: rotary scaling of type {kind!r}; expected default, {', '.join(SCALINGS)}")
    # Fill in the defaults of transformers. Default and linear scaling do not use the original context.
    if kind in ("default", "linear"):
        parameters.pop("original_max_position_embeddings", None)
    else:
        _add_defaults(parameters, kind, keys, original)
    # The parameters must be exactly the fields of the class.
    expected = {} if kind == "default" else {field.name: field for field in fields(SCALINGS[kind])}
    missing = [name for name, field in expected.items() if field.default is MISSING and name not in parameters]
    if missing:
        raise InputError(f"config.json: rotary scaling of type {kind!r} has no {missing[0]} (found: {parameters})")
    unknown = parameters.keys() - expected.keys()
    if unknown:
        name = min(unknown)
        raise InputError(
            f"config.json: rotary scaling of type {kind!r} has {name} {parameters[name]!r}, which is not supported "
            f"(supported: {', '.join(expected) or 'no parameters'})"
        )
    return None if kind == "default" else SCALINGS[kind](**{name: _checked(name, x) for name, x in parameters.items()})


def _add_defaults(parameters: dict[str, Any], kind: str, keys: Keys, original: int | None):
    """Adds missing parameters as transformers does."""
    name = "original_max_position_embeddings"
    inside, outside = parameters.get(name), keys.get(name)
    if None not in (inside, outside) and inside != outside:
        raise InputError(f"config.json: {name} is {outside!r}, but {inside!r} in the rotary scaling; keep one of them")
    values = [value for value in (inside, outside, original) if value is not None]
    parameters[name] = values[0] if values else keys.size("max_position_embeddings")
    if kind in ("yarn", "longrope") and "factor" not in parameters:
        check_number(name, parameters[name])
        parameters["factor"] = keys.size("max_position_embeddings") / parameters[name]


def _checked(name: str, value: Any) -> Any:
    if name.endswith("_factor") and isinstance(value, list):
        for number in value:
            check_number(name, number)
        return tuple(map(float, value))
    if name == "truncate":
        if type(value) is not bool:
            raise InputError(f"config.json: truncate is {value!r}; expected true or false")
        return value
    check_number(name, value)
    return value


def check_widths(rope: Rope, head_dim: int):
    """Checks that rotary positions fit the heads.

    Raises:
        InputError: If an odd number of dimensions is rotated, or a list of factors has the wrong length.
    """
    rotated = int(head_dim * rope.fraction)
    if rotated < 2 or rotated % 2:
        raise InputError(
            f"config.json: {rotated} of {head_dim} dimensions of a head are rotated (partial_rotary_factor "
            f"{rope.fraction}); expected an even number of at least 2"
        )
    if isinstance(rope.scaling, LongRope):
        for name in ("short_factor", "long_factor"):
            length = len(getattr(rope.scaling, name))
            if length != rotated // 2:
                raise InputError(f"config.json: {name} of longrope has {length} numbers; expected {rotated // 2}")
