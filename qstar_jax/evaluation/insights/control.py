"""Control: the third insight beyond language, on policies over continuous actions (Fig. 3, right).

CPL's policies are advantage functions, alpha log pi(a | s) = A*(s, a), so what a policy was fitted to loses
KL(pi_0 || pi) in log-probability, whatever preferences teach it.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import yaml

from qstar_jax.errors import InputError
from qstar_jax.evaluation.insights.decline import DeclineRun, decline_run, describe, falls_where_fitted_only
from qstar_jax.evaluation.insights.record import Finding, Record
from qstar_jax.evaluation.intervals import Interval
from qstar_jax.training.run_log import read_metrics

# Arm -> its name in figures
ARMS = {
    "with_bc": "with cloning",
    "without_bc": "without cloning",
    "with_bc_kl": "CPL-KL",
    "best_bc": "best 30 %, no CPL",
}
RUNAWAY = 100.0  # relative cost of a policy with which states grow without bound; how far is of no interest
# Measure of the environment -> its metric
_MEASURES = {"success": "eval_success", "excess cost": "eval_excess_cost", "gain error": "eval_gain_error"}


@dataclass(frozen=True)
class Outcome:
    """How a policy did in the environment during a run.

    Attributes:
        steps: Steps of preference learning; the first is the policy before it.
        values: What was measured there; exact measures have no interval: all three numbers are the same.
    """

    steps: tuple[int, ...]
    values: tuple[Interval, ...]


@dataclass(frozen=True)
class ControlRun:
    """One arm with one seed.

    Attributes:
        arm: See `ControlConfig`.
        seed: Seed of the policy and of the batches.
        rewards: Rewards of held-out segments: beta log pi / pi_0, with pi_0 the policy before preference learning.
        logps: chosen and rejected -> mean sum of log pi over a segment, before preference learning and at the end.
        accuracy: Share of held-out pairs that the loss ranks right at the end.
        outcomes: Measure of the environment -> how the policy did.
    """

    arm: str
    seed: int
    rewards: DeclineRun
    logps: dict[str, tuple[float, float]]
    accuracy: float
    outcomes: dict[str, Outcome]


@dataclass(frozen=True)
class Control(Record):
    """control.json: all arms and seeds of a task.

    Attributes:
        task: Name of the task, or its file.
        runs: The runs.
    """

    NAME: ClassVar[str] = "control"
    COMMAND: ClassVar[str] = "qstar control"

    task: str
    runs: tuple[ControlRun, ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        """All seeds, in order."""
        return tuple(sorted({run.seed for run in self.runs}))

    def find(self, arm: str, seed: int) -> ControlRun | None:
        """Finds the run of an arm with a seed."""
        return next((run for run in self.runs if (run.arm, run.seed) == (arm, seed)), None)

    def finding(self) -> Finding:
        """Reproduced where, at every seed, chosen log-probabilities fall after cloning and not without it."""
        pairs = [(self.find("with_bc", seed), self.find("without_bc", seed)) for seed in self.seeds]
        seen = [None if None in pair else falls_where_fitted_only(*(run.rewards for run in pair)) for pair in pairs]
        return Finding(
            insight="control",
            title="Falling rewards in control",
            claim="CPL makes actions of chosen segments less likely where the policy was fitted to the data, as "
            "-beta KL(pi_0 || pi) must (Eq. 16), and not where it was not.",
            paper="On Meta-World's bin picking, log-probabilities of both segments fall in CPL after cloning, and rise "
            "without it (Fig. 3, right).",
            measured=" ".join(self._measured()),
            reproduced=False if False in seen else None if None in seen else True,
            command=f"{self.COMMAND} --task {self.task}",
        )

    def _measured(self) -> list[str]:
        """The arms of the claim at every seed, then what each arm's policy does at the end, at the first seed."""
        shown = [describe(run.rewards) for run in self.runs if run.arm in ("with_bc", "without_bc")]
        for measure in _MEASURES:
            ends = [
                f"{ARMS[run.arm]} {in_short(run.outcomes[measure].values[-1].mean)}"
                for run in self.runs
                if run.seed == self.seeds[0] and measure in run.outcomes
            ]
            if ends:
                shown.append(f"{measure.capitalize()} at the end, seed {self.seeds[0]}: {', '.join(ends)}.")
        return shown


def in_short(value: float) -> str:
    """Writes a measure of the environment in two digits."""
    return f"{value:.2g}" if value < RUNAWAY else f"over {RUNAWAY:g}"


def measure_control(out: Path) -> Control:
    """Reads the runs that `qstar control` left in a folder, and writes control.json there.

    Raises:
        InputError: If it is no such folder.
    """
    path = out / "summary.json"
    if not path.is_file():
        raise InputError(f"{out}: no summary.json; expected the folder of `{Control.COMMAND}`")
    folders = [out / name for name in json.loads(path.read_text(encoding="utf-8"))]
    options = [yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")) for folder in folders]
    runs = (_read(*run) for run in zip(folders, options, strict=True))
    control = Control(options[0]["task"], tuple(runs))
    control.write(out)
    return control


def _read(folder: Path, options: dict) -> ControlRun:
    (arm,), (seed,), metrics = options["arms"], options["seeds"], read_metrics(folder)
    ends = {name: metrics[f"eval_logps/{name}"][1] for name in ("chosen", "rejected")}
    return ControlRun(
        arm=arm,
        seed=seed,
        rewards=decline_run(f"{ARMS[arm]}, seed {seed}", folder),
        logps={name: (values[0], values[-1]) for name, values in ends.items()},
        accuracy=metrics["eval_accuracies"][1][-1],
        outcomes={name: _outcome(metrics, metric) for name, metric in _MEASURES.items() if metric in metrics},
    )


def _outcome(metrics: dict[str, tuple[list[int], list[float]]], metric: str) -> Outcome:
    steps, means = metrics[metric]
    low, high = (metrics.get(f"{metric}_{end}", (steps, means))[1] for end in ("low", "high"))
    return Outcome(tuple(steps), tuple(Interval(*ends) for ends in zip(means, low, high, strict=True)))
