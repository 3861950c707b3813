"""The insight `pipeline`: a model that says what to draw and one that draws, trained on preferences between images."""

import time
from pathlib import Path

from rich.console import Console
from rich.rule import Rule

from qstar_jax.config import DemoConfig, ReportConfig
from qstar_jax.demo.refiner_and_painter import NAMES, Size, prepare, train_and_blame
from qstar_jax.evaluation.insights.pipeline import measure_pipeline
from qstar_jax.pipeline import make_arms
from qstar_jax.report.insights import show
from qstar_jax.report.summary import write_report

SIZE = Size(pairs=4000, steps=80, measured=400, measure_every=40)


def run(config: DemoConfig, console: Console, size: Size = SIZE) -> dict:
    """Trains and measures, writes pipeline/ and report.html, and returns its summary.json."""
    began, out = time.perf_counter(), Path(config.out)
    console.print(Rule("A model that says what to draw, and one that draws it"))
    setting = prepare(config.seed, size)
    console.print(f"{size.pairs:,} pairs of their images, labelled by the true reward")
    arms = {}
    for name in make_arms(NAMES):
        arms[name] = curve, _ = train_and_blame(setting, name, size)
        first, last = curve[0], curve[-1]
        console.print(f"{name}: reward {first.reward:.2f} to {last.reward:.2f} at {last.total_kl:.2f} nats")
    sizes = {"pairs": size.pairs, "measured": size.measured}
    record = measure_pipeline(arms, seed=config.seed, **sizes, out=out / "pipeline")
    show(record, out / "pipeline", console)
    console.print(Rule("What it showed"))
    report = ReportConfig(out=str(out), pipeline=str(out / "pipeline"))
    return write_report(report, console, seed=config.seed, seconds=time.perf_counter() - began)
