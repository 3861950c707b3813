"""Assertions of chex in the user's words, made while a function is traced: they cost nothing when it runs."""

from collections.abc import Sequence

import chex
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike

from qstar_jax.errors import InputError


def check_same_shape(**arrays: ArrayLike | None):
    """Refuses arrays of different shapes, which would be broadcast.

    Args:
        **arrays: The arrays, by the names under which the user knows them.

    Raises:
        InputError: Shapes differ, or an array is None.
    """
    try:
        chex.assert_equal(any(array is None for array in arrays.values()), False)
        chex.assert_equal_shape([x if hasattr(x, "shape") else np.asarray(x) for x in arrays.values()])
    except AssertionError as error:
        found = ", ".join(f"{name} {_shown(array)}" for name, array in arrays.items())
        raise InputError(f"{found}: expected arrays of one shape") from error


def check_shape(expected: Sequence[int], **arrays: ArrayLike):
    """Refuses arrays of another shape, which would be broadcast.

    Raises:
        InputError: The shape of an array is another one.
    """
    for name, array in arrays.items():
        try:
            chex.assert_shape(array, tuple(expected))
        except AssertionError as error:
            raise InputError(f"{name} {_shown(array)}: expected shape {show_shape(expected)}") from error


def check_dtype(kind: type, expected: str, **arrays: ArrayLike):
    """Refuses arrays whose dtype is not of this kind.

    Args:
        kind: The kind, as `chex.assert_type` takes it: `int`, `float` or `bool`.
        expected: What the user should pass, for the error.
        **arrays: The arrays, by name.

    Raises:
        InputError: A dtype is of another kind.
    """
    for name, array in arrays.items():
        try:
            chex.assert_type(array, kind)
        except AssertionError as error:
            raise InputError(f"{name} {_shown(array)} is {jnp.result_type(array)}: expected {expected}") from error


def _shown(array: ArrayLike | None) -> str:
    return "None" if array is None else show_shape(jnp.shape(array))


def show_shape(shape: Sequence[int | str]) -> str:
    """Formats a shape, in which letters may stand for sizes: [4, 2, T]."""
    return f"[{', '.join(map(str, shape))}]"
