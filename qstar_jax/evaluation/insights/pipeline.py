"""Pipelines: do preferences between final outputs train every model, and tell which of them is to blame?

The paper's Appendix D derives it, and runs nothing. Here the true reward of an output is known, and so is whose fault a
bad one is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from qstar_jax.evaluation.blame import Blame
from qstar_jax.evaluation.insights.record import Finding, Record
from qstar_jax.evaluation.intervals import Interval
from qstar_jax.pipeline import Point

_CHANCE = 0.5
_NORMAL = 1.96  # standard errors to either side of a mean


@dataclass(frozen=True)
class Earned:
    """What a pipeline earned at one point of training.

    Attributes:
        steps: Optimizer steps.
        reward: Mean true reward of its own runs.
        kl: KL of each stage to its reference, in nats.
    """

    steps: int
    reward: Interval
    kl: tuple[float, ...]

    @property
    def total_kl(self) -> float:
        """KL of the whole pipeline, in nats."""
        return sum(self.kl)


@dataclass(frozen=True)
class Arm:
    """What one way to train taught.

    Attributes:
        name: Its name.
        curve: The pipeline in training, in order.
        finds: Area under the ROC curve of low rewards of each stage as a detector of its own faults; None where it is
            never, or always, at fault.
        tells: The same among runs with exactly one fault, of the reward of the first stage beside those of the others:
            is it this one?
    """

    name: str
    curve: tuple[Earned, ...]
    finds: tuple[Interval | None, ...]
    tells: Interval | None


@dataclass(frozen=True)
class Pipeline(Record):
    """pipeline.json: what preferences between final outputs taught the models of a pipeline.

    Attributes:
        seed: Seed of everything that was drawn.
        stages: Names of the models, in their order.
        pairs: Pairs that all arms were trained on.
        measured: Runs behind each point of a curve.
        runs: Runs of the references whose rewards were split.
        faulty: How many of these each stage spoilt.
        single: How many exactly one stage spoilt.
        arms: Ways to train; the first is the joint loss.
    """

    NAME: ClassVar[str] = "pipeline"
    COMMAND: ClassVar[str] = "qstar demo --insight pipeline"

    seed: int
    stages: tuple[str, ...]
    pairs: int
    measured: int
    runs: int
    faulty: tuple[int, ...]
    single: int
    arms: tuple[Arm, ...]

    def finding(self) -> Finding:
        """Reproduced where the joint loss earns reward, tells whose fault it is, and finds every stage's own faults."""
        joint = self.arms[0]
        first, last = joint.curve[0], joint.curve[-1]
        areas = [joint.tells, *joint.finds]
        signs = [last.reward.compare(first.reward), *(_beside_chance(area) for area in areas)]
        reproduced = None
        if min(signs) > 0:
            reproduced = True
        elif min(signs) < 0:
            reproduced = False
        found = ", ".join(f"{name} {area:.2f}" for name, area in zip(self.stages, joint.finds, strict=True) if area)
        others = "; ".join(
            f"{arm.name} {arm.curve[-1].reward:.2f} at {arm.curve[-1].total_kl:.2f} nats" for arm in self.arms[1:]
        )
        told = "cannot be told" if joint.tells is None else f"{joint.tells:.2f}"
        return Finding(
            insight="pipeline",
            title="Several models, one preference",
            claim="Preferences between final outputs train every model of a pipeline, and the reward, split by model, "
            "tells which of them is to blame.",
            paper="Derived for a language model and a diffusion model (Appendix D, Eq. 17 and 18; nothing was run).",
            measured=f"Joint loss: true reward {first.reward:.2f} before, {last.reward:.2f} at {last.total_kl:.2f} "
            f"nats; whose fault it is: AUC {told}; faults of each: {found}. Other arms: {others}.",
            reproduced=reproduced,
            command=self.COMMAND,
        )


def _interval(point: Point) -> Interval:
    """The 95 % interval of a mean of many runs."""
    return Interval(
        point.reward, point.reward - _NORMAL * point.reward_error, point.reward + _NORMAL * point.reward_error
    )


def _beside_chance(area: Interval | None) -> int:
    """1 or -1 where an area lies above or below chance, 0 where it holds chance or is unknown."""
    return 0 if area is None else int(area.low > _CHANCE) - int(area.high < _CHANCE)


def measure_pipeline(
    arms: Mapping[str, tuple[Sequence[Point], Blame]],
    *,
    seed: int,
    pairs: int,
    measured: int,
    out: Path,
) -> Pipeline:
    """Collects what arms earned and whom their rewards blame, and writes pipeline.json.

    Args:
        arms: Name -> curve, and blame on runs of the references that are the same for all; the joint loss first.
        seed: See `Pipeline`; so are the others.
        pairs: See there.
        measured: See there.
        out: Folder for the record.
    """
    blame = next(iter(arms.values()))[1]
    names = tuple(blame.faulty)
    record = Pipeline(
        seed=seed,
        stages=names,
        pairs=pairs,
        measured=measured,
        runs=blame.runs,
        faulty=tuple(blame.faulty.values()),
        single=blame.single,
        arms=tuple(
            Arm(
                name=name,
                curve=tuple(Earned(point.step, _interval(point), point.kl) for point in curve),
                finds=tuple(one.finds[stage] for stage in names),
                tells=one.tells[names[0]],
            )
            for name, (curve, one) in arms.items()
        ),
    )
    record.write(out)
    return record
