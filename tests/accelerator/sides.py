"""The two sides of a comparison: the default backend's first device, and the CPU."""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qstar_jax.config import MeshOptions
from qstar_jax.sharding import make_mesh


def accelerator() -> Mesh:
    """A mesh of the first device of the default backend."""
    return make_mesh(MeshOptions(data=1), jax.devices()[:1])


def cpu() -> Mesh:
    """A mesh of one CPU device."""
    return make_mesh(MeshOptions(data=1), jax.devices("cpu")[:1])


def place(tree: Any, mesh: Mesh) -> Any:
    """Copies arrays to the device of a mesh."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def distance(actual: Any, expected: Any) -> float:
    """The largest relative distance ||actual - expected|| / ||expected|| of the arrays of two trees.

    Arrays of less than a hundredth of the norm of the whole tree are compared with that: some gradients are 0 but for
    rounding, such as those of biases of keys that are not rotated.

    Returns:
        The distance; infinity if anything is NaN.
    """
    actual, expected = (list(map(as_float64, jax.tree.leaves(jax.device_get(tree)))) for tree in (actual, expected))
    floor = np.sqrt(sum((x**2).sum() for x in expected)) / 100
    pairs = zip(actual, expected, strict=True)
    distances = [np.linalg.norm(a - b) / max(np.linalg.norm(b), floor, 1e-30) for a, b in pairs]
    return float(max(distances)) if all(map(math.isfinite, distances)) else math.inf


def as_float64(x: Any) -> np.ndarray:
    """A flat float64 array."""
    return np.asarray(x, np.float64).ravel()
