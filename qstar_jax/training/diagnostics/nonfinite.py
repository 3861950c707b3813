"""Where a loss or a gradient that is not finite came from: the report of a run that has stopped itself."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from qstar_jax.data.batches import Batch
from qstar_jax.models import CausalLM
from qstar_jax.models.causal_lm import Params
from qstar_jax.scoring import response_logprobs
from qstar_jax.training.objectives import LossFn
from qstar_jax.training.step import TrainState, with_frozen

SHOWN = 8  # rows that are named


def find_cause(
    model: CausalLM, loss_fn: LossFn, state: TrainState, batches: Sequence[Batch], rows: Sequence[Sequence[int]]
) -> str:
    """Looks for the first thing that is not finite: parameters, then log-probabilities, then the gradient.

    Args:
        model: The model.
        loss_fn: The objective.
        state: State before the step; in a job of several processes all must call this together.
        batches: The step's micro-batches.
        rows: Row numbers of their examples in the data file, counted from 0.

    Returns:
        A clause that names the tensor, and the rows where they are known.
    """
    for name, params in (("parameter", state.policy), ("reference's parameter", state.ref_params)):
        if tensor := first_nonfinite(params):
            return f"the {name} {tensor} is not finite"
    logprobs = jax.jit(lambda params, batch: response_logprobs(model, params, batch)[0])
    for name, values in (("log pi", lambda b: logprobs(state.policy, b)), ("log pi_ref", lambda b: b.ref_logp)):
        bad = []
        for batch, numbers in zip(batches, rows, strict=True):
            found = values(batch)
            if found is not None:
                found = multihost_utils.process_allgather(found, tiled=True)
                bad += [n for n, row in zip(numbers, found, strict=False) if not np.isfinite(row).all()]
        if bad:
            return f"{name} is not finite in {_names(bad)}"
    gradient = jax.jit(jax.grad(lambda params, batch: _total(loss_fn, state, params, batch)))
    for batch, numbers in zip(batches, rows, strict=True):
        if tensor := first_nonfinite(gradient(state.params, batch)):
            return f"the gradient of {tensor} is not finite, first in a batch of {_names(numbers)}"
    return "the sum over the batch is not finite, although every part of it is"


def first_nonfinite(tree: Params | None) -> str | None:
    """Path of the first tensor with a NaN or an infinity; None if there is none."""
    finite = jax.device_get(jax.jit(lambda tree: jax.tree.map(lambda x: jnp.isfinite(x).all(), tree))(tree))
    for path, good in jax.tree_util.tree_leaves_with_path(finite):
        if not good:
            return jax.tree_util.keystr(path, simple=True, separator="/")
    return None


def _total(loss_fn: LossFn, state: TrainState, params: Params, batch: Batch):
    return loss_fn(with_frozen(params, state.frozen), state.ref_params, batch)[1]["loss"][0]


def _names(rows: Sequence[int]) -> str:
    """Rows as people count them."""
    more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
    return f"row{'s'[: len(rows) > 1]} {', '.join(str(row + 1) for row in rows[:SHOWN])}{more}"
