"""Rotary positions in config.json, as transformers 5 writes them (`rope_parameters`) and as earlier versions did."""

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
    """Reads the rotary positions of a model whose layers all have the same.

    Args:
        keys: The config.json.
        theta: The base where none is given.
        theta_keys: Older keys of the base, beside `rope_scaling`.
        fraction: The share of rotated dimensions where none is given.
        fraction_keys: Older keys of that share; none: the family rotates all of them, always.
        original: The context before a stretch where none is given; None: `max_position_embeddings`.
        aliases: Other names of types of scaling.

    Raises:
        InputError: If the older and the newer keys contradict each other, or the scaling is not known, lacks a
            parameter or has one too many.
    """
    old, new = (rope_dictionary(keys, name, aliases) for name in ("rope_scaling", "rope_parameters"))
    found = merged(old, new, "rope_scaling", "rope_parameters")
    share = _one(found, "partial_rotary_factor", keys, fraction_keys or ("partial_rotary_factor",), fraction)
    if share != 1 and not fraction_keys:
        raise InputError(
            f"config.json: partial_rotary_factor is {share!r}; {keys.model_type} models rotate all dimensions of a head"
        )
    base = _one(found, "rope_theta", keys, theta_keys, theta)
    return make_rope(keys, found, theta=base, fraction=share, original=original)


def make_rope(
    keys: Keys, parameters: Mapping[str, Any], *, theta: float, fraction: float = 1.0, original: int | None = None
) -> Rope:
    """Makes rotary positions of a dictionary such as `rope_dictionary` returns.

    Args:
        keys: The config.json, for what its other keys say of contexts.
        parameters: The dictionary; a theta of its own goes first.
        theta: The base.
        fraction: The share of rotated dimensions.
        original: See `read_rope`.

    Raises:
        InputError: If the scaling is not known, lacks a parameter or has one too many.
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
    """Returns the keys of config.json that `read_rope` reads, in the older form and in that of transformers 5."""
    scaling = scaling_keys(rope.scaling)
    new = (scaling or {"rope_type": "default"}) | {"rope_theta": rope.theta}
    if fraction_keys:
        new["partial_rotary_factor"] = rope.fraction
    old = dict.fromkeys(theta_keys, rope.theta) | dict.fromkeys(fraction_keys, rope.fraction)
    return old | {"rope_scaling": scaling, "rope_parameters": new}


def scaling_keys(scaling: Scaling | None) -> dict[str, Any] | None:
    """Returns a scaling as the dictionary that config.json holds."""
    if scaling is None:
        return None
    kind = next(kind for kind, known in SCALINGS.items() if isinstance(scaling, known))
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(scaling).items()}
    return {"rope_type": kind} | {name: value for name, value in values.items() if value is not None}


def rope_dictionary(keys: Keys, name: str, aliases: Mapping[str, str] = MappingProxyType({})) -> dict[str, Any]:
    """Reads `rope_scaling` or `rope_parameters` without what is null; empty where there is none.

    Raises:
        InputError: If it is no object.
    """
    found = keys.get(name)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise InputError(f"config.json: {name} is {found!r}; expected an object such as {{'rope_type': 'default'}}")
    rope = {key: value for key, value in found.items() if value is not None}
    older = rope.pop("type", None)  # the name that `rope_type` had before transformers 4.45
    kind = rope.get("rope_type", older)
    if kind is None:
        return rope
    if not isinstance(kind, str):
        raise InputError(f"config.json: {name} has the rope_type {kind!r}; expected default, {', '.join(SCALINGS)}")
    return rope | {"rope_type": aliases.get(kind, kind)}


def merged(old: dict[str, Any], new: dict[str, Any], old_name: str, new_name: str) -> dict[str, Any]:
    """One dictionary of two that say the same in an older and a newer form.

    Raises:
        InputError: If they contradict each other.
    """
    if any(new.get(key, value) != value for key, value in old.items()):
        raise InputError(f"config.json: {new_name} {new} and {old_name} {old} differ; keep one of them")
    return old | new


def _one(found: dict[str, Any], name: str, keys: Keys, older: Sequence[str], default: float) -> Any:
    """A value that stands inside `rope_parameters`, or under an older key, or in several places the same."""
    places = {name + " inside rope_parameters": found.pop(name, None)} | {key: keys.get(key) for key in older}
    told = {place: value for place, value in places.items() if value is not None}
    if len(set(map(repr, map(_as_float, told.values())))) > 1:
        said = ", ".join(f"{place} {value!r}" for place, value in told.items())
        raise InputError(f"config.json: {said} differ; keep one of them")
    return next(iter(told.values()), default)


def _as_float(value: Any) -> Any:
    return float(value) if type(value) is int else value


def _scaling(parameters: dict[str, Any], keys: Keys, original: int | None) -> Scaling | None:
    kind = parameters.pop("rope_type", "default")
    if kind != "default" and kind not in SCALINGS:
        known = ", ".join(SCALINGS)
        raise InputError(f"config.json: rotary scaling of type {kind!r}; expected default, {known}")
    if kind in ("default", "linear"):
        # What they were stretched from is written down, and used by nobody.
        parameters.pop("original_max_position_embeddings", None)
    else:
        _complete(parameters, kind, keys, original)
    wanted = {} if kind == "default" else {field.name: field for field in fields(SCALINGS[kind])}
    missing = [name for name, field in wanted.items() if field.default is MISSING and name not in parameters]
    if missing:
        raise InputError(f"config.json: rotary scaling of type {kind!r} has no {missing[0]} (found: {parameters})")
    unknown = parameters.keys() - wanted.keys()
    if unknown:
        name = min(unknown)
        raise InputError(
            f"config.json: rotary scaling of type {kind!r} has {name} {parameters[name]!r}, which is not built here "
            f"(it has {', '.join(wanted) or 'no parameters'})"
        )
    return None if kind == "default" else SCALINGS[kind](**{name: _value(name, x) for name, x in parameters.items()})


def _complete(parameters: dict[str, Any], kind: str, keys: Keys, original: int | None):
    """Adds what transformers takes for parameters that are not there."""
    name = "original_max_position_embeddings"
    inside, beside = parameters.get(name), keys.get(name)
    if None not in (inside, beside) and inside != beside:
        raise InputError(f"config.json: {name} is {beside!r}, and {inside!r} in the rotary scaling; keep one of them")
    given = [value for value in (inside, beside, original) if value is not None]
    parameters[name] = given[0] if given else keys.size("max_position_embeddings")
    if kind in ("yarn", "longrope") and "factor" not in parameters:
        check_number(name, parameters[name])
        parameters["factor"] = keys.size("max_position_embeddings") / parameters[name]


def _value(name: str, found: Any) -> Any:
    if name.endswith("_factor") and isinstance(found, list):
        for number in found:
            check_number(name, number)
        return tuple(map(float, found))
    if name == "truncate":
        if type(found) is not bool:
            raise InputError(f"config.json: truncate is {found!r}; expected true or false")
        return found
    check_number(name, found)
    return found


def check_widths(rope: Rope, head_dim: int):
    """Refuses rotary positions that do not fit the heads.

    Raises:
        InputError: If an odd number of dimensions is rotated, or a list of factors has another length.
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
