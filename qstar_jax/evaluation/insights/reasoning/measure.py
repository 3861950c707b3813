"""From scored solutions and samples to reasoning.json."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from qstar_jax.evaluation.insights.reasoning.choices import SIZES, Sampled, choose, search_gains, selection_gains
from qstar_jax.evaluation.insights.reasoning.false_steps import FalseSteps, HeldOut
from qstar_jax.evaluation.insights.reasoning.record import Reasoning, Searched
from qstar_jax.evaluation.intervals import mean_interval
from qstar_jax.tasks.tiny_sums.oracle import prefix_success
from qstar_jax.tasks.tiny_sums.sums import read_sum


def measure_reasoning(
    held_out: HeldOut,
    sampled: Sampled,
    *,
    seed: int,
    trained_on: Mapping[str, int],
    out: Path,
) -> Reasoning:
    """Compares step rewards with the truth, selects and searches, and writes reasoning.json.

    Args:
        held_out: Scored solutions; thresholds come from the first half of them, everything else from the second.
        sampled: Scored samples, and what was searched.
        seed: Seed of everything that was drawn.
        trained_on: See `Reasoning`.
        out: Folder for the record.
    """
    half = len(held_out.rows) // 2
    steps = FalseSteps(held_out.part(slice(half)), held_out.part(slice(half, None)), seed)
    selection, choice = choose(sampled)
    record = Reasoning(
        seed=seed,
        betas=held_out.betas,
        trained_on=dict(trained_on),
        solutions=len(held_out.rows) - half,
        success=float(np.mean([prefix_success(read_sum(row["prompt"]), "") for row in held_out.rows])),
        scores=steps.scores(),
        sizes=SIZES,
        selection={name: tuple(map(mean_interval, values.T)) for name, values in selection.items()},
        search=tuple(Searched(name, mean_interval(values)) for name, values in choice.items()),
        differences=steps.gains() | selection_gains(selection) | search_gains(choice),
    )
    record.write(out)
    return record
