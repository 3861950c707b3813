"""Evaluation of a policy that is trained on a reward: one sample to each held-out prompt."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from qstar_jax.data.batches import Batch
from qstar_jax.data.tokenization import Example
from qstar_jax.models.causal_lm import Params
from qstar_jax.training.metrics import Metrics, mean_metrics
from qstar_jax.training.rl.batches import Batcher
from qstar_jax.training.rl.sampling import PolicySampler, sample_keys
from qstar_jax.training.rl.source import Scorer


@dataclass(frozen=True)
class SampleEvaluator:
    """Draws with the same keys at every evaluation, and returns means of `objective/...` metrics.

    Attributes:
        examples: The held-out prompts.
        sampler: Draws one response per prompt.
        scorer: Scores them.
        batcher: Puts them on the devices.
        assess: Adds what they earn (see `rewards.Assessor`).
        metrics: `batch -> metrics`, pure.
        seed: Fixes the samples.
        batch_size: Prompts per batch.
    """

    examples: Sequence[Example]
    sampler: PolicySampler
    scorer: Scorer
    batcher: Batcher
    assess: Callable[..., Batch]
    metrics: Callable[[Batch], Metrics]
    seed: int
    batch_size: int

    def __call__(self, params: Params, ref_params: Params | None) -> dict[str, float]:
        """Evaluates parameters beside a reference; returns metric name (with prefix `eval_`) -> mean."""
        measure, parts = jax.jit(self.metrics), []
        for number, examples in enumerate(self._batches()):
            # The last batch is filled up with its first prompt, whose further samples do not count.
            missing = self.batch_size - len(examples)
            keys = sample_keys(self.seed, number, self.batch_size)
            samples = self.sampler(params, [*examples, *examples[:1] * missing], keys)
            responses = samples.responses[: len(examples)]
            scores = np.zeros((self.batch_size, 1), np.float32)
            scores[: len(examples)] = self.scorer(examples, responses)
            batch = self.batcher(examples, responses, fill_to=self.batch_size)
            batch = self.assess(params, ref_params, batch, scores, samples.logp)
            parts.append(jax.device_get(measure(batch)))
        return {f"eval_{name}": value for name, value in mean_metrics(parts).items()}

    def _batches(self) -> Iterator[list[Example]]:
        for first in range(0, len(self.examples), self.batch_size):
            yield self.examples[first : first + self.batch_size]
