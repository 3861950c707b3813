"""Evaluation over a whole file of held-out examples."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import jax

from qstar_jax.data.batches import Batch
from qstar_jax.data.feeder import Feeder, Track
from qstar_jax.models.causal_lm import Params
from qstar_jax.training.metrics import Metrics, mean_metrics

Evaluate = Callable[[Params, Params | None], dict[str, float]]  # (policy, live reference) -> metrics


class Evaluator:
    """Weighted global means over a held-out file; what the frozen reference says of it is computed once.

    Args:
        feeder: The held-out examples.
        eval_step: `(params, ref_params, batch) -> metrics`, jitted.
        ref_logprobs: `batch -> ref_logp`, where the reference is the same in every evaluation; then they are computed
            here, once.
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
        return {f"eval_{name}": value for name, value in mean_metrics(parts).items() if not name.startswith("count/")}


def join_evaluators(evaluators: Iterable[Evaluate | None]) -> Evaluate | None:
    """Makes one evaluator of those that are not None; None where there are none."""
    found = [evaluate for evaluate in evaluators if evaluate is not None]
    return (lambda *params: {k: v for evaluate in found for k, v in evaluate(*params).items()}) if found else None
