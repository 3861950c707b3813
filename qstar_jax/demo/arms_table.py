"""Arms of training a pipeline, as files of a folder: one for each arm and seed, and a table of them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from qstar_jax.evaluation.blame import reward_at_kl
from qstar_jax.pipeline import Point


def arm_file(out: Path, arm: str, seed: int) -> Path:
    """Names the file of an arm."""
    return out / f"{arm.replace(' ', '-')}-{seed}.json"


def summarize(
    out: Path, names: Sequence[str], seeds: Sequence[int], arms: Sequence[str], kls: Sequence[float], score: str
) -> Table:
    """Puts stored arms in a table: reward at equal KL, at the end, and blame; means over seeds, lowest and highest.

    Args:
        out: Folder of the files; arms that have none for a seed are summarized over the others.
        names: Names of two stages.
        seeds: The seeds.
        arms: The arms.
        kls: KL of the whole pipeline at which arms are compared, in nats.
        score: Which score of the stages blames them.
    """
    faults = (f"{name}'s faults" for name in names)
    table = Table(
        "arm", "seeds", "before", *(f"at KL {kl:g}" for kl in kls), "at the end", "its KL", *faults, "whose fault"
    )
    for arm in arms:
        files = [file for seed in seeds if (file := arm_file(out, arm, seed)).exists()]
        records = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        if not records:
            continue
        curves = [_curve(record) for record in records]
        blame = [record["blame"][score] for record in records]
        table.add_row(
            arm,
            str(len(records)),
            _spread([curve[0].reward for curve in curves]),
            *(_spread([reward_at_kl(curve, kl) for curve in curves]) for kl in kls),
            _spread([curve[-1].reward for curve in curves]),
            _spread([curve[-1].total_kl for curve in curves]),
            *(_spread([_area(one["finds"][name]) for one in blame]) for name in names),
            _spread([_area(one["tells"][names[0]]) for one in blame]),
        )
    return table


def _curve(record: dict[str, Any]) -> list[Point]:
    return [Point(**point | {"kl": tuple(point["kl"]), "outputs": ()}) for point in record["curve"]]


def _area(interval: dict[str, float] | None) -> float:
    """The area under a ROC curve; NaN where a stage was never, or always, at fault."""
    return float("nan") if interval is None else interval["mean"]


def _spread(values: Sequence[float]) -> str:
    if np.isnan(values).any():
        return "-"
    return f"{np.mean(values):.2f}" + (f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else "")
