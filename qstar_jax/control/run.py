"""Runs of `qstar control`: arms with and without behaviour cloning, under one schedule, on the same pairs."""

import json
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from rich.console import Console

from qstar_jax.config import ControlConfig
from qstar_jax.config.control import Arm
from qstar_jax.console import say
from qstar_jax.control import learning
from qstar_jax.control.actor import Actor, Params, make_actor
from qstar_jax.control.held_out import held_out_metrics
from qstar_jax.control.learning import SegmentArrays
from qstar_jax.control.options import resolve
from qstar_jax.control.segments import Segments
from qstar_jax.control.tasks import Task, load_task
from qstar_jax.errors import InputError
from qstar_jax.interruption import Stopped
from qstar_jax.store.files import write_json
from qstar_jax.store.user_cache import keep_programs
from qstar_jax.training.diagnostics.verdict import collect, sentence
from qstar_jax.training.optimizers import make_optimizer
from qstar_jax.training.run_log import RunLog, read_metrics

BEST = 0.3  # share of the segments that `best_bc` clones
_HEADLINE = ("loss", "rewards/chosen", "rewards/rejected", "accuracies", "gain_error", "success")


@dataclass(frozen=True)
class Setting:
    """What all runs share.

    Attributes:
        config: Options without nulls.
        task: The task.
        actor: The policy.
        train: Training segments on the device.
        held_out: Held-out segments on the device.
        console: Where to show progress.
    """

    config: ControlConfig
    task: Task
    actor: Actor
    train: SegmentArrays
    held_out: SegmentArrays
    console: Console


def train_control(config: ControlConfig, console: Console | None = None) -> dict[str, dict[str, Any]]:
    """Trains every arm with every seed, and leaves a run folder of each.

    Args:
        config: The options.
        console: Where to show progress; the standard output by default.

    Returns:
        The summary of each run by the name of its folder, which is also written to summary.json.

    Raises:
        InputError: If the task, its file or the options cannot be used.
        Stopped: If a signal asked for it, where `StopSignals` listens.
    """
    console, config = console or Console(), resolve(config)
    keep_programs()
    task = load_task(config, console)
    sizes = task.train.observations.shape[-1], task.train.actions.shape[-1]
    train, held_out = map(_on_device, (task.train, task.held_out))
    setting = Setting(config, task, make_actor(config.actor, *sizes), train, held_out, console)
    summaries = {}
    for seed in config.seeds:
        cloned = cache(partial(_clone, setting, train, seed))
        for arm in config.arms:
            folder = Path(config.out).expanduser() / f"{arm}-{seed}"
            try:
                summary = _finished(setting, arm, seed, folder) or _run(setting, arm, seed, folder, cloned)
            except Stopped as stop:  # at once: a run is minutes long, and has no checkpoints
                raise Stopped(f"stopped; finished runs are kept, {folder.name} begins anew", stop.code) from None
            summaries[folder.name] = summary
    write_json(Path(config.out).expanduser() / "summary.json", summaries)
    return summaries


def _on_device(segments: Segments) -> SegmentArrays:
    arrays = (jnp.asarray(array, jnp.float32) for array in (segments.observations, segments.actions, segments.scores))
    return SegmentArrays(*arrays, ref_logp=jnp.zeros(segments.actions.shape[:2]))


def _options(setting: Setting, arm: Arm, seed: int) -> dict[str, Any]:
    """The configuration of one run alone."""
    return asdict(replace(setting.config, arms=[arm], seeds=[seed]))


def _finished(setting: Setting, arm: Arm, seed: int, folder: Path) -> dict[str, Any] | None:
    """Reads the summary of a run that is complete.

    Raises:
        InputError: If its options were others.
    """
    if not (folder / "summary.json").exists():
        return None
    stored = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    given = _options(setting, arm, seed)
    differ = [name for name in given if name != "out" and stored.get(name) != given[name]]
    if differ:
        raise InputError(
            f"{folder} has a run with other options ({differ[0]}: {stored.get(differ[0])}, now {given[differ[0]]}); "
            "name another --out, or give the same options to continue"
        )
    say(setting.console, f"{folder}: complete")
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def _clone(setting: Setting, segments: SegmentArrays, seed: int) -> Params:
    """Clones segments, from a random policy."""
    options, params = setting.config.train, setting.actor.init(jax.random.key(seed))
    say(setting.console, f"behaviour cloning: {options.bc_steps} steps on {len(segments.scores)} segments, seed {seed}")
    objective = learning.clone(setting.actor, segments, batch_size=options.batch_size)
    optimizer = make_optimizer(setting.config.optimizer, options.bc_steps)
    params, _, history = learning.minimizer(objective, optimizer, seed)(
        params, optimizer.init(params), 0, options.bc_steps
    )
    if not np.isfinite(history).all():
        raise FloatingPointError("behaviour cloning diverged; a lower --optimizer.learning_rate usually helps")
    return params


def _run(setting: Setting, arm: Arm, seed: int, folder: Path, cloned: Any) -> dict[str, Any]:
    """Trains and measures one arm."""
    folder.mkdir(parents=True, exist_ok=True)
    options = _options(setting, arm, seed)
    (folder / "config.yaml").write_text(yaml.safe_dump(options, sort_keys=False), encoding="utf-8")
    # Start: a random policy, or a clone of all segments or of the best.
    if arm == "without_bc":
        params = setting.actor.init(jax.random.key(seed))
    elif arm == "best_bc":
        scores = np.asarray(setting.train.scores)
        best = np.argsort(-scores)[: max(round(BEST * len(scores)), 1)]
        params = _clone(setting, jax.tree.map(lambda array: array[best], setting.train), seed)
    else:
        params = cloned()
    steps = 0 if arm == "best_bc" else setting.config.train.steps
    say(setting.console, f"{folder.name}: {steps} steps of preference learning")
    params, summary = _prefer(setting, params, steps, seed, folder, relative=arm == "with_bc_kl")
    # End: what the run leaves behind.
    _write_actor(folder / "actor.npz", setting, params)
    evidence = collect(
        summary, samples=len(setting.held_out.scores), length=setting.config.segments.length,
        beta=setting.config.loss.beta, kind="segments",
    )  # fmt: skip
    if steps:
        summary["verdict"] = sentence(evidence)
        say(setting.console, f"verdict: {summary['verdict']}")
    summary = {"steps": steps} | summary | _best_success(folder)
    write_json(folder / "summary.json", summary)
    return summary


def _prefer(
    setting: Setting, params: Params, steps: int, seed: int, folder: Path, *, relative: bool
) -> tuple[Params, dict[str, float]]:
    """Learns from preferences, and measures on the way; `relative` to the start (CPL-KL) or not (CPL)."""
    config, actor = setting.config, setting.actor
    options = {name: getattr(config.loss, name) for name in ("beta", "bias", "discount")}
    train, held_out = setting.train, setting.held_out
    if relative:
        log_prob = jax.jit(actor.log_prob)
        train, held_out = (
            replace(part, ref_logp=log_prob(params, part.observations, part.actions)) for part in (train, held_out)
        )
    batch_size = config.train.batch_size
    if config.loss.pairs == "all":
        objective = learning.prefer_all_pairs(actor, train, batch_size=batch_size, **options)
    else:
        pairs = jnp.asarray(setting.task.pairs)
        objective = learning.prefer_pairs(actor, train, pairs, batch_size=batch_size, **options)
    optimizer = make_optimizer(config.optimizer, max(steps, 1))
    advance, state = learning.minimizer(objective, optimizer, seed), optimizer.init(params)
    measure = held_out_metrics(actor, params, held_out, setting.task.held_out_pairs, **options)
    every = config.train.eval_every
    with RunLog(folder, steps=steps, start=0, console=setting.console, headline=_HEADLINE) as log:
        for step in [*range(0, steps, every), steps]:
            measured = measure(params)
            if setting.task.measure and (step % config.train.success_every == 0 or step == steps):
                measured |= setting.task.measure(actor, params, config.train.episodes)
            log.write(step, measured)
            if step == steps:
                break
            params, state, history = advance(params, state, step, min(every, steps - step))
            if not np.isfinite(history).all():
                raise FloatingPointError(
                    f"the loss is not finite at step {step + int(np.argmin(np.isfinite(history)))}; a lower "
                    "--optimizer.learning_rate usually helps"
                )
            log.write(step + len(history), {"loss": float(history.mean())})
            log.advance(step + len(history))
    return params, measured


def _best_success(folder: Path) -> dict[str, float]:
    """The evaluation with the most successes, the first of equals."""
    steps, values = read_metrics(folder).get("eval_success", ([], []))
    if not steps:
        return {}
    at = int(np.argmax(values))
    return {"best_success": values[at], "best_step": steps[at]}


def _write_actor(file: Path, setting: Setting, params: Params):
    """Writes parameters by their paths, and the statistics that normalize observations."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    arrays = {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}
    np.savez(file, **arrays, shift=setting.task.shift, scale=setting.task.scale)
