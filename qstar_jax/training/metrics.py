"""Metrics as sums and denominators, so that means over steps, devices and batches of unequal size are exact.

Sums of squares (`squares/NAME`) become the standard error `NAME_stderr`; `count/NAME` are sizes that throughput is
computed from.
"""

import jax
import numpy as np
from jaxtyping import Array, Float

Metrics = dict[str, tuple[Float[Array, ""], Float[Array, ""]]]
SQUARES, COUNT = "squares/", "count/"


def mean_metrics(parts: list[Metrics]) -> dict[str, float]:
    """Joins metrics of one or more batches: sum of sums over sum of denominators.

    Returns:
        Name -> mean, where anything was counted. `squares/NAME` becomes `NAME_stderr`, the standard error of a mean
        over independent rows; a single row has none.
    """
    parts = jax.device_get(parts)
    names = parts[0]
    total = {name: np.sum([np.float64(part[name]) for part in parts], axis=0) for name in names}
    means = {name: float(value / weight) for name, (value, weight) in total.items() if weight > 0}
    for name in [name for name in means if name.startswith(SQUARES)]:
        square, of, rows = means.pop(name), name.removeprefix(SQUARES), total[name][1]
        if rows > 1:
            means[f"{of}_stderr"] = float(np.sqrt(max(square - means[of] ** 2, 0.0) / (rows - 1)))
    return means
