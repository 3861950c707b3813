"""A whole training of a pipeline, from its configuration to its summary: the loop of `qstar dpo` on a joint loss."""

import json
import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import yaml
from jax.sharding import Mesh
from rich.console import Console

from qstar_jax.config import PipelineConfig
from qstar_jax.console import say
from qstar_jax.interruption import StopSignals
from qstar_jax.pipeline.evaluator import make_evaluators
from qstar_jax.pipeline.objective import pipeline_loss_fn
from qstar_jax.pipeline.plan import PipelinePlan, check_run_folder, make_pipeline_plan
from qstar_jax.pipeline.rows import PairFeeder, PairRow, row_examples
from qstar_jax.pipeline.start import Opened, describe_stages, load_rows, open_pipeline
from qstar_jax.pipeline.state import by_stage, join_states, save_stages
from qstar_jax.sharding import make_mesh, use_mesh
from qstar_jax.store.checkpoint_store import CheckpointStore
from qstar_jax.store.files import write_json
from qstar_jax.store.sole_writer import sole_writer
from qstar_jax.store.user_cache import keep_programs
from qstar_jax.training.diagnostics.first_loss import check_first_loss
from qstar_jax.training.loop import Loop
from qstar_jax.training.optimizers import learning_rate_schedule, make_optimizer
from qstar_jax.training.run_log import RunLog
from qstar_jax.training.setup import build_state, state_shardings
from qstar_jax.training.source import DatasetSource
from qstar_jax.training.step import TrainState, make_train_step

SUMMARY = "summary.json"
HEADLINE = ("loss", "rewards/margins", "rewards/accuracies", "kl", "reward")


@dataclass(frozen=True)
class _Run:
    """The parts of a run that are made once.

    Attributes:
        plan: Resolved options.
        opened: The models.
        feeder: Pairs to train on.
        held_out: Held-out rows and their examples, if there are any.
        steps: Optimizer steps.
        mesh: Devices.
        console: Where to show progress.
    """

    plan: PipelinePlan
    opened: Opened
    feeder: PairFeeder
    held_out: tuple[Sequence[PairRow], Sequence[Any]] | None
    steps: int
    mesh: Mesh
    console: Console


def train_pipeline(config: PipelineConfig, console: Console | None = None) -> dict[str, Any]:
    """Trains a pipeline, and leaves a run folder for each stage that every other verb reads.

    Args:
        config: The options.
        console: Where to show progress; the standard output by default.

    Returns:
        The summary that is also written to summary.json.

    Raises:
        InputError: If a model, the rows or the options cannot be used.
        RuntimeError: If the loss at step 0 is not that of policies which equal their references.
        FloatingPointError: If the loss is not finite.
        Stopped: If a signal asked for it; the run resumes where it stopped.
    """
    began = time.perf_counter()
    # Plan: resolve the options, before anything is loaded or written.
    console = (console or Console()) if jax.process_index() == 0 else Console(quiet=True)
    plan = make_pipeline_plan(config)
    for note in check_run_folder(plan):
        say(console, note)
    mesh = make_mesh(config.mesh)
    keep_programs()
    with use_mesh(mesh, config.compute.dtype), StopSignals() as stop, sole_writer(plan.out), ExitStack() as stack:
        # If a save is interrupted, the step before it is one that all have.
        keep = max(config.train.keep_checkpoints, 2)
        stores = {name: stack.enter_context(CheckpointStore(run.out, keep)) for name, run in plan.runs.items()}
        # Start: open the models or their checkpoints, and the rows.
        opened = open_pipeline(plan, stores, mesh)
        run, descriptions = _prepare(plan, opened, mesh, console)
        if opened.first.step >= run.steps and (plan.out / SUMMARY).exists():
            say(console, f"{plan.out} is complete: {run.steps} steps are done")
            return json.loads((plan.out / SUMMARY).read_text(encoding="utf-8"))
        # State: put parameters and optimizers on the mesh.
        optimizer = make_optimizer(config.optimizer, run.steps)
        state = join_states(
            {
                name: build_state(one, opened.starts[name], optimizer, stores[name], mesh, descriptions[name])
                for name, one in plan.runs.items()
            }
        )
        _begin_folder(plan, opened.first.step)
        # Loop: train, evaluate and save.
        with _open_log(run) as log:
            loop = _make_loop(run, state, partial(save_stages, plan, stores, descriptions), log, stop)
            _, summary = loop.run(state, opened.first.step)
    summary = {"steps": run.steps} | summary | {"seconds": time.perf_counter() - began}
    if jax.process_index() == 0:
        write_json(plan.out / SUMMARY, summary)
        say(console, f"done: {run.steps} steps; run folder {plan.out}")
    return summary


def _prepare(plan: PipelinePlan, opened: Opened, mesh: Mesh, console: Console) -> tuple[_Run, dict[str, Any]]:
    """Reads the rows, and describes the checkpoints of each stage."""
    config, names = plan.config, list(plan.runs)
    train, held_out = load_rows(plan, console)
    source, options = config.data.train, config.train
    examples = row_examples(opened.stages, train, source, trained=names)
    held_out_examples = held_out and row_examples(opened.stages, held_out, config.data.eval, trained=names)
    sizes = {"layout": config.data.layout, "accumulate": options.accumulate}
    feeder = PairFeeder(examples, source, options.batch_size, mesh, **sizes)
    descriptions = describe_stages(plan, opened, examples, held_out_examples, console)
    say(console, f"{source}: {len(train)} pairs; stages {', '.join(stage.name for stage in opened.stages)}")
    run = _Run(
        plan=plan,
        opened=opened,
        feeder=feeder,
        held_out=held_out and (held_out, held_out_examples),
        steps=options.steps or math.ceil((options.epochs or 1) * feeder.batches),
        mesh=mesh,
        console=console,
    )
    return run, descriptions


def _make_loop(run: _Run, state: TrainState, save: Any, log: RunLog | None, stop: StopSignals) -> Loop:
    """Makes the training loop."""
    config, loss_fn = run.plan.config, pipeline_loss_fn(run.opened.of)
    track = log.track if log else (lambda batches, description, total: batches)
    evaluators = make_evaluators(run.plan, run.opened, loss_fn, *run.held_out, run.mesh, track) if run.held_out else ()
    optimizer = by_stage(make_optimizer(config.optimizer, run.steps))
    step = make_train_step(loss_fn, optimizer, accumulate=config.train.accumulate)
    return Loop(
        options=config.train,
        steps=run.steps,
        train_step=jax.jit(step, donate_argnums=0, out_shardings=(state_shardings(state), state.step.sharding)),
        source=DatasetSource(run.feeder, config.train.seed),
        evaluators=evaluators,
        schedule=learning_rate_schedule(config.optimizer, run.steps),
        check_first=partial(check_first_loss, expected=math.log(2)),
        save=save,
        log=log,
        window=run.opened.first.window,
        stop=stop,
    )


def _begin_folder(plan: PipelinePlan, start: int):
    """Writes config.yaml, of the run and of each stage; a fresh run removes what one before it has left."""
    if jax.process_index() != 0:
        return
    if start == 0:
        for name in ("metrics.jsonl", SUMMARY, "curves.png"):
            (plan.out / name).unlink(missing_ok=True)
    for folder, options in ((plan.out, plan.config), *((run.out, run.config) for run in plan.runs.values())):
        text = yaml.safe_dump(asdict(options), sort_keys=False)
        (folder / "config.yaml").write_text(text, encoding="utf-8")


def _open_log(run: _Run) -> AbstractContextManager[RunLog | None]:
    """The log, on the first process only."""
    if jax.process_index() != 0:
        return nullcontext()
    return RunLog(run.plan.out, steps=run.steps, start=run.opened.first.step, console=run.console, headline=HEADLINE)
