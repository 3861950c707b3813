"""From what was measured of each response to the sweep of a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from qstar_jax.evaluation.insights.sweep.record import Point, SweepRun
from qstar_jax.evaluation.insights.sweep.settings import Setting
from qstar_jax.evaluation.intervals import Interval, mean_interval

PIVOT = 5  # the width at which the paper's curves are highest


@dataclass(frozen=True)
class Outcome:
    """What was measured of one response.

    Attributes:
        row: Row of its prompt.
        win: 1 where the judge preferred it to the file's response, 0.5 for a tie, 0 where not; None if undecided.
        length: Tokens, EOS included.
        logp: Sum of log pi, in nats.
        implicit_reward: Sum of beta * log(pi / pi_ref).
        true_reward: Its true reward, where the task knows it.
        truncated: Whether it reached the limit.
    """

    row: int
    win: float | None
    length: int
    logp: float
    implicit_reward: float
    true_reward: float | None
    truncated: bool


def sweep_run(
    outcomes: Mapping[Setting, Sequence[Outcome]],
    *,
    name: str,
    model: str,
    beta: float,
    unused_rows: dict[str, list[int]] | None = None,
) -> SweepRun:
    """Summarizes the sweep of one model, whose fields `SweepRun` describes.

    For each setting there is one outcome per prompt, all in the same order of prompts.
    """
    decoders: dict[Setting, list[Sequence[Outcome]]] = {}  # samples of all seeds are one decoder
    for setting, measured in outcomes.items():
        decoders.setdefault(replace(setting, seed=0), []).append(measured)
    wins = {decoder: _by_prompt(seeds, "win") for decoder, seeds in decoders.items()}
    beams = {decoder.width: decoder for decoder in decoders if decoder.decoder == "beam"}
    widths = sorted(beams)
    pivot = PIVOT if PIVOT in widths else widths[len(widths) // 2]
    pairs = [(beams[pivot], Setting(1, "sampled")), (beams[pivot], Setting(1, "greedy"))]
    pairs += [(beams[widths[-1]], beams[pivot])] if widths[-1] > pivot else []
    return SweepRun(
        name=name,
        model=model,
        beta=beta,
        points=tuple(_point(decoder, seeds) for decoder, seeds in decoders.items()),
        pivot=pivot,
        differences={f"{one.name} - {other.name}": _interval(wins[one] - wins[other]) for one, other in pairs},
        unused_rows=unused_rows or {},
    )


def _point(decoder: Setting, seeds: Sequence[Sequence[Outcome]]) -> Point:
    return Point(
        decoder=decoder.decoder,
        width=decoder.width,
        win_rate=_interval(_by_prompt(seeds, "win")),
        **{name: _interval(_by_prompt(seeds, name)) for name in ("length", "logp", "implicit_reward", "true_reward")},
        truncated=float(_by_prompt(seeds, "truncated").mean()),
        undecided=sum(outcome.win is None for outcomes in seeds for outcome in outcomes),
    )


def _by_prompt(seeds: Sequence[Sequence[Outcome]], measure: str) -> np.ndarray:
    """Mean of a field over the seeds that have it, per prompt; NaN where none has. Shape [prompts]."""
    # None becomes NaN.
    values = np.array([[getattr(outcome, measure) for outcome in outcomes] for outcomes in seeds], float)
    measured = np.isfinite(values)
    return np.where(measured, values, 0).sum(0) / np.where(measured.any(0), measured.sum(0), np.nan)


def _interval(values: np.ndarray) -> Interval | None:
    return mean_interval(values) if np.isfinite(values).any() else None
