"""The log of a run: metrics.jsonl, TensorBoard, and a progress bar or plain lines."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from rich.console import Console

from qstar_jax.console import Bar, say
from qstar_jax.errors import InputError
from qstar_jax.store.files import write_atomically
from qstar_jax.training.trackers import Trackers
from qstar_jax.untrusted import check_types


class RunLog:
    """Writes metrics; a context manager. Only the first process of a run may hold one.

    Args:
        folder: Folder of the run.
        steps: Steps of the run, for the bar.
        start: Step at which the run begins or resumes; later lines of an interrupted run are dropped.
        console: Where to show progress.
        headline: Metrics that the terminal shows.
        watch: Called after every line of metrics.
        trackers: Where each line is sent, too.
    """

    def __init__(
        self,
        folder: Path,
        *,
        steps: int,
        start: int,
        console: Console,
        headline: tuple[str, ...] = ("loss",),
        watch: Callable[[], None] | None = None,
        trackers: Trackers | None = None,
    ):
        from tensorboardX import SummaryWriter

        self.console, self._headline, self._watch = console, headline, watch
        self._trackers = trackers
        path = folder / "metrics.jsonl"
        kept = _lines_before(path, start) if path.exists() else []
        write_atomically(path, "".join(f"{json.dumps(metrics)}\n" for metrics in kept).encode())
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start, flush_secs=10)
        self._kept = kept
        for metrics in self._kept:
            if metrics["step"] == start:  # TensorBoard drops all of that step
                self._to_board(start, metrics)
        self._steps, self._bar = steps, Bar(console, "training", steps, start)

    def __enter__(self) -> "RunLog":
        """Starts the bar."""
        self._bar.__enter__()
        return self

    def __exit__(self, *_):
        """Ends the bar and closes the files."""
        self._bar.__exit__()
        self._board.close()
        self._file.close()

    @property
    def summary(self) -> dict[str, float]:
        """What a run that resumes had to say of its steps, and of what it was before them: see `Loop.run`."""
        summary = {}
        for metrics in self._kept:
            if "loss" in metrics:
                summary |= metrics
            elif metrics["step"] == 0:
                summary |= {f"before_{name}": value for name, value in metrics.items() if name != "step"}
        summary.pop("step", None)
        return summary

    def evaluation(self, step: int) -> dict[str, float] | None:
        """The evaluation after a step, if the lines that were kept have it."""
        for metrics in self._kept:
            if metrics["step"] == step and "loss" not in metrics:
                return {name: value for name, value in metrics.items() if name != "step"}
        return None

    def advance(self, done: int):
        """Moves the bar."""
        self._bar.update(done)

    def track(self, items: Iterable, description: str, total: int) -> Iterator:
        """Yields items under a bar of their own; without a terminal, a line says that they begin."""
        if self.console.is_terminal:
            yield from self._bar.track(items, description, total)
        else:
            say(self.console, f"{description}: {total} batches")
            yield from items

    def write(self, step: int, metrics: dict[str, float]):
        """Writes one line of metrics."""
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        self._to_board(step, metrics)
        if self._trackers:
            self._trackers.log(step, metrics)
        prefix = "eval_" if any(name.startswith("eval_") for name in metrics) else ""
        shown = [(name, metrics[prefix + name]) for name in self._headline if prefix + name in metrics]
        text = "  ".join(f"{prefix}{name} {value:.4g}" for name, value in shown)
        say(self.console, f"step {step}/{self._steps}  {text}")
        if self._watch:
            self._watch()

    def _to_board(self, step: int, metrics: dict[str, float]):
        for name, value in metrics.items():
            if name != "step":
                self._board.add_scalar(name, value, step)


def _lines_before(path: Path, start: int) -> list[dict[str, float]]:
    """Metrics that a run which begins or resumes at a step will not write again."""
    # A checkpoint at step s is written after the evaluation at s and before the training line of s. There is none at
    # step 0, where a run starts over with its evaluation.
    return [
        metrics
        for metrics in _whole_lines(path)
        if metrics["step"] < start or (metrics["step"] == start > 0 and "loss" not in metrics)
    ]


def _whole_lines(path: Path) -> Iterator[dict[str, float]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            metrics = json.loads(line)
        except json.JSONDecodeError:
            continue  # half a line, from a process that was killed while writing
        try:
            check_types({"the line": metrics}, {"the line": dict})
            check_types(metrics, {"step": int, **dict.fromkeys(metrics.keys() - {"step"}, float)})
        except ValueError as error:
            raise InputError(f"{path} line {number}: not metrics of a step ({error}); restore or remove it") from error
        yield metrics


def read_metrics(run: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Reads the metrics of a run: name -> (steps, values).

    Raises:
        InputError: If a line holds something else than a step and numbers.
    """
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for metrics in _whole_lines(run / "metrics.jsonl"):
        for name, value in metrics.items():
            if name != "step":
                steps, values = curves.setdefault(name, ([], []))
                steps.append(metrics["step"])
                values.append(value)
    return curves
