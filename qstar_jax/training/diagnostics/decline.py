"""The expected decline: how far the rewards of the reference's own samples have fallen during a run.

Eq. 16: responses sampled from the reference have the mean implicit reward -beta KL(reference || policy), which is 0 at
step 0 and never above it. A reference that was fitted to the chosen responses treats them like its own, so their
rewards must fall too. The same holds for prefixes: a truncated sample is complete in a game that ends there, with the
KL up to there.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from qstar_jax.config import DataOptions
from qstar_jax.console import say
from qstar_jax.data.batches import step_indices
from qstar_jax.data.feeder import Feeder
from qstar_jax.data.loading import Dataset, Kind
from qstar_jax.data.ragged import Lengths
from qstar_jax.data.tokenization import Example
from qstar_jax.decoding.eos import eos_token_ids
from qstar_jax.models import CausalLM
from qstar_jax.models.causal_lm import Params
from qstar_jax.store.identity import check_identity, write_identity
from qstar_jax.training.diagnostics.reference_samples import Samples, draw, read_samples, write_samples
from qstar_jax.training.diagnostics.verdict import collect, sentence
from qstar_jax.training.plan import RunPlan
from qstar_jax.training.reference import make_scorer
from qstar_jax.training.setup import Start

FILE = "reference_samples.jsonl"
LONGEST = 128  # tokens per sample: a prefix serves as well, and costs less
_DECODED = 8  # samples at once: a token of eight takes hardly longer than one of two


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean of independent values, and its standard error. Shape [N], N at least 2."""
    return float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5)


def expected_log_ratio(log_ratios: Sequence[np.ndarray]) -> tuple[float, float]:
    """Estimates -KL(pi_ref || pi) from the reference's samples with less noise than their mean.

    The sum of pi / pi_ref - 1 over the tokens of a sample has expectation 0 and is strongly correlated with the sum of
    log pi / pi_ref: a control variate. Its weight is fitted: the usual weight 1 is worse than 0 once pi is far away.

    Args:
        log_ratios: log pi / pi_ref of each sample's tokens in nats. Shape [T] each; at least two samples.

    Returns:
        Mean per sample, and its standard error.
    """
    totals = np.array([ratios.sum() for ratios in log_ratios])
    zero_mean = np.array([np.expm1(ratios).sum() for ratios in log_ratios])
    variance = zero_mean.var()
    if len(totals) < 3 or not 0 < variance < np.inf:
        return mean_and_error(totals)
    weight = np.mean((totals - totals.mean()) * (zero_mean - zero_mean.mean())) / variance
    residuals = totals - weight * zero_mean
    return float(residuals.mean()), float((residuals.var(ddof=2) / len(residuals)) ** 0.5)


@dataclass(frozen=True)
class Probe:
    """Scores the reference's samples under the policy: `probe(params)`.

    Attributes:
        samples: The samples, the same through the whole run.
        beta: Reward per nat, as in `rewards/chosen`.
        logps: `params -> log pi` of each sample's tokens, shape [T] each; all processes call it together.
        kind: What the loss reads from each row.
    """

    samples: Samples
    beta: float
    logps: Callable[[Params], list[np.ndarray]]
    kind: Kind = "preferences"

    def __call__(self, params: Params, ref_params: Params | None = None) -> dict[str, float]:
        """Computes two estimates of -beta KL(reference || policy), in reward per response, with their standard errors.

        `reference_samples` is the mean implicit reward of the samples, `reference_expected` that of
        `expected_log_ratio`. `ref_params` are not used.
        """
        pairs = zip(self.logps(params), self.samples.ref_logps, strict=True)
        ratios = [logps.astype(np.float64) - ref_logps for logps, ref_logps in pairs]
        estimates = {
            "samples": mean_and_error(np.array([values.sum() for values in ratios])),
            "expected": expected_log_ratio(ratios),
        }
        metrics = {}
        for name, (mean, error) in estimates.items():
            metrics[f"eval_rewards/reference_{name}"] = self.beta * mean
            metrics[f"eval_rewards/reference_{name}_stderr"] = self.beta * error
        return metrics

    def verdict(self, summary: Mapping[str, float]) -> str:
        """Says in one line whether rewards of chosen responses moved as theory expects; see `verdict`."""
        count, length = len(self.samples.examples), self.samples.mean_length
        evidence = collect(summary, samples=count, length=length, beta=self.beta, kind=self.kind)
        return "" if evidence is None else sentence(evidence)


def make_probe(
    plan: RunPlan, start: Start, params: Params, feeder: Feeder, mesh: Mesh, console: Console
) -> Probe | None:
    """Draws the reference's samples at step 0, where the policy equals it, or reads those with which the run began.

    Returns:
        The probe; None if the loss has no reference or moves it, the option is 0, or a resumed run has no samples.

    Raises:
        InputError: If the samples are damaged, or those of another reference.
    """
    count, path = plan.config.train.reference_samples, plan.out / FILE
    # Rewards that are measured from a moving point have no expectation.
    if count == 0 or not plan.objective.uses_reference or plan.moves_reference:
        return None
    identity = {"reference": start.reference.partition(" ")[0]}  # the digest of its parameters
    if start.step:
        if not path.exists():
            say(console, f"{path} is missing, so this run continues without rewards of the reference's samples")
            return None
        check_identity(path, identity, holds="samples", fix="restore that file, or delete it to continue without")
        samples = read_samples(path)
        logps = _scorer(samples.examples, plan.config.data, start.model, feeder, mesh)
    else:
        say(console, f"reference: sampling {count} responses (train.reference_samples), whose rewards the log shows")
        examples = _draw_examples(plan.config.train.seed, start, params, feeder, mesh, count)
        logps = _scorer(examples, plan.config.data, start.model, feeder, mesh)
        # The program that scores gives ref_logps too, so the first rewards are exactly 0.
        samples = Samples(examples, logps(params))
        if jax.process_index() == 0:
            write_samples(path, samples, start.tokenizer)
            write_identity(path, identity)
        where = "" if plan.config.data.eval else " (training rows, as data.eval is not set)"
        tokens = f"{samples.mean_length:.1f} tokens on average"
        if Lengths.of(feeder.dataset.examples).turns.max() > 1:
            tokens += ", first turns only, as nobody answers them,"
        say(console, f"reference: {count} samples of {tokens} to prompts of {feeder.dataset.source}{where}")
    return Probe(samples, plan.objective.beta, logps, plan.objective.kind)


def _rows(count: int, feeder: Feeder, mesh: Mesh, *, least: int = 1) -> int:
    """Samples at once: as many as a micro-batch has, but not fewer than `least`, and a multiple of the devices."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    return -(-min(count, max(least, feeder.batch_size // feeder.accumulate)) // shards) * shards


def _draw_examples(seed: int, start: Start, params: Params, feeder: Feeder, mesh: Mesh, count: int) -> list[Example]:
    examples = feeder.dataset.examples
    # Spread over the file; if it has fewer prompts, each is used several times.
    chosen = [examples[i] for i in step_indices(seed, 0, len(examples), count)]
    responses = draw(
        start.model,
        params,
        [example.prompt for example in chosen],
        mesh,
        seed=seed,
        rows=_rows(count, feeder, mesh, least=_DECODED),
        max_new_tokens=min(LONGEST, int(Lengths.of(examples).actions.max())),
        eos_ids=eos_token_ids(start),
    )
    return [replace(example, responses=(response,)) for example, response in zip(chosen, responses, strict=True)]


def _scorer(
    examples: list[Example], options: DataOptions, model: CausalLM, feeder: Feeder, mesh: Mesh
) -> Callable[[Params], list[np.ndarray]]:
    """Makes `params -> log pi` of each sample's tokens."""
    rows = _rows(len(examples), feeder, mesh)
    samples = Feeder(Dataset(examples, (), FILE), rows, mesh, options, "train.reference_samples")
    score = make_scorer(model, samples)
    return lambda params: [responses[0] for _, part in score(params, samples.in_order(), 0) for responses in part]
