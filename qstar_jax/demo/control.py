"""The insight `control`: falling rewards where the optimum is known, without a simulator.

A mass is pushed to the origin; a flawed policy's segments are compared by regret. CPL learns from a clone and from a
random policy under one schedule, which is the third insight, for robots.
"""

import time
from pathlib import Path

from rich.console import Console
from rich.rule import Rule

from qstar_jax.config import ControlConfig, DemoConfig, ReportConfig
from qstar_jax.config.control import ControlTrainOptions, SegmentOptions
from qstar_jax.control.run import train_control
from qstar_jax.evaluation.insights.control import measure_control
from qstar_jax.report.insights import show
from qstar_jax.report.summary import write_report

TRAIN = ControlTrainOptions(success_every=500)


def run(config: DemoConfig, console: Console, train: ControlTrainOptions = TRAIN) -> dict:
    """Trains and measures, writes control/ and report.html, and returns its summary.json."""
    began, out = time.perf_counter(), Path(config.out)
    console.print(Rule("A policy of a mass that is pushed: cloning, then preferences between segments"))
    given = ControlConfig(
        task="lqr",
        out=str(out / "control"),
        arms=["with_bc", "without_bc", "with_bc_kl", "best_bc"],
        seeds=[config.seed],
        segments=SegmentOptions(seed=config.seed),
        train=train,
    )
    train_control(given, console)
    console.print(Rule("Do rewards of chosen segments fall?"))
    show(measure_control(out / "control"), out / "control", console)
    console.print(Rule("What it showed"))
    report = ReportConfig(out=str(out), control=str(out / "control"))
    return write_report(report, console, seed=config.seed, seconds=time.perf_counter() - began)
