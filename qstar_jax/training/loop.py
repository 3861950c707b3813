"""The loop around the step: when to log, evaluate and save, and what must hold while it goes."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import jax
import optax

from qstar_jax.config import TrainOptions
from qstar_jax.data.batches import Batch
from qstar_jax.data.feeder import Feeder
from qstar_jax.training.diagnostics.nonfinite import first_nonfinite
from qstar_jax.training.evaluator import Evaluate
from qstar_jax.training.metrics import Metrics, mean_metrics
from qstar_jax.training.run_log import RunLog
from qstar_jax.training.step import TrainState

START_TOLERANCE = (
    1e-3  # of the first loss, relative if it is above 1: two compilations of one forward pass stay below it
)


@dataclass(frozen=True)
class Loop:
    """A run that is ready to go.

    Attributes:
        options: Rhythm of the run.
        steps: Its length.
        train_step: `(state, batch) -> (state, metrics)`, jitted.
        feeder: Training batches.
        evaluator: `(params, ref_params) -> metrics` of held-out rows and of the reference's samples, or None.
        schedule: Learning rate at a step.
        step_flops: Mean counts of tokens a step -> model FLOPs of a step.
        peak_flops: FLOP/s of the hardware, or None where it is not known.
        first_loss: What the loss at step 0 must be, since policy and reference are the same; None: anything.
        save: `(state, step)` writes a checkpoint.
        find_cause: `(state, micro-batches, rows of each)` says what in a step was not finite.
        log: Where metrics go; None on all but the first process.
    """

    options: TrainOptions
    steps: int
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    feeder: Feeder
    evaluator: Evaluate | None
    schedule: optax.Schedule
    step_flops: Callable[[dict[str, float]], float]
    peak_flops: float | None
    first_loss: float | None
    save: Callable[[TrainState, int], None]
    find_cause: Callable[[TrainState, list[Batch], list[list[int]]], str]
    log: RunLog | None

    def run(self, state: TrainState, start: int) -> dict[str, float]:
        """Trains from step `start` to the end.

        Args:
            state: State after `start` steps; it is consumed.
            start: Steps that are done already.

        Returns:
            The last training metrics; evaluation before step 0 (`before_eval_...`) and at the end (`eval_...`).

        Raises:
            RuntimeError: If the loss at step 0 is not `first_loss`.
            FloatingPointError: If a loss or a gradient is not finite; the state before that step is saved.
        """
        before = self._evaluate(state, 0) if start == 0 else {}
        summary = {f"before_{name}": value for name, value in before.items()}
        window, clock = [], time.perf_counter()
        for step in range(start, self.steps):
            batch = self.feeder.at_step(self.options.seed, step)
            state, metrics = self.train_step(state, batch)
            window.append(metrics)
            done = step + 1
            last = done == self.steps
            saves, evaluates = last or _due(done, self.options.save_every), last or _due(done, self.options.eval_every)
            if step == start or saves or evaluates or _due(step, self.options.log_every):
                means = mean_metrics(window)  # waits for the devices, so the clock is read after it
                self._guard(state, step - len(window) + 1, means)
                # The first step of a process compiles, so its time says nothing about speed.
                seconds = None if step == start else time.perf_counter() - clock
                summary |= self._report(step, means, len(window), seconds)
                if evaluates:
                    summary |= self._evaluate(state, done)
                if saves:
                    self.save(state, done)
                window, clock = [], time.perf_counter()
            if self.log:
                self.log.advance(done)
        return summary

    def _report(self, step: int, means: dict[str, float], steps: int, seconds: float | None) -> dict[str, float]:
        counts = {name: means.pop(name) for name in list(means) if name.startswith("count/")}
        if step == 0 and self.first_loss is not None:
            check_first_loss(means, self.first_loss)
        means["learning_rate"] = float(self.schedule(step))
        means["epoch"] = (step + 1) * self.feeder.batch_size / len(self.feeder.dataset.examples)
        if seconds is not None:
            means["perf/padding"] = 1 - counts["count/tokens"] / counts["count/slots"]
            means["perf/tokens_per_second"] = counts["count/tokens"] * steps / seconds
            means["perf/seconds_per_step"] = seconds / steps
            if self.peak_flops:
                means["perf/mfu"] = self.step_flops(counts) * steps / seconds / self.peak_flops
        if self.log:
            self.log.write(step, means)
        return means

    def _guard(self, state: TrainState, since: int, means: dict[str, float]):
        """Stops a run whose loss or gradient was not finite in one of the steps from `since` on."""
        if bool(state.finite):
            return
        step = int(state.step)  # it stands still since then
        batch = self.feeder.at_step(self.options.seed, step)
        parts = self.feeder.accumulate
        batches = [batch] if parts == 1 else [jax.tree.map(lambda x: x[i], batch) for i in range(parts)]  # noqa: B023
        examples = self.feeder.dataset.examples
        rows = [[examples[i].row for i in part] for part in self.feeder.indices_at_step(self.options.seed, step)]
        cause = self.find_cause(state, batches, rows)
        kept = "checkpoints that were written before are untouched"
        if step > 0 and first_nonfinite(state.params) is None:
            if step > since or not _due(step, self.options.save_every):
                self.save(state, step)
            kept = f"the state before it is kept as checkpoint {step}, from which another run can begin (--model)"
        raise FloatingPointError(
            f"step {step} of {self.feeder.dataset.source}: loss {means['loss']}, grad_norm {means['grad_norm']}: "
            f"{cause}; {kept}. Look at the rows; a lower optimizer.learning_rate, more optimizer.warmup_steps or "
            "compute.dtype float32 usually help"
        )

    def _evaluate(self, state: TrainState, step: int) -> dict[str, float]:
        if self.evaluator is None:
            return {}
        means = self.evaluator(state.policy, state.ref_params)
        if self.log:
            self.log.write(step, means)
        return means


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def check_first_loss(metrics: dict[str, float], expected: float):
    """Refuses a run whose first loss is not that of a policy which equals its reference (of DPO, ln 2).

    Args:
        metrics: Metrics of step 0.
        expected: That loss.

    Raises:
        RuntimeError: If the loss is further than `START_TOLERANCE` from it.
    """
    if abs(metrics["loss"] - expected) > START_TOLERANCE * max(expected, 1.0):
        raise RuntimeError(
            f"the loss at step 0 is {metrics['loss']:.6f}; expected {expected:.6f}, because the policy "
            f"starts as its own reference and every reward is then 0 "
            f"(found: rewards/chosen {metrics['rewards/chosen']:.6f}, "
            f"rewards/rejected {metrics['rewards/rejected']:.6f}). Policy and reference differ in their parameters, "
            "in their number type or in randomness such as dropout"
        )
