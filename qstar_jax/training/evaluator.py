"""Evaluation over a whole file of held-out examples."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import jax

from qstar_jax.data.batches import Batch
from qstar_jax.data.feeder import Feeder, Track
from qstar_jax.models import CausalLM
from qstar_jax.models.causal_lm import Params
from qstar_jax.scoring import score_policy
from qstar_jax.training.metrics import COUNT, Metrics, mean_metrics
from qstar_jax.training.objectives import LossFn
from qstar_jax.training.plan import RunPlan
from qstar_jax.training.step import TrainState


class Evaluator:
    """Weighted means over all held-out examples; a reference that stays the same scores them once.

    Args:
        feeder: The held-out examples.
        eval_step: `(params, ref_params, batch) -> metrics`, jitted.
        ref_logprobs: `batch -> ref_logp`, if the reference is the same in every evaluation; it is called here, once per
            batch.
        track: `(batches, description, total)` wraps batches, for a progress bar.
    """

    def __init__(
        self,
        feeder: Feeder,
        eval_step: Callable[[Params, Params | None, Batch], Metrics],
        ref_logprobs: Callable[[Batch], jax.Array] | None = None,
        track: Track = lambda batches, description, total: batches,
    ):
        self._feeder, self._eval_step, self._track = feeder, eval_step, track
        self._ref_logps = None
        if ref_logprobs is not None:
            batches = self._batches("reference on held-out rows")
            self._ref_logps = [jax.block_until_ready(ref_logprobs(batch)) for batch in batches]

    def _batches(self, description: str) -> Iterable[Batch]:
        return self._track(self._feeder.in_order(), description, self._feeder.batches)

    def __call__(self, params: Params, ref_params: Params | None) -> dict[str, float]:
        """Evaluates parameters beside a reference; returns metric name (with prefix `eval_`) -> mean."""
        parts = []
        for i, batch in enumerate(self._batches("evaluation")):
            if self._ref_logps is not None:
                batch = replace(batch, ref_logp=self._ref_logps[i])
            parts.append(jax.block_until_ready(self._eval_step(params, ref_params, batch)))
        return {f"eval_{name}": value for name, value in mean_metrics(parts).items() if not name.startswith(COUNT)}


def make_evaluator(
    plan: RunPlan, model: CausalLM, loss_fn: LossFn, feeder: Feeder, state: TrainState, track: Track
) -> Evaluator:
    """Makes the evaluator of a run, which begins at `state`."""
    if not plan.runs_reference or plan.moves_reference or plan.objective.reads_logits:
        return Evaluator(feeder, jax.jit(lambda *args: loss_fn(*args)[1]), track=track)
    logprobs = jax.jit(lambda params, batch: score_policy(model.base, params, batch).logp)
    reference = state.frozen if state.ref_params is None else state.ref_params
    eval_step = jax.jit(lambda params, _, batch: loss_fn(params, None, batch)[1])
    return Evaluator(feeder, eval_step, lambda batch: logprobs(reference, batch), track)
