"""A whole training run, from its configuration to its summary: what `qstar sft` and `qstar dpo` do."""

import json
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import jax
import yaml
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.progress import track

from qstar_jax.config import DpoConfig, SftConfig
from qstar_jax.config.paths import check_paths
from qstar_jax.data.batches import Batch
from qstar_jax.data.feeder import Feeder
from qstar_jax.data.loading import load_examples
from qstar_jax.data.preview import preview
from qstar_jax.decoding.eos import eos_token_ids
from qstar_jax.errors import InputError
from qstar_jax.models import CausalLM
from qstar_jax.scoring import response_logprobs
from qstar_jax.sharding import make_mesh
from qstar_jax.store.checkpoints import CheckpointStore
from qstar_jax.store.files import write_json
from qstar_jax.store.identity import identity_file
from qstar_jax.store.user_cache import keep_programs, user_cache
from qstar_jax.training.continuation import check_folder, check_same_data, data_identity
from qstar_jax.training.diagnostics.decline import FILE, make_probe
from qstar_jax.training.diagnostics.estimate import Estimate, device_memory, estimate
from qstar_jax.training.diagnostics.nonfinite import find_cause
from qstar_jax.training.evaluator import Evaluator, join_evaluators
from qstar_jax.training.loop import Loop
from qstar_jax.training.metrics import mean_metrics
from qstar_jax.training.objectives import (
    LossFn,
    dpo_loss_fn,
    preference_loss,
    resolve_loss,
    sft_loss_fn,
    token_counts,
)
from qstar_jax.training.optimizers import learning_rate_schedule, make_optimizer
from qstar_jax.training.reference import (
    cached_logprobs,
    moves_reference,
    needs_reference,
    resolve_reference,
    runs_reference,
)
from qstar_jax.training.run_log import RunLog
from qstar_jax.training.setup import Start, build_state, describe, find_start, saved_arrays
from qstar_jax.training.step import TrainState, make_train_step
from qstar_jax.training.throughput import peak_flops, peak_memory_bytes


def train(config: SftConfig | DpoConfig, console: Console | None = None) -> dict[str, float | str]:
    """Trains a model and leaves a run folder that every other verb reads.

    Args:
        config: An `SftConfig` minimises cross-entropy on answers, a `DpoConfig` the DPO loss on pairs.
        console: Where to show progress; the standard output by default.

    Returns:
        The summary that is also written to summary.json.

    Raises:
        InputError: If the model, the data or the options cannot be used.
        RuntimeError: If the loss at step 0 is not that of a policy which equals its reference.
        FloatingPointError: If the loss is not finite.
    """
    began = time.perf_counter()
    is_main = jax.process_index() == 0
    console = (console or Console()) if is_main else Console(quiet=True)
    check_paths(config)
    out = Path(config.out)
    if not config.data.train:
        raise InputError("--data.train is missing: name a JSONL or Parquet file, or a data set of the hub")
    first_loss = None
    if isinstance(config, DpoConfig):
        config = replace(config, loss=resolve_loss(config.loss))
        loss = preference_loss(config.loss)
        first_loss = loss.loss_at_reference
        config = replace(config, reference=resolve_reference(config))
        if config.train.accumulate > 1 and loss.couples_rows:
            raise InputError(
                f"train.accumulate {config.train.accumulate}: {loss} looks at its whole batch, and would see "
                "micro-batches; set it to 1, or loss.normalize answer_tokens where that is the reason"
            )
        console.print(f"loss: {loss}", markup=False, highlight=False, soft_wrap=True)
    _say(console, check_folder(config))
    mesh = make_mesh(config.mesh)
    keep_programs()
    with jax.set_mesh(mesh), CheckpointStore(out, config.train.keep_checkpoints) as store:
        start = find_start(config, store, mesh)
        feeder, eval_feeder = _feeders(config, start, mesh, console)
        config = _with_date(config, feeder, eval_feeder)
        data = data_identity(feeder.dataset.examples, eval_feeder and eval_feeder.dataset.examples)
        if start.began:
            _say(console, check_same_data(config, start.began, data))
        steps = config.train.steps or -(-len(feeder.dataset.examples) // feeder.batch_size)
        if start.step >= steps:
            console.print(f"{out} is complete: {start.step} of {steps} steps are done", markup=False, highlight=False)
            summary = out / "summary.json"
            return json.loads(summary.read_text(encoding="utf-8")) if summary.exists() else {}
        if needs_reference(config) and not runs_reference(config):
            feeder, eval_feeder = (_with_cached_reference(config, start, f, console) for f in (feeder, eval_feeder))
        description = describe(config, start, data)
        state = build_state(config, start, store, mesh, steps, description)
        if is_main:
            if start.step == 0:
                _remove_earlier(out)
            (out / "config.yaml").write_text(yaml.safe_dump(asdict(config), sort_keys=False), encoding="utf-8")
        log = RunLog(out, steps=steps, start=start.step, console=console) if is_main else None
        loss_fn = _loss_fn(config, start.model)
        probe = make_probe(config, start, state.policy, eval_feeder or feeder, mesh, console)
        with log or nullcontext():
            evaluator = eval_feeder and _evaluator(config, start.model, loss_fn, eval_feeder, state, log)
            hardware = peak_flops(jax.devices())
            needs = _estimate(config, start, loss_fn, feeder, state, mesh, steps, hardware)
            console.print(str(needs), markup=False, highlight=False, soft_wrap=True)
            loop = Loop(
                options=config.train,
                steps=steps,
                train_step=_jit_step(config, loss_fn, steps, state, mesh),
                feeder=feeder,
                evaluator=join_evaluators([evaluator, probe]),
                schedule=learning_rate_schedule(config.optimizer, steps),
                step_flops=partial(_step_flops, config, start.model, feeder),
                peak_flops=hardware,
                first_loss=first_loss,
                save=lambda state, step: store.save(step, saved_arrays(config, state), description),
                find_cause=partial(find_cause, start.model, loss_fn),
                log=log,
            )
            summary = loop.run(state, start.step)
    summary |= {"steps": steps, "seconds": time.perf_counter() - began, "peak_memory_bytes": peak_memory_bytes()}
    if probe:
        summary["verdict"] = probe.verdict(summary)
        console.print(f"verdict: {summary['verdict']}", markup=False, highlight=False, soft_wrap=True)
    if is_main:
        write_json(out / "summary.json", summary)
        console.print(f"done: {steps} steps; run folder {out}", markup=False, highlight=False, soft_wrap=True)
    return summary


def _say(console: Console, text: str | None):
    if text:
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def _remove_earlier(out: Path):
    """Removes what a run that ended before its first checkpoint has left, so that nothing of it is taken for ours."""
    for name in ("metrics.jsonl", FILE, identity_file(Path(FILE)).name, "summary.json", "curves.png"):
        (out / name).unlink(missing_ok=True)


def _loss_fn(config: SftConfig | DpoConfig, model: CausalLM) -> LossFn:
    return dpo_loss_fn(model, config.loss) if isinstance(config, DpoConfig) else sft_loss_fn(model)


def _feeders(config: SftConfig | DpoConfig, start: Start, mesh: Mesh, console: Console) -> tuple[Feeder, Feeder | None]:
    data, options = replace(config.data, date=start.date), config.train
    kind = "preferences" if isinstance(config, DpoConfig) else "completions"
    model = {"vocabulary": start.model.config.vocab_size, "eos_ids": eos_token_ids(start)}
    train = load_examples(data.train, data.train_split, kind, start.tokenizer, data, data.max_train_rows, **model)
    console.print(train.report(start.model), markup=False, highlight=False, soft_wrap=True)
    console.print(preview(train.examples[0], start.tokenizer))
    feeder = Feeder(train, options.batch_size, mesh, data, "train.batch_size", accumulate=options.accumulate)
    if data.eval is None:
        return feeder, None
    held_out = load_examples(data.eval, data.eval_split, kind, start.tokenizer, data, data.max_eval_rows, **model)
    console.print(held_out.report(start.model), markup=False, highlight=False, soft_wrap=True)
    eval_batch_size = options.eval_batch_size or options.batch_size
    return feeder, Feeder(held_out, eval_batch_size, mesh, data, "train.eval_batch_size")


def _with_date(config: SftConfig | DpoConfig, *feeders: Feeder | None) -> SftConfig | DpoConfig:
    """The configuration with the day that chat templates took for today, with which the run goes on tomorrow."""
    dates = [feeder.dataset.date for feeder in feeders if feeder and feeder.dataset.date]
    return replace(config, data=replace(config.data, date=dates[0] if dates else None))


def _with_cached_reference(config: DpoConfig, start: Start, feeder: Feeder | None, console: Console) -> Feeder | None:
    if feeder is None:
        return None
    folder = Path(config.reference.cache) if config.reference.cache else user_cache("reference")

    def show(batches: Iterable[Batch], description: str, total: int) -> Iterable[Batch]:
        where = f"{description}: {feeder.dataset.source}"
        return track(batches, where, total, console=console, disable=not console.is_terminal)

    logps = cached_logprobs(feeder, start.model.base, start.params, start.reference, folder, show)
    return feeder.with_reference(logps)


def _estimate(
    config: SftConfig | DpoConfig,
    start: Start,
    loss_fn: LossFn,
    feeder: Feeder,
    state: TrainState,
    mesh: Mesh,
    steps: int,
    hardware: float | None,
) -> Estimate:
    batch = feeder.at_step(config.train.seed, start.step)
    return estimate(
        loss_fn,
        state,
        batch,
        mesh,
        flops=_step_flops(config, start.model, feeder, mean_metrics([token_counts(batch)])),
        steps=steps - start.step,
        accumulate=config.train.accumulate,
        limit=device_memory(jax.local_devices()[0]),
        peak_flops=hardware,
    )


def _jit_step(config: SftConfig | DpoConfig, loss_fn: LossFn, steps: int, state: TrainState, mesh: Mesh):
    """Compiles the step so that a state comes out on the shardings on which it went in, in the same buffers."""
    sync = {}
    if isinstance(config, DpoConfig):
        sync = {"sync_every": config.reference.sync_every, "sync_mix": config.reference.sync_mix}
    optimizer = make_optimizer(config.optimizer, steps)
    train_step = make_train_step(loss_fn, optimizer, accumulate=config.train.accumulate, **sync)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())))


def _evaluator(
    config: SftConfig | DpoConfig,
    model: CausalLM,
    loss_fn: LossFn,
    feeder: Feeder,
    state: TrainState,
    log: RunLog | None,
) -> Evaluator:
    track = {"track": log.track} if log else {}
    if not runs_reference(config) or moves_reference(config):
        return Evaluator(feeder, jax.jit(lambda *args: loss_fn(*args)[1]), **track)
    # What does not change is computed once.
    logprobs = jax.jit(lambda params, batch: response_logprobs(model.base, params, batch)[0])
    reference = state.frozen if state.ref_params is None else state.ref_params
    eval_step = jax.jit(lambda params, _, batch: loss_fn(params, None, batch)[1])
    return Evaluator(feeder, eval_step, lambda batch: logprobs(reference, batch), **track)


def _step_flops(config: SftConfig | DpoConfig, model: CausalLM, feeder: Feeder, counts: dict[str, float]) -> float:
    """Model FLOPs of a step: forward and backward of the policy, and forward of the reference where it is run."""
    forward = model.config.forward_flops(
        tokens=counts["count/tokens"],
        scored_tokens=counts["count/scored_tokens"],
        context=counts["count/tokens"] / feeder.batch_size / 2,
    )
    # An adapter leaves out the gradients of the weights, a third of the rest; what it adds itself is not counted.
    return forward * ((3 if model.lora is None else 2) + runs_reference(config))
