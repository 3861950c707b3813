"""Insight 2, search: what answers are worth against the width of the beam that found them.

The paper samples for width 1 and has no greedy control; here both are measured, so that what search gains is told
apart from what less randomness gains.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from qstar_jax.config import DecodeOptions, SweepConfig
from qstar_jax.errors import InputError
from qstar_jax.evaluation.intervals import mean_interval

PIVOT = 5  # the width at which the paper's curves are highest


@dataclass(frozen=True, order=True)
class Setting:
    """One way to decode.

    Attributes:
        width: Beams.
        decoder: "sampled", "greedy" or "beam".
        seed: Of the samples; 0 where nothing is drawn.
    """

    width: int
    decoder: str
    seed: int = 0

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return {"sampled": f"sampled-{self.seed}", "greedy": "greedy", "beam": f"beams-{self.width}"}[self.decoder]

    def options(self, config: SweepConfig) -> DecodeOptions:
        """Returns its `decode:` block."""
        common = {"max_new_tokens": config.max_new_tokens, "stop": config.stop}
        match self.decoder:
            case "sampled":
                drawn = {"temperature": config.temperature, "top_k": config.top_k, "seed": self.seed}
                return DecodeOptions(method="sample", **drawn, **common)
            case "beam":
                return DecodeOptions(method="beam", beams=self.width, **common)
        return DecodeOptions(**common)


@dataclass(frozen=True)
class Outcome:
    """What an answer was worth.

    Attributes:
        row: Row of its prompt.
        win: 1 where the judge preferred it to the file's answer, 0.5 for a tie, 0 where not; None if undecided.
        length: Its tokens, EOS included.
        logp: Sum of log pi, in nats.
        implicit_reward: Sum of beta * log(pi / pi_ref).
        true_reward: Its true reward, where the task knows it.
        truncated: Whether it ran into the limit.
    """

    row: int
    win: float | None
    length: int
    logp: float
    implicit_reward: float
    true_reward: float | None
    truncated: bool


def settings(config: SweepConfig) -> list[Setting]:
    """Lists the ways to decode that a sweep compares.

    Args:
        config: The sweep.

    Returns:
        Samples of each seed, greedy, and each width.

    Raises:
        InputError: If widths or seeds are missing, repeated or out of range.
    """
    for name, values, least in (("widths", config.widths, 2), ("seeds", config.seeds, 0)):
        if not values or len(set(values)) < len(values) or min(values) < least:
            raise InputError(
                f"--{name} {values}: expected one or more different numbers of at least {least}"
                + ("; width 1 is always tried" if name == "widths" else "")
            )
    sampled = [Setting(1, "sampled", seed) for seed in config.seeds]
    return [*sampled, Setting(1, "greedy"), *(Setting(width, "beam") for width in sorted(config.widths))]


def sweep_run(outcomes: dict[Setting, Sequence[Outcome]], *, name: str, model: str, beta: float) -> dict:
    """Sums up the sweep of one model.

    Args:
        outcomes: For each setting one outcome a prompt, all in the same order of prompts.
        name: Label of its curve.
        model: The model.
        beta: Temperature of its rewards.

    Returns:
        One entry of "runs" in sweep.json: means with intervals (bootstrap over prompts; samples of several seeds are
        averaged for each prompt first), and paired differences of win rates.
    """
    groups: dict[tuple[str, int], list[Setting]] = {}
    for setting in outcomes:
        groups.setdefault((setting.decoder, setting.width), []).append(setting)

    def by_prompt(key: tuple[str, int], of: Callable[[Outcome], float | None]) -> np.ndarray:
        values = [[of(outcome) for outcome in outcomes[setting]] for setting in groups[key]]
        filled = np.array(values, float)  # None becomes NaN
        there = np.isfinite(filled)
        return np.where(there, filled, 0).sum(0) / np.where(there.any(0), there.sum(0), np.nan)

    def interval(values: np.ndarray) -> dict[str, float] | None:
        return asdict(mean_interval(values)) if np.isfinite(values).any() else None

    def point(key: tuple[str, int]) -> dict:
        figures = {
            "win_rate": lambda outcome: outcome.win,
            "length": lambda outcome: outcome.length,
            "logp": lambda outcome: outcome.logp,
            "implicit_reward": lambda outcome: outcome.implicit_reward,
            "true_reward": lambda outcome: outcome.true_reward,
        }
        return {
            "decoder": key[0],
            "width": key[1],
            **{figure: interval(by_prompt(key, of)) for figure, of in figures.items()},
            "truncated": float(by_prompt(key, lambda outcome: outcome.truncated).mean()),
            "undecided": sum(outcome.win is None for setting in groups[key] for outcome in outcomes[setting]),
        }

    wins = {key: by_prompt(key, lambda outcome: outcome.win) for key in groups}
    widths = sorted(width for decoder, width in groups if decoder == "beam")
    pivot = PIVOT if PIVOT in widths else widths[len(widths) // 2]
    pairs = [(("beam", pivot), ("sampled", 1)), (("beam", pivot), ("greedy", 1))]
    pairs += [(("beam", widths[-1]), ("beam", pivot))] if widths[-1] > pivot else []
    return {
        "name": name,
        "model": model,
        "beta": beta,
        "points": [point(key) for key in groups],
        "pivot": pivot,
        "differences": {f"{_said(one)} - {_said(other)}": interval(wins[one] - wins[other]) for one, other in pairs},
    }


def _said(key: tuple[str, int]) -> str:
    decoder, width = key
    return f"{width} beams" if decoder == "beam" else decoder
