"""Insight 3, decline: how implicit rewards moved in a run, from the metrics that it logged."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import yaml

from qstar_jax import losses
from qstar_jax.config import DeclineConfig
from qstar_jax.errors import InputError
from qstar_jax.evaluation.insights.record import Finding, Record
from qstar_jax.training.run_log import read_metrics

# Curve -> its metric, which begins with eval_ where the run was evaluated on held-out pairs.
_CURVES = {"chosen": "rewards/chosen", "rejected": "rewards/rejected", "margin": "rewards/margins"}
_REFERENCE = "eval_rewards/reference_expected"  # -beta KL(reference || policy) on the reference's own samples


@dataclass(frozen=True)
class DeclineRun:
    """How implicit rewards moved in one run.

    Attributes:
        name: Its name in figures.
        folder: Its folder.
        beta: Temperature of its rewards: reward per nat.
        held_out: Whether the rewards are those of held-out pairs, or else of training pairs.
        steps: Steps of the curves.
        curves: Curve (chosen, rejected, margin, reference) -> mean implicit reward at these steps, None where nothing
            was measured.
        stderr: Curve -> standard errors, where the run logged them.
        verdict: The run's own verdict; empty if it gave none.
        kind: What is chosen and rejected: responses, or segments of behaviour.
    """

    name: str
    folder: str
    beta: float
    held_out: bool
    steps: list[int]
    curves: dict[str, list[float | None]]
    stderr: dict[str, list[float]] = field(default_factory=dict)
    verdict: str = ""
    kind: str = "responses"

    def last(self, curve: str) -> tuple[float, float | None]:
        """Last value of a curve, and two standard errors of it; None where the run logged none."""
        errors = self.stderr.get(curve)
        return self.curves[curve][-1], 2 * errors[-1] if errors else None


@dataclass(frozen=True)
class Decline(Record):
    """decline.json: the runs "with SFT" and "without SFT", or one of them."""

    NAME: ClassVar[str] = "decline"
    COMMAND: ClassVar[str] = "qstar decline"

    runs: tuple[DeclineRun, ...]

    def finding(self) -> Finding:
        """Reproduced where chosen rewards fall with SFT and not without it."""
        runs = {run.name: run for run in self.runs}
        both = [runs.get("with SFT"), runs.get("without SFT")]
        return Finding(
            insight="decline",
            title="Falling rewards",
            claim="Implicit rewards of chosen responses fall in training where the reference was fitted to them, as "
            "-beta KL(reference || policy) of the reference's own responses must (Eq. 16), and not where it was not.",
            paper="With SFT on the chosen responses both rewards decline while the margin grows; without it chosen "
            "rewards stay above 0 (Fig. 3).",
            measured=" ".join(map(describe, self.runs)),
            reproduced=None if None in both else falls_where_fitted_only(*both),
            command=self.COMMAND,
        )


def falls_where_fitted_only(fitted: DeclineRun, other: DeclineRun) -> bool | None:
    """Decides whether chosen rewards fall in one run and not in the other, or clearly less and not beyond noise.

    Args:
        fitted: A run that began from a policy fitted to its data.
        other: A run that did not.

    Returns:
        None where noise hides it.
    """
    ends = [run.last("chosen") for run in (fitted, other)]
    (end, error), (other_end, other_error) = [(value, float("inf") if e is None else e) for value, e in ends]
    if end > error or other_end < -other_error:
        return False
    return True if end < -error and other_end - end > (error**2 + other_error**2) ** 0.5 else None


def describe(run: DeclineRun) -> str:
    """Names the ends of a run's curves, with two standard errors."""

    def last(curve: str) -> str:
        value, error = run.last(curve)
        return f"{value:+.3f}" + ("" if error is None else f" +- {error:.3f}")

    expected = "the reference's own responses at" if run.kind == "responses" else "cloned data would be at"
    reference = f", {expected} {last('reference')}" if "reference" in run.curves else ""
    return (
        f"{run.name[0].upper()}{run.name[1:]}, after {run.steps[-1]} steps: chosen {last('chosen')}, rejected "
        f"{last('rejected')}, margin {last('margin')}{reference}."
    )


def measure_decline(config: DeclineConfig) -> Decline:
    """Reads how rewards moved in one run or two, and writes decline.json.

    Raises:
        InputError: If no run is named, or one cannot be used.
    """
    folders = {"with SFT": config.with_sft, "without SFT": config.without_sft}
    runs = [decline_run(name, Path(folder).expanduser()) for name, folder in folders.items() if folder is not None]
    if not runs:
        raise InputError("name a DPO run with --with_sft, --without_sft or both")
    decline = Decline(tuple(runs))
    decline.write(Path(config.out))
    return decline


def decline_run(name: str, folder: Path) -> DeclineRun:
    """Reads how rewards moved in a run.

    Returns:
        Its curves, of held-out pairs if the run was evaluated on some.

    Raises:
        InputError: If the folder is not that of a run whose loss has implicit rewards.
    """
    metrics, options = _read(folder)
    held_out = "eval_rewards/chosen" in metrics
    prefix = "eval_" if held_out else ""
    if f"{prefix}rewards/chosen" not in metrics:
        raise InputError(f"{folder}: its metrics.jsonl has no rewards/chosen; expected a run of `qstar dpo`")
    steps = metrics[f"{prefix}rewards/chosen"][0]
    names = {curve: prefix + metric for curve, metric in _CURVES.items()} | {"reference": _REFERENCE}
    curves = {
        curve: [dict(zip(*metrics[metric], strict=True)).get(step) for step in steps]
        for curve, metric in names.items()
        if metric in metrics
    }
    errors = {curve: metrics[f"{metric}_stderr"][1] for curve, metric in names.items() if f"{metric}_stderr" in metrics}
    summary = folder / "summary.json"
    verdict = json.loads(summary.read_text(encoding="utf-8")).get("verdict") if summary.exists() else None
    segments = "pairs" in options["loss"]  # a run of `qstar control`, whose loss has options of its own
    return DeclineRun(
        name=name,
        folder=str(folder),
        beta=options["loss"]["beta"] if segments else losses.make_loss(**options["loss"]).beta,
        held_out=held_out,
        steps=steps,
        curves={curve: values for curve, values in curves.items() if None not in values},
        stderr={curve: values for curve, values in errors.items() if len(values) == len(steps)},
        verdict=verdict or "",
        kind="segments" if segments else "responses",
    )


def _read(folder: Path) -> tuple[dict, dict]:
    for name in ("metrics.jsonl", "config.yaml"):
        if not (folder / name).is_file():
            raise InputError(f"{folder}: no {name}; expected the folder of a run of `qstar dpo`")
    options = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    if "loss" not in options:
        raise InputError(f"{folder}: not a run with a preference loss; expected one of `qstar dpo`")
    return read_metrics(folder), options
