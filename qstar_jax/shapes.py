"""Arrays that do not go together, refused by name while a function is traced: checks cost nothing when it runs."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import ArrayLike

from qstar_jax.errors import InputError


def check_same_shape(**arrays: ArrayLike | None):
    """Refuses arrays of different shapes, which would be broadcast.

    Args:
        **arrays: The arrays, by the names under which the user knows them.

    Raises:
        InputError: Shapes differ, or an array is None.
    """
    shapes = {name: None if array is None else jnp.shape(array) for name, array in arrays.items()}
    if len(set(shapes.values())) > 1 or None in shapes.values():
        found = [f"{name} {None if shape is None else show_shape(shape)}" for name, shape in shapes.items()]
        raise InputError(f"{', '.join(found)}: expected arrays of one shape")


def check_shape(expected: Sequence[int], **arrays: ArrayLike):
    """Refuses arrays of another shape, which would be broadcast.

    Raises:
        InputError: The shape of an array is another one.
    """
    for name, array in arrays.items():
        if jnp.shape(array) != tuple(expected):
            raise InputError(f"{name} {show_shape(jnp.shape(array))}: expected shape {show_shape(expected)}")


def check_dtype(kind: Any, expected: str, **arrays: ArrayLike):
    """Refuses arrays whose dtype is not of this kind.

    Args:
        kind: The kind, as for `jnp.issubdtype`: `jnp.integer`, `bool`.
        expected: What the user should pass, for the error.
        **arrays: The arrays, by name.

    Raises:
        InputError: A dtype is of another kind.
    """
    for name, array in arrays.items():
        dtype = jnp.asarray(array).dtype
        if not jnp.issubdtype(dtype, kind):
            raise InputError(f"{name} {show_shape(jnp.shape(array))} is {dtype}: expected {expected}")


def show_shape(shape: Sequence[int | str]) -> str:
    """Formats a shape, in which letters may stand for sizes: [4, 2, T]."""
    return f"[{', '.join(map(str, shape))}]"
