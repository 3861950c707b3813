"""The best evaluation of a run: which checkpoint is kept for it, and when there is no point in going on."""

from pathlib import Path

from qstar_jax.store.checkpoints import BEST, read_best
from qstar_jax.store.files import write_json


class BestEvaluation:
    """The evaluations of one metric of held-out rows, in the run's `best.json`.

    Args:
        run: Folder of the run.
        metric: Name of the metric, without `eval_`; a smaller loss is better, and more of anything else.
        patience: Evaluations in a row without an improvement after which to stop; 0: never.
        start: Step at which the run begins or resumes; evaluations after it are dropped, as they will be repeated.
        writes: Whether this process writes the file.
    """

    def __init__(self, run: Path, metric: str, *, patience: int = 0, start: int = 0, writes: bool = True):
        self._run, self._metric, self._patience, self._writes = run, f"eval_{metric}", patience, writes
        before = read_best(run) or {"evaluations": []}
        self._evaluations = [(step, value) for step, value in before["evaluations"] if step <= start]

    def add(self, step: int, metrics: dict[str, float]):
        """Records the evaluation after a step."""
        self._evaluations = [pair for pair in self._evaluations if pair[0] < step] + [(step, metrics[self._metric])]
        best = min(self._evaluations, key=self._badness)  # of equal ones the first
        if self._writes:
            content = {"metric": self._metric, "step": best[0], "value": best[1], "evaluations": self._evaluations}
            write_json(self._run / BEST, content)

    @property
    def step(self) -> int | None:
        """Step of the best evaluation so far."""
        return min(self._evaluations, key=self._badness)[0] if self._evaluations else None

    @property
    def is_exhausted(self) -> bool:
        """Whether the last `patience` evaluations were no improvement."""
        if not self._patience or not self._evaluations:
            return False
        best = min(self._evaluations, key=self._badness)
        return len(self._evaluations) - 1 - self._evaluations.index(best) >= self._patience

    def _badness(self, evaluation: tuple[int, float]) -> float:
        return evaluation[1] if self._metric == "eval_loss" else -evaluation[1]
