"""Where a loss or a gradient that is not finite came from: the report of a run that stopped itself."""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from qstar_jax.data.batches import Batch
from qstar_jax.models import CausalLM
from qstar_jax.models.causal_lm import Params
from qstar_jax.scoring import score_policy
from qstar_jax.training.objectives import LossFn
from qstar_jax.training.step import TrainState, first_nonfinite, with_frozen


def find_cause(
    model: CausalLM,
    loss_fn: LossFn,
    state: TrainState,
    batch: Batch,
    locate: Callable[[Sequence[int]], str],
    *,
    accumulate: int = 1,
) -> str:
    """Finds the first thing that is not finite: parameters, then log-probabilities, then the gradient.

    `state` is that before the step; all processes of a job must call this together. `locate` names examples of the
    batch, counted from 0 over all micro-batches.

    Returns:
        A clause that names the tensor, and the examples where they are known.
    """
    # Parameters.
    for name, params in (("parameter", state.policy), ("reference's parameter", state.ref_params)):
        if tensor := first_nonfinite(params):
            return f"the {name} {tensor} is not finite"
    # Log-probabilities of each example.
    micro_batches = [batch] if accumulate == 1 else [jax.tree.map(lambda x: x[i], batch) for i in range(accumulate)]  # noqa: B023
    size = micro_batches[0].index.shape[0]
    logprobs = jax.jit(lambda params, batch: score_policy(model, params, batch).logp)
    for name, values_of in (("log pi", lambda b: logprobs(state.policy, b)), ("log pi_ref", lambda b: b.ref_logp)):
        bad = []
        for number, micro_batch in enumerate(micro_batches):
            values = values_of(micro_batch)
            if values is not None:
                finite = np.isfinite(multihost_utils.process_allgather(values, tiled=True)).all((1, 2))
                bad += [number * size + int(b) for b in np.flatnonzero(~finite)]
        if bad:
            return f"{name} is not finite in {locate(bad)}"
    # The gradient of each micro-batch.
    gradient = jax.jit(jax.grad(lambda params, batch: _total(loss_fn, state, params, batch)))
    for number, micro_batch in enumerate(micro_batches):
        if tensor := first_nonfinite(gradient(state.params, micro_batch)):
            examples = range(number * size, (number + 1) * size)
            return f"the gradient of {tensor} is not finite, first in a batch of {locate(examples)}"
    return "the sum over the batch is not finite, although every part of it is"


def _total(loss_fn: LossFn, state: TrainState, params: Params, batch: Batch):
    return loss_fn(with_frozen(params, state.frozen), state.ref_params, batch)[1]["loss"][0]
