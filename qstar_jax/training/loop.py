"""The training loop: steps, and between them logging, evaluation and checkpoints.

It knows nothing of what is minimized: batches come from a source, and everything else is passed in as a function.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental.multihost_utils import broadcast_one_to_all

from qstar_jax.config import TrainOptions
from qstar_jax.interruption import StopSignals
from qstar_jax.models.causal_lm import Params
from qstar_jax.training.best import BestEvaluation
from qstar_jax.training.metrics import COUNT, Metrics, mean_metrics
from qstar_jax.training.optimizers import count_steps
from qstar_jax.training.profile import StepProfile
from qstar_jax.training.run_log import RunLog
from qstar_jax.training.source import Source
from qstar_jax.training.step import TrainState, TrainStep, first_nonfinite
from qstar_jax.training.wall_time import WallTime


@dataclass(frozen=True)
class Loop:
    """The training loop. Only the first four attributes are needed.

    Attributes:
        options: Intervals of logging, evaluation and checkpoints.
        steps: Optimizer steps of the whole run.
        train_step: `(state, batch) -> (state, metrics)`, jitted (see `step.make_train_step`).
        source: Where batches come from.
        evaluators: Each is `(params, ref_params) -> metrics`, called at every evaluation.
        schedule: Learning rate at a step, for the log.
        throughput: `(mean counts per step, seconds per step) -> metrics`.
        check_first: Raises if metrics of step 0 cannot be right.
        save: `(state, step, window)` writes a checkpoint; the window has the metrics of steps that are not logged yet.
        find_cause: `(state, batch, locate)` says what was not finite in a step; `locate` names examples of the batch.
        respond: `(params, step)` shows what the policy says, at every evaluation.
        best: Which evaluation was the best, if its checkpoint is to be kept.
        log: Where metrics go; None on all but the first process.
        profile: Traces some of the steps.
        window: Metrics of steps before the first one that are not logged yet.
        stop: Says when to stop before the end.
        wall_time: Where the wall time goes.
    """

    options: TrainOptions
    steps: int
    train_step: TrainStep
    source: Source
    evaluators: Sequence[Callable[[Params, Params | None], dict[str, float]]] = ()
    schedule: optax.Schedule | None = None
    throughput: Callable[[dict[str, float], float], dict[str, float]] | None = None
    check_first: Callable[[dict[str, float]], None] | None = None
    save: Callable[[TrainState, int, Sequence[Metrics]], None] | None = None
    find_cause: Callable[[TrainState, Any, Callable[[Sequence[int]], str]], str] | None = None
    respond: Callable[[Params, int], None] | None = None
    best: BestEvaluation | None = None
    log: RunLog | None = None
    profile: StepProfile | None = None
    window: Sequence[Metrics] = ()
    stop: StopSignals | None = None
    wall_time: WallTime = field(default_factory=WallTime)

    def run(self, state: TrainState, start: int = 0, batch: Any = None) -> tuple[TrainState, dict[str, float]]:
        """Trains from step `start` to the end.

        Args:
            state: State after `start` steps; it is consumed.
            start: Steps done already.
            batch: The batch of step `start`, if it was made already.

        Returns:
            The last state, and a summary: the last training metrics, and the evaluations before step 0
            (`before_eval_...`) and at the end (`eval_...`).

        Raises:
            RuntimeError: If `check_first` refuses the metrics of step 0.
            FloatingPointError: If a loss or a gradient is not finite; the state before that step is saved.
            Stopped: If `stop` says so; the state is saved.
        """
        if self.stop:
            self.stop.defer()
        with self.wall_time, self.profile or nullcontext():
            state, summary = self._run(state, start, batch)
        return state, summary | self.wall_time.shares()

    def _run(self, state: TrainState, start: int, batch: Any) -> tuple[TrainState, dict[str, float]]:
        summary, evaluation, exhausted = self._begin(state, start)
        window, timed, clock, done = list(self.window), 0, time.perf_counter(), start
        for step in range(start, start if exhausted else self.steps):
            # Take a step. The devices run behind: nothing here waits for them.
            if self.profile:
                self.profile.before(step, state)
            batch = self._batch(step, state) if batch is None else batch
            state, metrics = self.train_step(state, batch)
            batch, timed = None, timed + 1
            window.append(metrics)
            done, last = step + 1, step + 1 == self.steps
            if self.profile:
                self.profile.after(done, state)
            if step == start:  # the first step of a process compiles, so its time says nothing about speed
                jax.block_until_ready(metrics)
                timed, clock = 0, time.perf_counter()
            saves = last or self._is_due(done, self.options.save_every)
            evaluates = last or self._is_due(done, self.options.eval_every)
            if step == 0 or saves or evaluates or self._is_due(step, self.options.log_every):
                # Log the means since the last line. They wait for the devices, so the clock is read after them.
                means = mean_metrics(window)
                self._stop_if_not_finite(state, step - len(window) + 1, means)
                seconds = (time.perf_counter() - clock) / timed if timed else None
                summary |= self._report(step, means, seconds)
                window, timed, clock = [], 0, time.perf_counter()
            if self.stop and self.stop.requested():
                self._stop(state, done, window)  # an evaluation that is due is made by the process that goes on
            if evaluates or saves:
                # Evaluate and save what the step has led to.
                if evaluates:
                    evaluation = self._evaluate(state, done)
                    saves |= self.best is not None and self.best.step == done
                    last |= self.best is not None and self.best.is_exhausted
                if saves or last:
                    self._save(state, done)
                timed, clock = 0, time.perf_counter()
            if self.log:
                self.log.advance(done)
            if last:
                break
        return state, summary | evaluation | {"steps": done}

    def _begin(self, state: TrainState, start: int) -> tuple[dict[str, float], dict[str, float], bool]:
        """Makes the evaluation that is due before the first step.

        Returns:
            The summary so far, the newest evaluation, and whether there is no point in going on.
        """
        if start == 0:
            return {f"before_{name}": value for name, value in self._evaluate(state, 0).items()}, {}, False
        summary = self.log.summary if self.log else {}
        evaluation = (self.log.evaluation(start) if self.log else None) or {}
        if (start == self.steps or self._is_due(start, self.options.eval_every)) and not self._has_evaluation(start):
            evaluation = self._evaluate(state, start)
        return summary, evaluation, self.best is not None and self.best.is_exhausted

    def _has_evaluation(self, step: int) -> bool:
        """Whether the log has the evaluation after a step: not if a process was stopped between the two."""
        logged = self.log is not None and self.log.evaluation(step) is not None
        return bool(broadcast_one_to_all(np.bool_(logged))) if jax.process_count() > 1 else logged

    def _stop(self, state: TrainState, done: int, window: Sequence[Metrics]):
        """Saves and raises; where the state is not finite, that is the error."""
        if window:
            self._stop_if_not_finite(state, done - len(window), mean_metrics(window))
        self._save(state, done, window)
        raise self.stop.stopped(f"stopped after step {done} of {self.steps}, which is saved")

    def _batch(self, step: int, state: TrainState) -> Any:
        with self.wall_time.part("data"):
            return self.source.at_step(step, state)

    def _save(self, state: TrainState, done: int, window: Sequence[Metrics] = ()):
        if self.save:
            with self.wall_time.part("saving"):
                self.save(state, done, window)

    def _is_due(self, step: int, interval: float) -> bool:
        every = count_steps(interval, self.steps)
        return every > 0 and step % every == 0

    def _report(self, step: int, means: dict[str, float], seconds: float | None) -> dict[str, float]:
        """Adds what follows from the step and its time, in seconds, and writes the line."""
        counts = {name: means.pop(name) for name in list(means) if name.startswith(COUNT)}
        if step == 0 and self.check_first:
            self.check_first(means)
        if self.schedule:
            means["learning_rate"] = float(self.schedule(step))
        epochs = self.source.epochs(step + 1)
        if epochs is not None:
            means["epoch"] = epochs
        if seconds is not None:
            means["perf/seconds_per_step"] = seconds
            means |= self.throughput(counts, seconds) if self.throughput else {}
        means |= self.wall_time.shares()
        if self.log:
            self.log.write(step, means)
        return means

    def _stop_if_not_finite(self, state: TrainState, since: int, means: dict[str, float]):
        """Stops a run whose loss or gradient was not finite in one of the steps from `since` on."""
        if bool(state.finite):
            return
        step = int(state.step)  # the first such step: the state has not changed since
        cause = ""
        if self.find_cause:
            batch = self.source.at_step(step, state)
            cause = f": {self.find_cause(state, batch, partial(self.source.locate, step))}"
        kept = "earlier checkpoints are untouched"
        if self.save and step > 0 and first_nonfinite(state.params) is None:
            if step > since or not self._is_due(step, self.options.save_every):
                self._save(state, step)
            kept = f"the state before it is kept as checkpoint {step}, from which another run can begin (--model)"
        raise FloatingPointError(
            f"step {step} of {self.source.name}: loss {means['loss']}, grad_norm {means['grad_norm']}{cause}; {kept}. "
            "Look at its data; a lower optimizer.learning_rate, more optimizer.warmup_steps or compute.dtype float32 "
            "usually help"
        )

    def _evaluate(self, state: TrainState, step: int) -> dict[str, float]:
        means = {}
        with self.wall_time.part("evaluation"):
            for evaluate in self.evaluators:
                means |= evaluate(state.policy, state.ref_params)
            if self.best and step > 0:
                self.best.add(step, means)  # first: what the log has, is not repeated
            if self.log and means:
                self.log.write(step, means)
            if self.respond:
                self.respond(state.policy, step)
        return means
