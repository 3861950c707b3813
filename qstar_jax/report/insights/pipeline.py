"""Pipelines: reward against divergence for each way to train, and whom the split rewards blame."""

from functools import partial

from matplotlib.axes import Axes
from rich.console import Console

from qstar_jax.evaluation.insights.pipeline import Arm, Earned, Pipeline
from qstar_jax.evaluation.intervals import Interval
from qstar_jax.report.dots import draw_dots
from qstar_jax.report.insights.view import View
from qstar_jax.report.numbers import decimal, with_interval
from qstar_jax.report.panel import Panel, Style
from qstar_jax.report.tables import Table, cell, print_table

_WHOSE = "whose fault"


def panels(pipeline: Pipeline) -> list[Panel]:
    """Shows what each arm earns on its way, and how well its rewards tell faults."""
    return [_reward_panel(pipeline), _blame_panel(pipeline)]


def _reward_panel(pipeline: Pipeline) -> Panel:
    ends = {arm.name: arm.curve[-1] for arm in pipeline.arms}
    words = "; ".join(
        f"{name} {with_interval(end.reward)} at {decimal(end.total_kl)} nats" for name, end in ends.items()
    )
    best = max(ends, key=lambda name: ends[name].reward.mean)
    start = pipeline.arms[0].curve[0].reward
    return Panel(
        "True reward against divergence",
        f"True reward: references {with_interval(start)}; {words}.",
        partial(_draw_rewards, arms=pipeline.arms),
        2.6,
        f"At the end of training {best} earns most: {with_interval(ends[best].reward)} after {with_interval(start)}.",
    )


def _draw_rewards(axes: Axes, style: Style, *, arms: tuple[Arm, ...]):
    for number, arm in enumerate(arms):
        mark = style.mark(number)
        kls, rewards = [point.total_kl for point in arm.curve], [point.reward for point in arm.curve]
        axes.plot(kls, [reward.mean for reward in rewards], label=arm.name, **mark)
        axes.fill_between(
            kls, [r.low for r in rewards], [r.high for r in rewards], color=mark["color"], alpha=0.14, linewidth=0
        )
    axes.set_xlabel("KL of all models to their references, nats")
    axes.set_ylabel("true reward")
    axes.grid(axis="y")


def _blame_panel(pipeline: Pipeline) -> Panel:
    groups = {arm.name: _areas(pipeline, arm) for arm in pipeline.arms}
    words = "; ".join(
        f"{name}: " + ", ".join(f"{series} {with_interval(area)}" for series, area in areas.items())
        for name, areas in groups.items()
    )
    joint = pipeline.arms[0]
    return Panel(
        "Which model is to blame",
        f"Area under the ROC curve of implicit rewards: {words}.",
        partial(
            draw_dots,
            groups=groups,
            series=[*map(_faults, pipeline.stages), _WHOSE],
            label="AUC of implicit rewards",
            line=0.5,
            line_label="chance",
        ),
        0.7 + 0.45 * len(groups),
        f"Trained jointly, rewards tell whose fault it is with AUC {with_interval(joint.tells)}, and find faults: "
        + ", ".join(f"{name} {with_interval(area)}" for name, area in zip(pipeline.stages, joint.finds, strict=True))
        + ".",
    )


def _faults(stage: str) -> str:
    return f"faults of the {stage}"


def _areas(pipeline: Pipeline, arm: Arm) -> dict[str, Interval]:
    """All areas that are known."""
    areas = dict(zip(map(_faults, pipeline.stages), arm.finds, strict=True)) | {_WHOSE: arm.tells}
    return {name: area for name, area in areas.items() if area is not None}


def tables(pipeline: Pipeline, *, brief: bool = False) -> list[Table]:
    """What arms earn, and whom their rewards blame; `brief` leaves out intervals of curves."""
    start = pipeline.arms[0].curve[0]
    earned = [("references", *_earned_cells(start, brief))]
    for arm in pipeline.arms:
        earned += [(arm.name, *_earned_cells(point, brief)) for point in arm.curve[1:]]
    blame = [(arm.name, *map(with_interval, arm.finds), with_interval(arm.tells)) for arm in pipeline.arms]
    return [
        Table(
            "What each way to train earns",
            ("arm", "steps", "true reward", *(f"KL of the {name}" for name in pipeline.stages), "KL"),
            tuple(earned),
        ),
        Table("Areas under ROC curves", ("arm", *map(_faults, pipeline.stages), _WHOSE), tuple(blame)),
    ]


def _earned_cells(point: Earned, brief: bool) -> tuple[str, ...]:
    return (
        str(point.steps),
        cell(point.reward, 2, lone=brief),
        *(decimal(kl, 2) for kl in point.kl),
        decimal(point.total_kl, 2),
    )


def facts(pipeline: Pipeline) -> list[str]:
    """Names the settings, and what the numbers are."""
    faults = ", ".join(f"the {name} {count}" for name, count in zip(pipeline.stages, pipeline.faulty, strict=True))
    return [
        f"seed {pipeline.seed}; {pipeline.pairs:,} pairs of final outputs of the references, the same for all arms",
        f"{pipeline.measured} runs of each policy behind every point, from the same keys",
        f"blame: {pipeline.runs} runs of the references that no training saw; spoilt by {faults}; {pipeline.single} by "
        "exactly one",
        "a fault of a model is found where its own reward is low; whose it is, where one reward is below the other",
        "a model that is not trained earns nothing, so it is never blamed (0.5)",
        "bands: 1.96 standard errors over runs; brackets of areas: 95 % bootstrap intervals over runs",
    ]


def print_pipeline(pipeline: Pipeline, console: Console | None = None):
    """Prints what arms earn and whom their rewards blame."""
    for table in tables(pipeline, brief=True):
        print_table(table, console)


VIEW = View(
    Pipeline,
    insight="pipeline",
    heading="Pipelines: which model is to blame",
    panels=panels,
    tables=tables,
    facts=facts,
    print=print_pipeline,
)
