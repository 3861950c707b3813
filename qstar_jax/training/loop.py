"""The training loop: steps, and between them logging, evaluation and checkpoints.

It knows nothing of what is minimized: batches come from a source, and everything else is passed in as a function.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import optax

from qstar_jax.config import TrainOptions
from qstar_jax.models.causal_lm import Params
from qstar_jax.training.best import BestEvaluation
from qstar_jax.training.metrics import COUNT, mean_metrics
from qstar_jax.training.optimizers import count_steps
from qstar_jax.training.run_log import RunLog
from qstar_jax.training.source import Source
from qstar_jax.training.step import TrainState, TrainStep, first_nonfinite


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
        save: `(state, step)` writes a checkpoint.
        find_cause: `(state, batch, locate)` says what was not finite in a step; `locate` names examples of the batch.
        respond: `(params, step)` shows what the policy says, at every evaluation.
        best: Which evaluation was the best, if its checkpoint is to be kept.
        log: Where metrics go; None on all but the first process.
    """

    options: TrainOptions
    steps: int
    train_step: TrainStep
    source: Source
    evaluators: Sequence[Callable[[Params, Params | None], dict[str, float]]] = ()
    schedule: optax.Schedule | None = None
    throughput: Callable[[dict[str, float], float], dict[str, float]] | None = None
    check_first: Callable[[dict[str, float]], None] | None = None
    save: Callable[[TrainState, int], None] | None = None
    find_cause: Callable[[TrainState, Any, Callable[[Sequence[int]], str]], str] | None = None
    respond: Callable[[Params, int], None] | None = None
    best: BestEvaluation | None = None
    log: RunLog | None = None

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
        """
        before = self._evaluate(state, 0) if start == 0 else {}
        summary = {f"before_{name}": value for name, value in before.items()}
        window, clock = [], time.perf_counter()
        for step in range(start, self.steps):
            # Take a step. The devices run behind: nothing here waits for them.
            batch = self.source.at_step(step, state) if batch is None else batch
            state, metrics = self.train_step(state, batch)
            batch = None
            window.append(metrics)
            done, last = step + 1, step + 1 == self.steps
            saves = last or self._is_due(done, self.options.save_every)
            evaluates = last or self._is_due(done, self.options.eval_every)
            if step == start or saves or evaluates or self._is_due(step, self.options.log_every):
                # Log the means since the last line. They wait for the devices, so the clock is read after them.
                means = mean_metrics(window)
                self._stop_if_not_finite(state, step - len(window) + 1, means)
                # The first step of a process compiles, so its time says nothing about speed.
                seconds = None if step == start else (time.perf_counter() - clock) / len(window)
                summary |= self._report(step, means, seconds)
                # Evaluate and save what the step has led to.
                if evaluates:
                    metrics = self._evaluate(state, done)
                    summary |= metrics
                    saves |= self.best is not None and self.best.add(done, metrics)
                    last |= self.best is not None and self.best.is_exhausted
                if (saves or last) and self.save:
                    self.save(state, done)
                window, clock = [], time.perf_counter()
            if self.log:
                self.log.advance(done)
            if last:
                summary["steps"] = done
                break
        return state, summary

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
                self.save(state, step)
            kept = f"the state before it is kept as checkpoint {step}, from which another run can begin (--model)"
        raise FloatingPointError(
            f"step {step} of {self.source.name}: loss {means['loss']}, grad_norm {means['grad_norm']}{cause}; {kept}. "
            "Look at its data; a lower optimizer.learning_rate, more optimizer.warmup_steps or compute.dtype float32 "
            "usually help"
        )

    def _evaluate(self, state: TrainState, step: int) -> dict[str, float]:
        means = {}
        for evaluate in self.evaluators:
            means |= evaluate(state.policy, state.ref_params)
        if self.log and means:
            self.log.write(step, means)
        if self.respond:
            self.respond(state.policy, step)
        return means
