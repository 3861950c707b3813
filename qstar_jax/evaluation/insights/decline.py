"""Insight 3, decline: how implicit rewards moved in a run, from the metrics that it left."""

import json
from pathlib import Path

import yaml

from qstar_jax import losses
from qstar_jax.config import DeclineConfig
from qstar_jax.errors import InputError
from qstar_jax.store.files import write_json
from qstar_jax.training.run_log import read_metrics

# Curve -> the metrics that it can come from, the first that the run has. Those of held-out pairs come first.
_CURVES = {
    "chosen": "rewards/chosen",
    "rejected": "rewards/rejected",
    "margin": "rewards/margins",
}
_REFERENCE = "eval_rewards/reference_expected"  # -beta KL(reference || policy) on the reference's own samples


def measure_decline(config: DeclineConfig) -> dict:
    """Gathers how rewards moved in one run or two, and writes decline.json.

    Args:
        config: The runs.

    Returns:
        What decline.json holds.

    Raises:
        InputError: If no run is named, or one cannot be used.
    """
    folders = {"with SFT": config.with_sft, "without SFT": config.without_sft}
    runs = [decline_run(name, Path(folder).expanduser()) for name, folder in folders.items() if folder is not None]
    if not runs:
        raise InputError("name a DPO run with --with_sft, --without_sft or both")
    record, out = {"runs": runs}, Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "decline.json", record)
    return record


def decline_run(name: str, folder: Path) -> dict:
    """Reads how rewards moved in a run.

    Args:
        name: What the run is called in figures.
        folder: Folder of a DPO run.

    Returns:
        One entry of "runs" in decline.json: steps, and for chosen and rejected answers, their margin and the
        reference's own samples the mean implicit reward at these steps, with standard errors where the run logged them.

    Raises:
        InputError: If the folder is not that of a run whose loss has implicit rewards.
    """
    metrics, options = _read(folder)
    held_out = "eval_rewards/chosen" in metrics
    prefix = "eval_" if held_out else ""
    if f"{prefix}rewards/chosen" not in metrics:
        raise InputError(f"{folder}: its metrics.jsonl has no rewards/chosen; expected a run of `qstar dpo`")
    steps = metrics[f"{prefix}rewards/chosen"][0]
    named = {curve: prefix + metric for curve, metric in _CURVES.items()} | {"reference": _REFERENCE}
    curves = {
        curve: [dict(zip(*metrics[metric], strict=True)).get(step) for step in steps]
        for curve, metric in named.items()
        if metric in metrics
    }
    errors = {
        curve: values
        for curve, metric in named.items()
        if len(values := metrics.get(f"{metric}_stderr", ([], []))[1]) == len(steps)
    }
    summary = folder / "summary.json"
    verdict = json.loads(summary.read_text(encoding="utf-8")).get("verdict") if summary.exists() else None
    return {
        "name": name,
        "folder": str(folder),
        "beta": losses.make_loss(**options["loss"]).beta,
        "held_out": held_out,
        "steps": steps,
        "curves": {curve: values for curve, values in curves.items() if None not in values},
        "stderr": errors,
        "verdict": verdict or "",
    }


def _read(folder: Path) -> tuple[dict, dict]:
    for name in ("metrics.jsonl", "config.yaml"):
        if not (folder / name).is_file():
            raise InputError(f"{folder}: no {name}; expected the folder of a run of `qstar dpo`")
    options = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    if "loss" not in options:
        raise InputError(f"{folder}: not a run with a preference loss; expected one of `qstar dpo`")
    return read_metrics(folder), options
