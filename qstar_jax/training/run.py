"""A whole training run, from its configuration to its summary: what `qstar sft` and `qstar dpo` do."""

import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import optax
import yaml
from jax.sharding import Mesh
from rich.console import Console

from qstar_jax.config import DpoConfig, SftConfig
from qstar_jax.config.paths import recorded
from qstar_jax.console import say
from qstar_jax.data.batches import Batch
from qstar_jax.interruption import StopSignals
from qstar_jax.sharding import make_mesh, use_mesh
from qstar_jax.store.checkpoint_store import CheckpointStore
from qstar_jax.store.checkpoints import BEST, Description, read_best
from qstar_jax.store.files import write_json
from qstar_jax.store.identity import identity_file
from qstar_jax.store.sole_writer import sole_writer
from qstar_jax.store.user_cache import keep_programs
from qstar_jax.training.best import BestEvaluation
from qstar_jax.training.continuation import check_folder
from qstar_jax.training.diagnostics.decline import FILE, Probe, make_probe
from qstar_jax.training.diagnostics.estimate import Estimate, device_memory, estimate
from qstar_jax.training.diagnostics.first_loss import check_first_loss
from qstar_jax.training.diagnostics.nonfinite import find_cause
from qstar_jax.training.diagnostics.responses import RESPONSES, make_responder
from qstar_jax.training.evaluator import make_evaluator
from qstar_jax.training.inputs import ExampleChange, Inputs, load_inputs, with_cached_reference
from qstar_jax.training.loop import Loop
from qstar_jax.training.metrics import Metrics, mean_metrics
from qstar_jax.training.objectives import LossFn
from qstar_jax.training.objectives.responses import token_counts
from qstar_jax.training.optimizers import learning_rate_schedule, make_optimizer
from qstar_jax.training.plan import RunPlan, make_plan
from qstar_jax.training.profile import StepProfile, make_profile
from qstar_jax.training.run_log import RunLog
from qstar_jax.training.setup import Start, build_state, describe, find_start, jit_step, saved_arrays
from qstar_jax.training.source import DatasetSource
from qstar_jax.training.step import TrainState
from qstar_jax.training.throughput import Throughput, peak_flops, peak_memory_bytes
from qstar_jax.training.trackers import Trackers

SUMMARY = "summary.json"


@dataclass(frozen=True)
class Run:
    """The parts of a run that are made once and that every phase reads.

    Attributes:
        plan: Resolved options and objective.
        start: The model, and the step at which the run begins.
        inputs: The examples.
        steps: Optimizer steps.
        loss_fn: The objective's loss of the model.
        optimizer: The optax transformation.
        description: What is stored beside the parameters.
        best: Which evaluation was the best, if its checkpoint is kept.
        profile: Traces some steps, if that was asked for.
        mesh: The devices.
        console: Where to show progress.
    """

    plan: RunPlan
    start: Start
    inputs: Inputs
    steps: int
    loss_fn: LossFn
    optimizer: optax.GradientTransformation
    description: Description
    best: BestEvaluation | None
    profile: StepProfile | None
    mesh: Mesh
    console: Console


def train(
    config: SftConfig | DpoConfig,
    console: Console | None = None,
    watch: Callable[[], None] | None = None,
    change: ExampleChange | None = None,
) -> dict[str, float | str]:
    """Trains a model and leaves a run folder that every other verb reads.

    Args:
        config: An `SftConfig` minimizes cross-entropy on responses, a `DpoConfig` a preference loss on pairs.
        console: Where to show progress; the standard output by default.
        watch: Called on the first process after every line of metrics.jsonl.
        change: Ablations only: what becomes of each example that was read. It is not part of the configuration; a run
            is resumed only if it gives the same examples.

    Returns:
        The summary that is also written to summary.json.

    Raises:
        InputError: If the model, the data or the options cannot be used.
        RuntimeError: If the loss at step 0 is not that of a policy which equals its reference.
        FloatingPointError: If the loss is not finite.
        Stopped: If a signal asked for it; the run resumes where it stopped.
    """
    began = time.perf_counter()
    # Plan: resolve the options, before anything is loaded or written.
    console = (console or Console()) if jax.process_index() == 0 else Console(quiet=True)
    plan = announce(make_plan(config), console)
    mesh = make_mesh(plan.config.mesh)
    keep_programs()
    with Trackers(plan.config.log, plan.out) as trackers:
        with (
            use_mesh(mesh, plan.config.compute.dtype),
            StopSignals() as stop,
            sole_writer(plan.out),
            CheckpointStore(plan.out, plan.config.train.keep_checkpoints) as store,
        ):
            # Start: open the model or a checkpoint, and the data.
            run = _prepare(plan, store, mesh, console, change)
            if is_complete(run):
                return read_summary(run)
            trackers.start(recorded(run.plan.config), run.start.step)  # may be refused, before anything is written
            run = replace(run, inputs=with_cached_reference(run.plan, run.start, run.inputs, console))
            # State: put parameters and optimizer on the mesh.
            state = build_state(run.plan, run.start, run.optimizer, store, mesh, run.description)
            begin_folder(run)
            # Loop: train, evaluate and save.
            with open_log(run, watch, trackers) as log:
                probe = make_probe(run.plan, run.start, state.policy, run.inputs.prompts, mesh, console)
                loop, batch = _make_loop(run, state, store, probe, log, stop)
                _, summary = loop.run(state, run.start.step, batch)
        # Summary.
        return finish(run, summary, probe, time.perf_counter() - began, trackers)


def announce(plan: RunPlan, console: Console) -> RunPlan:
    """Shows what is resolved, and what the run's folder holds, before anything is loaded."""
    if plan.objective.description:
        say(console, f"loss: {plan.objective.description}")
    if note := check_folder(plan):
        say(console, note)
    return plan


def _prepare(plan: RunPlan, store: CheckpointStore, mesh: Mesh, console: Console, change: ExampleChange | None) -> Run:
    """Opens the model (or a checkpoint) and the data, and makes loss and optimizer."""
    start = find_start(plan, store, mesh)
    inputs = load_inputs(plan, start, mesh, console, change)
    plan = plan.with_date(inputs.date)
    options = plan.config.train
    steps = options.steps or math.ceil((options.epochs or 1) * inputs.train.batches)
    return Run(
        plan=plan,
        start=start,
        inputs=inputs,
        steps=steps,
        loss_fn=plan.objective.loss_fn(start.model),
        optimizer=make_optimizer(plan.config.optimizer, steps),
        description=describe(plan, start, inputs.identity),
        best=best_evaluation(plan, start.step),
        profile=make_profile(options.profile, plan.out, steps),
        mesh=mesh,
        console=console,
    )


def best_evaluation(plan: RunPlan, start: int) -> BestEvaluation | None:
    """The record of the best evaluation, if its checkpoint is kept."""
    options = plan.config.train
    if options.keep_best is None:
        return None
    writes = jax.process_index() == 0
    return BestEvaluation(plan.out, options.keep_best, patience=options.patience, start=start, writes=writes)


def save(run: Run, store: CheckpointStore, state: TrainState, step: int, window: Sequence[Metrics]):
    """Writes a checkpoint; `window` has the metrics of steps that are not logged yet."""
    window = [{name: [float(x) for x in pair] for name, pair in metrics.items()} for metrics in jax.device_get(window)]
    store.save(step, saved_arrays(run.plan, state), replace(run.description, window=window))


def is_complete(run: Run) -> bool:
    """Whether a run has taken all its steps already, and said so."""
    took_all = run.start.step >= run.steps or (run.best is not None and run.best.is_exhausted)
    return took_all and (run.plan.out / SUMMARY).exists()


def read_summary(run: Run) -> dict[str, float | str]:
    """The summary of a run that is complete."""
    out = run.plan.out
    say(run.console, f"{out} is complete: {run.start.step} of {run.steps} steps are done")
    return json.loads((out / SUMMARY).read_text(encoding="utf-8"))


def begin_folder(run: Run):
    """Writes config.yaml; a fresh run removes the files of one that ended before its first checkpoint."""
    if jax.process_index() != 0:
        return
    if run.start.step == 0:
        for name in (
            "metrics.jsonl",
            BEST,
            RESPONSES,
            FILE,
            identity_file(Path(FILE)).name,
            SUMMARY,
            "curves.png",
        ):
            (run.plan.out / name).unlink(missing_ok=True)
    text = yaml.safe_dump(recorded(run.plan.config), sort_keys=False)
    (run.plan.out / "config.yaml").write_text(text, encoding="utf-8")


def open_log(run: Run, watch: Callable[[], None] | None, trackers: Trackers) -> AbstractContextManager[RunLog | None]:
    """The log, on the first process only."""
    if jax.process_index() != 0:
        return nullcontext()
    headline = (*run.plan.objective.headline, "perf/tokens_per_second")
    progress = {"steps": run.steps, "start": run.start.step, "console": run.console}
    return RunLog(run.plan.out, **progress, headline=headline, watch=watch, trackers=trackers)


def _make_loop(
    run: Run,
    state: TrainState,
    store: CheckpointStore,
    probe: Probe | None,
    log: RunLog | None,
    stop: StopSignals,
) -> tuple[Loop, Batch]:
    """Makes the training loop and its first batch; estimates what a step needs before anything is compiled."""
    plan, options, model, loss_fn = run.plan, run.plan.config.train, run.start.model, run.loss_fn
    # What evaluation measures: held-out examples, and the reference's own samples.
    evaluators = [probe] if probe else []
    if run.inputs.held_out:
        track = log.track if log else (lambda batches, description, total: batches)
        evaluators.insert(0, make_evaluator(plan, model, loss_fn, run.inputs.held_out, state, track))
    # The first batch, from which memory and arithmetic are estimated.
    source = DatasetSource(run.inputs.train, options.seed)
    batch = source.at_step(run.start.step, state)
    throughput = Throughput(model, options.batch_size, plan.runs_reference, peak_flops(jax.devices()))
    say(run.console, str(_estimate(run, state, batch, throughput)))
    expected = plan.objective.loss_at_reference
    loop = Loop(
        options=options,
        steps=run.steps,
        train_step=jit_step(plan, model, run.optimizer, state),
        source=source,
        evaluators=evaluators,
        schedule=learning_rate_schedule(plan.config.optimizer, run.steps),
        throughput=throughput,
        check_first=None if expected is None else partial(check_first_loss, expected=expected),
        save=partial(save, run, store),
        find_cause=partial(find_cause, model, loss_fn, accumulate=options.accumulate),
        respond=make_responder(plan, run.start, run.inputs.prompts.dataset, run.mesh, run.console),
        best=run.best,
        log=log,
        profile=run.profile,
        window=run.start.window,
        stop=stop,
    )
    return loop, batch


def _estimate(run: Run, state: TrainState, batch: Batch, throughput: Throughput) -> Estimate:
    return estimate(
        run.loss_fn,
        state,
        batch,
        run.mesh,
        flops=throughput.step_flops(mean_metrics([token_counts(batch)])),
        steps=run.steps - run.start.step,
        accumulate=run.plan.config.train.accumulate,
        limit=device_memory(jax.local_devices()[0]),
        peak_flops=throughput.peak_flops,
    )


def finish(
    run: Run, summary: dict[str, float], probe: Probe | None, seconds: float, trackers: Trackers
) -> dict[str, float | str]:
    """Completes the summary, writes it, and sends it to the trackers."""
    summary = {"steps": run.steps} | summary | {"seconds": seconds, "peak_memory_bytes": peak_memory_bytes()}
    if probe and (verdict := probe.verdict(summary)):
        summary["verdict"] = verdict
        say(run.console, f"verdict: {verdict}")
    if jax.process_index() == 0:
        write_json(run.plan.out / SUMMARY, summary)
        trackers.summarize(summary)
        if best := read_best(run.plan.out):
            evaluation = f"{best['metric']} {best['value']:.4g} at step {best['step']}"
            say(run.console, f"best: {evaluation}, whose checkpoint other verbs read")
        steps = f"{summary['steps']} steps"
        if summary["steps"] < run.steps:
            steps += f" of {run.steps}, as {run.plan.config.train.keep_best} did not improve"
        say(run.console, f"done: {steps}; run folder {run.plan.out}")
    return summary
