"""A whole training of a pipeline, from its configuration to its summary: the loop of `qstar dpo` on a joint loss."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np
import optax
import yaml
from jax.sharding import Mesh
from rich.console import Console

from qstar_jax.config import PipelineConfig
from qstar_jax.console import say
from qstar_jax.decoding.eos import Decodable, eos_token_ids
from qstar_jax.errors import InputError
from qstar_jax.pipeline.arms import Meter
from qstar_jax.pipeline.language import LanguageStage
from qstar_jax.pipeline.objective import pipeline_loss_fn
from qstar_jax.pipeline.plan import PipelinePlan, check_run_folder, make_pipeline_plan
from qstar_jax.pipeline.rows import PairFeeder, PairRow, labelled, pad_to_multiple, read_pairs, row_examples
from qstar_jax.pipeline.stage import Outputs, Stage
from qstar_jax.pipeline.template import Template
from qstar_jax.sharding import make_mesh, use_mesh
from qstar_jax.store.checkpoints import CheckpointStore, Description
from qstar_jax.store.files import write_json
from qstar_jax.store.open import load_model
from qstar_jax.store.user_cache import keep_programs
from qstar_jax.training.continuation import check_same_data, data_identity
from qstar_jax.training.diagnostics.first_loss import check_first_loss
from qstar_jax.training.evaluator import Evaluator
from qstar_jax.training.loop import Loop
from qstar_jax.training.optimizers import learning_rate_schedule, make_optimizer
from qstar_jax.training.run_log import RunLog
from qstar_jax.training.setup import Start, build_state, describe, find_start, saved_arrays, state_shardings
from qstar_jax.training.source import DatasetSource
from qstar_jax.training.step import TrainState, make_train_step

HEADLINE = ("loss", "rewards/margins", "rewards/accuracies", "kl", "reward")


@dataclass(frozen=True)
class Opened:
    """The stages of a run.

    Attributes:
        stages: All of them.
        starts: Where each trained one begins, by name.
        fixed: Parameters of the others, by name; empty if nobody samples.
    """

    stages: tuple[LanguageStage, ...]
    starts: dict[str, Start]
    fixed: dict[str, Any]

    def of(self, ref_params: Mapping[str, Any] | None) -> list[Stage]:
        """Makes stages from the references' parameters; an adapter's reference is its base."""
        return [stage.stage((ref_params or {}).get(stage.name)) for stage in self.stages]


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
    """
    began = time.perf_counter()
    # Plan: resolve the options, before anything is loaded or written.
    console = (console or Console()) if jax.process_index() == 0 else Console(quiet=True)
    plan = make_pipeline_plan(config)
    for note in check_run_folder(plan):
        say(console, note)
    mesh = make_mesh(config.mesh)
    keep_programs()
    with use_mesh(mesh, config.compute.dtype), ExitStack() as stack:
        # If a save is interrupted, the step before it is one that all have.
        keep = max(config.train.keep_checkpoints, 2)
        stores = {name: stack.enter_context(CheckpointStore(run.out, keep)) for name, run in plan.runs.items()}
        # Start: open the models or their checkpoints, and the rows.
        opened = _open(plan, stores, mesh)
        train, held_out = _rows(plan, console)
        names, source = list(plan.runs), config.data.train
        examples = row_examples(opened.stages, train, source, trained=names)
        sizes = {"layout": config.data.layout, "accumulate": config.train.accumulate}
        feeder = PairFeeder(examples, source, config.train.batch_size, mesh, **sizes)
        steps = config.train.steps or math.ceil((config.train.epochs or 1) * feeder.batches)
        held_out_examples = held_out and row_examples(opened.stages, held_out, config.data.eval, trained=names)
        descriptions = _describe(plan, opened, examples, held_out_examples, console)
        say(console, f"{source}: {len(train)} pairs; stages {', '.join(s.name for s in opened.stages)}")
        start = next(iter(opened.starts.values())).step
        if start >= steps:
            return _read_summary(plan, steps, console)
        # State: put parameters and optimizers on the mesh.
        one = make_optimizer(config.optimizer, steps)
        states = {
            name: build_state(run, opened.starts[name], one, stores[name], mesh, descriptions[name])
            for name, run in plan.runs.items()
        }
        state, optimizer = _join(states), by_stage(one)
        _begin_folder(plan, start)
        # Loop: train, evaluate and save.
        loss_fn = pipeline_loss_fn(opened.of)
        step = make_train_step(loss_fn, optimizer, accumulate=config.train.accumulate)
        log = stack.enter_context(_open_log(plan, steps, start, console))
        track = log.track if log else (lambda batches, description, total: batches)
        evaluators = []
        if held_out:
            size = config.train.eval_batch_size or config.train.batch_size
            held = PairFeeder(
                held_out_examples, config.data.eval, size, mesh, config.data.layout, "train.eval_batch_size"
            )
            evaluators.append(Evaluator(held, jax.jit(lambda *args: loss_fn(*args)[1]), track=track))
        if held_out and config.samples.eval_prompts:
            evaluators.append(_sampler(plan, opened, held_out, mesh))
        loop = Loop(
            options=config.train,
            steps=steps,
            train_step=jax.jit(step, donate_argnums=0, out_shardings=(state_shardings(state), state.step.sharding)),
            source=DatasetSource(feeder, config.train.seed),
            evaluators=evaluators,
            schedule=learning_rate_schedule(config.optimizer, steps),
            check_first=lambda metrics: check_first_loss(metrics, math.log(2)),
            save=lambda state, step: _save(plan, stores, descriptions, state, step),
            log=log,
        )
        _, summary = loop.run(state, start)
    summary = {"steps": steps} | summary | {"seconds": time.perf_counter() - began}
    if jax.process_index() == 0:
        write_json(plan.out / "summary.json", summary)
        say(console, f"done: {steps} steps; run folder {plan.out}")
    return summary


def by_stage(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Makes an optimizer of a dictionary of parameters: one for each entry, with its own state and norm."""

    def init(params: dict[str, Any]) -> dict[str, Any]:
        return {name: optimizer.init(own) for name, own in params.items()}

    def update(grads: dict[str, Any], state: dict[str, Any], params: dict[str, Any] | None = None):
        pairs = {name: optimizer.update(grads[name], state[name], params and params[name]) for name in grads}
        return tuple({name: pair[i] for name, pair in pairs.items()} for i in (0, 1))

    return optax.GradientTransformation(init, update)


def language_stages(plan: PipelinePlan, models: Mapping[str, Decodable], mesh: Mesh) -> tuple[LanguageStage, ...]:
    """Makes the stages of a plan from their models; those without one can neither draw nor be scored."""
    made: dict[str, LanguageStage] = {}
    for options in plan.stages:
        opened = models.get(options.name)
        made[options.name] = LanguageStage(
            name=options.name,
            model=opened and opened.model,
            tokenizer=opened and opened.tokenizer,
            eos_ids=eos_token_ids(opened) if opened else (),
            mesh=mesh,
            template=Template(options.template),
            earlier={name: stage.read for name, stage in made.items()},
            max_new_tokens=options.max_new_tokens,
            beta=options.beta,
            temperature=plan.config.samples.temperature,
            data=plan.data(options),
        )
    return tuple(made.values())


def _open(plan: PipelinePlan, stores: Mapping[str, CheckpointStore], mesh: Mesh) -> Opened:
    """Opens all models: trained ones at the newest step that all have, the others from where they lie."""
    config, latest = plan.config, {name: store.latest_step for name, store in stores.items()}
    missing = [name for name, step in latest.items() if step is None]
    if missing and len(missing) < len(latest):
        raise InputError(
            f"{plan.out / missing[0]} has no checkpoint, and other stages have; the run was interrupted while it wrote "
            "its first one, so begin it anew in another --out"
        )
    step = None if missing else min(latest.values())
    starts = {name: find_start(run, stores[name], mesh, step) for name, run in plan.runs.items()}
    fixed = {}
    if config.data.eval and config.samples.eval_prompts:
        others = [stage for stage in plan.stages if not stage.train]
        fixed = {one.name: load_model(one.model, config.compute, mesh, config.mesh) for one in others}
    stages = language_stages(plan, starts | fixed, mesh)
    return Opened(stages, starts, {name: loaded.params for name, loaded in fixed.items()})


def _rows(plan: PipelinePlan, console: Console) -> tuple[list[PairRow], list[PairRow] | None]:
    names, data = [stage.name for stage in plan.stages], plan.config.data

    def read(source: str, limit: int | None) -> list[PairRow]:
        rows = read_pairs(source, names, limit)
        compared = labelled(rows, source)
        if len(compared) < len(rows):
            say(console, f"{source}: {len(rows) - len(compared)} rows are not compared yet (better is null)")
        return compared

    train = read(data.train, data.max_train_rows)
    return train, None if data.eval is None else read(data.eval, data.max_eval_rows)


def _describe(
    plan: PipelinePlan, opened: Opened, train: Sequence[Any], held_out: Sequence[Any] | None, console: Console
) -> dict[str, Description]:
    """Describes the checkpoints of each trained stage, and refuses to resume with other rows."""
    descriptions = {}
    for place, stage in enumerate(opened.stages):
        if stage.name not in plan.runs:
            continue
        run, start = plan.runs[stage.name], opened.starts[stage.name]
        both = [parts and [*parts[place][0], *parts[place][1]] for parts in (train, held_out)]
        identity = data_identity(*both)
        if start.began and (note := check_same_data(run, start.began, identity)):
            say(console, note)
        descriptions[stage.name] = describe(run, start, identity)
    return descriptions


def _join(states: Mapping[str, TrainState]) -> TrainState:
    """One state of all stages; each part is a dictionary by stage."""

    def part(name: str) -> dict[str, Any] | None:
        parts = {stage: getattr(state, name) for stage, state in states.items()}
        return {stage: value for stage, value in parts.items() if value is not None} or None

    first = next(iter(states.values()))
    parts = {name: part(name) for name in ("params", "opt_state", "ref_params", "frozen")}
    return TrainState(step=first.step, finite=first.finite, **parts)


def _split(state: TrainState, name: str) -> TrainState:
    """The part of one stage."""
    return TrainState(state.step, state.params[name], state.opt_state[name])


def _save(
    plan: PipelinePlan,
    stores: Mapping[str, CheckpointStore],
    descriptions: Mapping[str, Description],
    state: TrainState,
    step: int,
):
    for name, run in plan.runs.items():
        # A stage has this step already if the run was interrupted before all had it; resuming repeats it exactly.
        if stores[name].latest_step != step:
            stores[name].save(step, saved_arrays(run, _split(state, name)), descriptions[name])


def _sampler(plan: PipelinePlan, opened: Opened, held_out: Sequence[PairRow], mesh: Mesh) -> Any:
    """Makes the evaluator that runs the pipeline: KL of each stage, and the true reward if a task knows it."""
    samples, shards = plan.config.samples, mesh.shape["data"] * mesh.shape["fsdp"]
    prompts = list(dict.fromkeys(row.prompt for row in held_out))[: samples.eval_prompts]
    size = -(-min(samples.batch_size, len(prompts)) // shards) * shards
    # A short last batch is filled up with its last prompt, so a few count more than once.
    batches = [pad_to_multiple(prompts[i : i + size], size) for i in range(0, len(prompts), size)]
    last = opened.stages[-1]

    def true_reward(prompt: Sequence[str], outputs: Outputs) -> np.ndarray:
        if plan.task is None:
            return np.zeros(len(prompt))
        return np.array([reward_of(plan, one, text) for one, text in zip(prompt, last.read(outputs[-1]), strict=True)])

    meter = Meter(opened.of, batches, true_reward, jax.random.key(samples.seed))

    def evaluate(params: dict[str, Any], ref_params: Any) -> dict[str, float]:
        # A stage that is not trained is its own reference.
        point = meter({**opened.fixed, **params}, {**opened.fixed, **(ref_params or {})})
        kl = {f"eval_{stage.name}/kl": value for stage, value in zip(opened.stages, point.kl, strict=True)}
        reward = {} if plan.task is None else {"eval_reward": point.reward}
        return {**kl, "eval_kl": point.total_kl, **reward}

    return evaluate


def reward_of(plan: PipelinePlan, prompt: str, text: str) -> float:
    """The true reward of the last text.

    Raises:
        InputError: If the prompt is not one of the task.
    """
    reward = plan.task.true_reward(prompt, text)
    if reward is None:
        raise InputError(f"--task {plan.config.task} does not know the prompt {prompt[-200:]!r}; use its own prompts")
    return reward


def _begin_folder(plan: PipelinePlan, start: int):
    """Writes config.yaml, of the run and of each stage."""
    if jax.process_index() != 0:
        return
    plan.out.mkdir(parents=True, exist_ok=True)
    if start == 0:
        for name in ("metrics.jsonl", "summary.json", "curves.png"):
            (plan.out / name).unlink(missing_ok=True)
    for folder, options in ((plan.out, plan.config), *((run.out, run.config) for run in plan.runs.values())):
        text = yaml.safe_dump(asdict(options), sort_keys=False)
        (folder / "config.yaml").write_text(text, encoding="utf-8")


def _open_log(plan: PipelinePlan, steps: int, start: int, console: Console) -> Any:
    if jax.process_index() != 0:
        return nullcontext()
    return RunLog(plan.out, steps=steps, start=start, console=console, headline=HEADLINE)


def _read_summary(plan: PipelinePlan, steps: int, console: Console) -> dict[str, Any]:
    say(console, f"{plan.out} is complete: {steps} steps are done")
    path = plan.out / "summary.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
