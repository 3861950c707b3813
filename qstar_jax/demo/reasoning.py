"""The insight `reasoning`: policies trained on outcomes of worked-out sums, and what their rewards say about steps.

The base model was fitted to a solver that slips. One policy learns from labelled solutions (an implicit process reward
model), one from pairs of a right and a wrong solution (DPO); neither is told which step is false.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.rule import Rule

from qstar_jax.config import (
    ComputeOptions,
    DataOptions,
    DecodeOptions,
    DemoConfig,
    DpoConfig,
    LossOptions,
    MeshOptions,
    OptimizerOptions,
    ReportConfig,
    TrainOptions,
)
from qstar_jax.data.loading import Dataset, load_examples
from qstar_jax.data.tokenization import Example, Response
from qstar_jax.decoding.decoder import Generation
from qstar_jax.decoding.generate import generate, judge_reference, prepare
from qstar_jax.decoding.options import interpret
from qstar_jax.evaluation.insights.reasoning import DPO, PRM, SIZES, HeldOut, Sampled, measure_reasoning
from qstar_jax.evaluation.scored import ScoredResponse
from qstar_jax.evaluation.step_marks import with_steps
from qstar_jax.evaluation.token_rewards import score_dataset
from qstar_jax.report.insights import show
from qstar_jax.report.summary import write_report
from qstar_jax.sharding import make_mesh, use_mesh
from qstar_jax.store.open import LoadedModel, load_model
from qstar_jax.tasks.tiny_sums import TASK
from qstar_jax.tasks.tiny_sums.rows import split_rows
from qstar_jax.tasks.tiny_sums.sums import DELIMITER
from qstar_jax.training.run import train


@dataclass(frozen=True)
class Size:
    """How much is trained, scored and sampled.

    Attributes:
        steps: Steps of each training.
        held_out: Solutions whose steps are scored; half of them set thresholds.
        sums: Sums that are answered.
    """

    steps: int = 120
    held_out: int = 600
    sums: int = 40


BATCH_SIZE = 64  # labelled solutions, or pairs of them, per step
BETAS = {PRM: 0.3, DPO: 0.3}
RATES = {PRM: 1e-3, DPO: 1e-3}
LENGTHS = {"max_length": 64, "max_prompt_length": 16}  # nothing is truncated
COMPUTE = ComputeOptions(attention="dense")
MAX_NEW_TOKENS = 48
SCORED_AT_ONCE = 64
_BEAMS = ((4, 4), (1, 16))  # beams over steps, and continuations of each
BUDGET = 16
_RUNS = {PRM: ("prm", "outcomes", "implicit_prm"), DPO: ("dpo", "train", "sigmoid")}  # folder, split, loss


def run(config: DemoConfig, console: Console, size: Size | None = None) -> dict:
    """Trains and measures, writes all runs, reasoning/ and report.html, and returns its summary.json."""
    began, out, size = time.perf_counter(), Path(config.out), size or Size()
    for name, (_, split, _) in _RUNS.items():
        what = "labelled solutions" if split == "outcomes" else "pairs of a right and a wrong solution"
        console.print(Rule(f"{name}: {size.steps * BATCH_SIZE:,} {what}, beta {BETAS[name]:g}"))
        train(_config(name, out, config.seed, size), console)
    console.print(Rule("Which step is false?"))
    mesh = make_mesh()
    with use_mesh(mesh, COMPUTE.dtype):
        load = partial(load_model, compute=COMPUTE, mesh=mesh, mesh_options=MeshOptions())
        base = load(TASK.source)
        policies = {name: load(out / folder) for name, (folder, *_) in _RUNS.items()}
        record = measure_reasoning(
            _held_out(policies, base, config.seed, size, mesh),
            _sampled(policies, base, config.seed, size, mesh),
            seed=config.seed,
            trained_on=dict.fromkeys(_RUNS, size.steps * BATCH_SIZE),
            out=out / "reasoning",
        )
    show(record, out / "reasoning", console)
    console.print(Rule("What it showed"))
    report = ReportConfig(out=str(out), reasoning=str(out / "reasoning"))
    return write_report(report, console, seed=config.seed, size=asdict(size), seconds=time.perf_counter() - began)


def _config(name: str, out: Path, seed: int, size: Size) -> DpoConfig:
    folder, split, loss = _RUNS[name]
    rows = size.steps * BATCH_SIZE
    return DpoConfig(
        model=TASK.source,
        out=str(out / folder),
        data=DataOptions(train=_source(seed), train_split=split, max_train_rows=rows, layout="shared", **LENGTHS),
        compute=COMPUTE,
        loss=LossOptions(name=loss, beta=BETAS[name]),
        optimizer=OptimizerOptions(learning_rate=RATES[name], warmup_steps=10, schedule="cosine"),
        train=TrainOptions(seed=seed, batch_size=BATCH_SIZE, log_every=50, reference_samples=0),
    )


def _held_out(policies: dict[str, LoadedModel], base: LoadedModel, seed: int, size: Size, mesh: Mesh) -> HeldOut:
    """Scores held-out solutions, and takes the entropies of the reference."""
    options = DataOptions(**LENGTHS)
    dataset = load_examples(_source(seed), "steps", "completions", base.tokenizer, options, size.held_out)
    return HeldOut(
        split_rows("steps", seed, size.held_out),
        {name: _score(policy, base, dataset, BETAS[name], mesh, entropies=True) for name, policy in policies.items()},
    )


def _sampled(policies: dict[str, LoadedModel], base: LoadedModel, seed: int, size: Size, mesh: Mesh) -> Sampled:
    """Samples the base model, scores its samples, and searches among its steps for reward."""
    prompts = list(dict.fromkeys(row["prompt"] for row in split_rows("test", seed, 2 * size.sums)))[: size.sums]
    ids = [np.array(base.tokenizer(prompt).input_ids, np.int32) for prompt in prompts]
    options = DecodeOptions(
        method="sample", max_new_tokens=MAX_NEW_TOKENS, return_sequences=SIZES[-1], seed=seed, temperature=1.0
    )
    samples = [found for part in _parts(len(ids)) for found in generate(base, ids[part], options, mesh)]
    examples = [
        Example(prompt, False, (_response(one),), row)
        for row, (prompt, found) in enumerate(zip(ids, samples, strict=True))
        for one in found
    ]
    scored = {
        name: _by_sum(_score(policy, base, Dataset(examples, (), "samples"), BETAS[name], mesh))
        for name, policy in policies.items()
    }
    searched = {}
    for beams, continuations in _BEAMS:
        plan = interpret(_step_beams(beams, continuations, seed))
        # The base model writes here too, so that searches and samples choose among the same steps.
        search = judge_reference(prepare(policies[DPO], plan, mesh, reference=base, beta=BETAS[DPO]))
        found = [one[0].text for part in _parts(len(ids)) for one in search(ids[part])]
        searched[f"{beams} x {continuations} beams over steps"] = found
    return Sampled(prompts, scored, searched, BUDGET)


def _step_beams(beams: int, continuations: int, seed: int) -> DecodeOptions:
    return DecodeOptions(
        method="chunk",
        objective="implicit_reward",
        max_new_tokens=MAX_NEW_TOKENS,
        beams=beams,
        samples=continuations,
        chunk_length=12,
        delimiters=[DELIMITER],
        seed=seed,
    )


def _parts(count: int) -> Iterator[slice]:
    return (slice(start, start + 20) for start in range(0, count, 20))


def _response(generation: Generation) -> Response:
    return Response(np.array(generation.tokens, np.int32), generation.finish == "length")


def _by_sum(scored: Sequence[ScoredResponse]) -> list[Sequence[ScoredResponse]]:
    return [scored[start : start + SIZES[-1]] for start in range(0, len(scored), SIZES[-1])]


def _score(
    policy: LoadedModel, base: LoadedModel, dataset: Dataset, beta: float, mesh: Mesh, *, entropies: bool = False
) -> list[ScoredResponse]:
    """Scores responses, and finds their steps."""
    scored = score_dataset(
        policy, base.params, dataset, beta=beta, batch_size=SCORED_AT_ONCE, mesh=mesh, entropies=entropies
    )
    return with_steps(scored, (), DataOptions(step_delimiter=DELIMITER), base.tokenizer.all_special_ids)


def _source(seed: int) -> str:
    return f"{TASK.source}?seed={seed}"
