"""The record of the insight: sweep.json."""

from dataclasses import dataclass, field
from typing import ClassVar

from qstar_jax.evaluation.insights.record import Finding, Record
from qstar_jax.evaluation.intervals import Interval


@dataclass(frozen=True)
class Point:
    """The responses of one decoder, averaged over prompts.

    Attributes:
        decoder: "sampled", "greedy" or "beam".
        width: Beams.
        win_rate: Share of prompts on which the judge preferred the response to the file's; None where it never decided.
        length: Tokens, EOS included.
        logp: Sum of log pi, in nats.
        implicit_reward: Sum of beta * log(pi / pi_ref).
        true_reward: True reward; None where the task does not know it.
        truncated: Share of the responses that reached the limit.
        undecided: How many responses the judge did not decide on.
    """

    decoder: str
    width: int
    win_rate: Interval | None
    length: Interval | None
    logp: Interval | None
    implicit_reward: Interval | None
    true_reward: Interval | None
    truncated: float
    undecided: int = 0


@dataclass(frozen=True)
class SweepRun:
    """The sweep of one model.

    Attributes:
        name: Label of its curve.
        model: The model.
        beta: Temperature of its rewards: reward per nat.
        points: One for each decoder: intervals are by bootstrap over prompts, and samples of several seeds are averaged
            per prompt first.
        pivot: The width that is compared with the controls and with the widest beams.
        differences: "5 beams - greedy", say -> paired difference of win rates; None where no prompt was decided.
        unused_rows: Reason -> rows of the file that were not tried, counted from 0.
    """

    name: str
    model: str
    beta: float
    points: tuple[Point, ...]
    pivot: int
    differences: dict[str, Interval | None]
    unused_rows: dict[str, list[int]] = field(default_factory=dict)

    def describe(self) -> str:
        """The win rate of the pivot, and how it differs from that of other decoders."""
        pivot = next(point for point in self.points if (point.decoder, point.width) == ("beam", self.pivot))
        rate = "undecided" if pivot.win_rate is None else f"{pivot.win_rate:.3f}"
        controls, wider = [], ""
        for name, gain in self.differences.items():
            one, _, other = name.partition(" - ")
            if gain is None:
                continue
            if one == f"{self.pivot} beams":
                controls.append(f"{gain:+.3f} against {other}")
            else:
                wider += f"; {one} {gain:+.3f} against {self.pivot}"
        return f"{self.name}: {rate} with {self.pivot} beams, {', '.join(controls)}{wider}"


@dataclass(frozen=True)
class Sweep(Record):
    """sweep.json: models whose responses to the same prompts were judged.

    Attributes:
        judge: Name of the judge.
        prompts: How many prompts.
        seeds: Seeds of the samples.
        runs: One for each model.
    """

    NAME: ClassVar[str] = "sweep"
    COMMAND: ClassVar[str] = "qstar sweep"

    judge: str
    prompts: int
    seeds: list[int]
    runs: tuple[SweepRun, ...]

    def finding(self) -> Finding:
        """Reproduced where the pivot of the first run wins more often than each control."""
        pivot = f"{self.runs[0].pivot} beams - "
        gains = [gain for name, gain in self.runs[0].differences.items() if name.startswith(pivot) and gain is not None]
        reproduced = None
        if gains and all(gain.low > 0 for gain in gains):
            reproduced = True
        elif any(gain.high < 0 for gain in gains):
            reproduced = False
        return Finding(
            insight="search",
            title="Search",
            claim="Beam search by likelihood, which is search by reward (Eq. 13), improves a policy over one beam, "
            "sampled or greedy; very wide beams gain nothing more, or lose.",
            paper="Five beams win 10 to 15 % more often against the preferred summary than one, which was sampled; "
            "beyond five, win rates fall and responses grow long (Fig. 2; no greedy control).",
            measured=f"Win rates against the preferred response ({self.judge}, {self.prompts} prompts). "
            + "".join(f"{run.describe()}. " for run in self.runs).rstrip(),
            reproduced=reproduced,
            command=self.COMMAND,
        )
