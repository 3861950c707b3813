"""A whole run on a reward, from its configuration to its summary: what `qstar rl` does."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from qstar_jax.config import RlConfig
from qstar_jax.config.paths import recorded
from qstar_jax.console import say
from qstar_jax.data.batches import Batch
from qstar_jax.data.tokenization import Response
from qstar_jax.decoding import SampleOptions
from qstar_jax.decoding.eos import eos_token_ids
from qstar_jax.errors import InputError
from qstar_jax.interruption import StopSignals
from qstar_jax.sharding import make_mesh, use_mesh
from qstar_jax.store.checkpoint_store import CheckpointStore
from qstar_jax.store.sole_writer import sole_writer
from qstar_jax.store.user_cache import keep_programs
from qstar_jax.training.diagnostics.estimate import device_memory, estimate
from qstar_jax.training.diagnostics.nonfinite import find_cause
from qstar_jax.training.diagnostics.responses import make_responder
from qstar_jax.training.loop import Loop
from qstar_jax.training.metrics import mean_metrics
from qstar_jax.training.objectives.policy_gradient import sample_metrics
from qstar_jax.training.objectives.responses import token_counts
from qstar_jax.training.optimizers import count_steps, learning_rate_schedule, make_optimizer
from qstar_jax.training.plan import RunPlan
from qstar_jax.training.profile import make_profile
from qstar_jax.training.rl.batches import Batcher
from qstar_jax.training.rl.evaluator import SampleEvaluator
from qstar_jax.training.rl.guide import open_guide
from qstar_jax.training.rl.plan import make_rl_plan, updates_per_step
from qstar_jax.training.rl.prompts import Prompts, RewardMaker, load_prompts
from qstar_jax.training.rl.rewards import Assessor, Guide
from qstar_jax.training.rl.sampling import PolicySampler
from qstar_jax.training.rl.source import SampleSource, Scorer
from qstar_jax.training.rl.step import find_cause_of_update, make_rl_step
from qstar_jax.training.run import (
    Run,
    announce,
    begin_folder,
    best_evaluation,
    finish,
    is_complete,
    open_log,
    read_summary,
    save,
)
from qstar_jax.training.run_log import RunLog
from qstar_jax.training.setup import build_state, describe, find_start, state_shardings
from qstar_jax.training.step import TrainState, make_train_step
from qstar_jax.training.throughput import Throughput
from qstar_jax.training.trackers import Trackers

TOLERANCE = 1e-3  # nats: what sampler and training pass may differ by at one token, on average


def train_rl(
    config: RlConfig,
    make_reward: RewardMaker,
    console: Console | None = None,
    watch: Callable[[], None] | None = None,
) -> dict[str, float | str]:
    """Trains a model on rewards of its own samples, and leaves a run folder that every other verb reads.

    Args:
        config: The options.
        make_reward: Makes the reward of responses to some prompts (see `evaluation.rewards.reward_maker`).
        console: Where to show progress; the standard output by default.
        watch: Called on the first process after every line of metrics.jsonl.

    Returns:
        The summary that is also written to summary.json.

    Raises:
        InputError: If the model, the prompts or the options cannot be used, or a response has no reward.
        RuntimeError: If sampler and training pass disagree on the first samples.
        FloatingPointError: If the loss is not finite.
        Stopped: If a signal asked for it; the run resumes where it stopped.
    """
    began = time.perf_counter()
    # Plan: resolve the options, before anything is loaded or written.
    console = (console or Console()) if jax.process_index() == 0 else Console(quiet=True)
    plan = announce(make_rl_plan(config), console)
    mesh = make_mesh(plan.config.mesh)
    keep_programs()
    with Trackers(plan.config.log, plan.out) as trackers:
        with (
            use_mesh(mesh, plan.config.compute.dtype),
            StopSignals() as stop,
            sole_writer(plan.out),
            CheckpointStore(plan.out, plan.config.train.keep_checkpoints) as store,
        ):
            # Start: open the model or a checkpoint, the guide, and the prompts.
            run, guide = _prepare(plan, store, mesh, console)
            if is_complete(run):
                return read_summary(run)
            # Before anything is written, as rewards and trackers may be refused.
            source = _source(run, guide, make_reward)
            evaluators = [_evaluator(run, guide, make_reward)] if run.inputs.held_out else []
            trackers.start(recorded(run.plan.config), run.start.step)
            # State: put parameters and optimizer on the mesh.
            state = build_state(run.plan, run.start, run.optimizer, store, mesh, run.description)
            begin_folder(run)
            # Loop: sample, train, evaluate and save.
            with open_log(run, watch, trackers) as log:
                loop = _make_loop(run, source, evaluators, state, store, log, stop)
                _, summary = loop.run(state, run.start.step)
        # Summary.
        return finish(run, summary, None, time.perf_counter() - began, trackers)


def _prepare(plan: RunPlan, store: CheckpointStore, mesh: Mesh, console: Console) -> tuple[Run, Guide | None]:
    """Opens the model (or a checkpoint), the guide and the prompts, and makes loss and optimizer."""
    start = find_start(plan, store, mesh)
    guide = open_guide(plan, start, mesh, console)
    inputs = load_prompts(plan, start, guide, console)
    plan = plan.with_date(inputs.date)
    options, updates = plan.config.train, updates_per_step(plan.config.rl)
    prompts = len(inputs.train.dataset.examples)
    steps = options.steps or -(-int(np.ceil((options.epochs or 1) * prompts)) // options.batch_size)
    # The schedule counts updates; a warm-up is given in steps.
    warmup = count_steps(plan.config.optimizer.warmup_steps, steps) * updates
    optimizer = replace(plan.config.optimizer, warmup_steps=warmup)
    run = Run(
        plan=plan,
        start=start,
        inputs=inputs,
        steps=steps,
        loss_fn=plan.objective.loss_fn(start.model),
        optimizer=make_optimizer(optimizer, steps * updates),
        description=describe(plan, start, inputs.identity),
        best=best_evaluation(plan, start.step),
        profile=make_profile(options.profile, plan.out, steps),
        mesh=mesh,
        console=console,
    )
    return run, guide


def _make_loop(
    run: Run,
    source: SampleSource,
    evaluators: Sequence[SampleEvaluator],
    state: TrainState,
    store: CheckpointStore,
    log: RunLog | None,
    stop: StopSignals,
) -> Loop:
    """Makes the training loop; estimates what a step needs before anything is compiled."""
    plan, config, model, inputs = run.plan, run.plan.config, run.start.model, run.inputs
    updates = updates_per_step(config.rl)
    say(run.console, _estimate(run, state, source))
    accumulate = config.train.accumulate
    update = make_train_step(run.loss_fn, run.optimizer, accumulate=accumulate)
    passes = {"inner_epochs": config.rl.inner_epochs or 1, "minibatches": config.rl.minibatches or 1}
    step = make_rl_step(update, **passes, accumulate=accumulate)
    cause_of_one = partial(find_cause, model, run.loss_fn, accumulate=accumulate)
    schedule = learning_rate_schedule(config.optimizer, run.steps)
    throughput = Throughput(model, config.train.batch_size * config.rl.samples_per_prompt, plan.runs_reference, None)
    shown = (inputs.held_out or inputs.train).dataset
    return Loop(
        options=config.train,
        steps=run.steps,
        train_step=jax.jit(step, donate_argnums=0, out_shardings=(state_shardings(state), state.step.sharding)),
        source=source,
        evaluators=evaluators,
        schedule=schedule,
        throughput=lambda counts, seconds: throughput(counts, seconds) | source.clock.read(),
        check_first=_check_first if updates == 1 else None,
        save=partial(save, run, store),
        find_cause=partial(find_cause_of_update, cause_of_one, update, **passes, accumulate=accumulate),
        respond=make_responder(plan, run.start, shown, run.mesh, run.console, limit=config.rl.max_new_tokens),
        best=run.best,
        log=log,
        profile=run.profile,
        window=run.start.window,
        stop=stop,
    )


def _check_first(metrics: dict[str, float]):
    """Refuses a run whose training pass gives the first samples other probabilities than the sampler did."""
    difference = (2 * metrics["policy/approxkl_avg"]) ** 0.5
    if difference > TOLERANCE:
        raise RuntimeError(
            f"sampler and training pass differ by {difference:.2g} nats per token before the first step (root mean "
            f"square; expected at most {TOLERANCE}); one of them computes another model"
        )


def _parts(
    run: Run, guide: Guide | None, prompts: Prompts, *, samples: int, per_part: int, parts: int
) -> dict[str, Any]:
    """What draws samples to some prompts, puts them into batches, and says what they earn."""
    config, start = run.plan.config, run.start
    shards = run.mesh.shape["data"] * run.mesh.shape["fsdp"]
    if per_part % shards:
        raise InputError(
            f"{per_part} prompts at once do not divide evenly over {shards} devices (mesh data * fsdp); choose "
            "train.batch_size (over rl.minibatches and train.accumulate) and train.eval_batch_size so, or give devices "
            "to mesh.tensor"
        )
    limit = config.rl.max_new_tokens
    drawing = SampleOptions(limit, eos_token_ids(start), num_samples=samples, temperature=config.rl.temperature)
    sampler = PolicySampler.of(start.model, drawing, run.mesh, prompts.lengths)
    batcher = Batcher.of(
        prompts.lengths,
        config.data.layout,
        run.mesh,
        prompts_per_part=per_part,
        samples=samples,
        max_new_tokens=limit,
        parts=parts,
    )
    has_reference = run.plan.objective.uses_reference
    assessor = Assessor(start.model, config.rl, config.reward, has_reference, guide, sampler.is_exact, parts)
    return {"sampler": sampler, "batcher": batcher, "assess": assessor.compile()}


def _scorer(run: Run, prompts: Prompts, make_reward: RewardMaker) -> Scorer:
    penalty = run.plan.config.rl.missing_eos_penalty or 0.0
    return Scorer(prompts.dataset.source, prompts.texts, run.start.tokenizer, make_reward(prompts), penalty)


def _source(run: Run, guide: Guide | None, make_reward: RewardMaker) -> SampleSource:
    config, prompts = run.plan.config, run.inputs.train
    parts = (config.rl.minibatches or 1) * config.train.accumulate
    size = config.train.batch_size
    made = _parts(run, guide, prompts, samples=config.rl.samples_per_prompt, per_part=size // parts, parts=parts)
    return SampleSource(
        dataset=prompts.dataset,
        seed=config.train.seed,
        batch_size=size,
        scorer=_scorer(run, prompts, make_reward),
        **made,
    )


def _evaluator(run: Run, guide: Guide | None, make_reward: RewardMaker) -> SampleEvaluator:
    config, prompts = run.plan.config, run.inputs.held_out
    size = config.train.eval_batch_size or config.train.batch_size
    reward = config.reward
    return SampleEvaluator(
        examples=prompts.dataset.examples,
        scorer=_scorer(run, prompts, make_reward),
        metrics=partial(
            sample_metrics,
            kl_coef=config.rl.kl_coef,
            score_weight=reward.weight,
            has_guide=reward.guide is not None,
        ),
        seed=config.train.seed,
        batch_size=size,
        **_parts(run, guide, prompts, samples=1, per_part=size, parts=1),
    )


def _estimate(run: Run, state: TrainState, source: SampleSource) -> str:
    """Estimates a step whose responses are all as long as they may be."""
    config, shape = run.plan.config, (source.batch_size, run.plan.config.rl.samples_per_prompt)
    longest = Response(np.zeros(config.rl.max_new_tokens, np.int32), False)
    examples = [source.dataset.examples[i % len(source.dataset.examples)] for i in range(shape[0])]
    batch = source.batcher(examples, [(longest,) * shape[1]] * shape[0])
    tokens = np.zeros((*shape, config.rl.max_new_tokens), np.float32)
    abstract = jax.eval_shape(source.assess, state.policy, state.ref_params, batch, tokens[..., 0], tokens)
    counts = mean_metrics([token_counts(batch)])
    updates, accumulate = updates_per_step(config.rl), config.train.accumulate
    throughput = Throughput(run.start.model, shape[0] * shape[1], run.plan.runs_reference, None)
    return str(
        estimate(
            run.loss_fn,
            state,
            _one_update(abstract, config.rl.minibatches or 1, accumulate),
            run.mesh,
            flops=throughput.step_flops(counts) * (config.rl.inner_epochs or 1),
            steps=(run.steps - run.start.step) * updates,
            accumulate=accumulate,
            updates=updates,
            limit=device_memory(jax.local_devices()[0]),
        )
    )


def _one_update(batch: Batch, minibatches: int, accumulate: int) -> Batch:
    """Shapes of the micro-batches of one update."""
    if minibatches == 1:
        return batch
    first = (accumulate,) if accumulate > 1 else ()
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((*first, *x.shape[1:]), x.dtype), batch)
