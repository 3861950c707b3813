"""The tour: SFT, DPO at several betas and without SFT, then the paper's three insights, measured and put on one page.

It calls what the verbs call, with the options that a user would give, so each part can be done again by hand.
"""

import json
import shutil
import time
from pathlib import Path

from rich.console import Console
from rich.rule import Rule

from qstar_jax.config import (
    ComputeOptions,
    DataOptions,
    DeclineConfig,
    DemoConfig,
    DpoConfig,
    JudgeOptions,
    LossOptions,
    OptimizerOptions,
    ReportConfig,
    ScoreConfig,
    SftConfig,
    SweepConfig,
    TrainOptions,
)
from qstar_jax.demo.pretrain import pretrain, weights_hash
from qstar_jax.evaluation.insights.credit import measure_credit
from qstar_jax.evaluation.insights.decline import measure_decline
from qstar_jax.evaluation.insights.sweep import measure_sweep
from qstar_jax.evaluation.score import score_file
from qstar_jax.report.insights import show, write_figure
from qstar_jax.report.scores import show_scores
from qstar_jax.report.summary import write_report
from qstar_jax.tasks.tiny_tldr import BASE, TASK
from qstar_jax.training.run import train

# A step in micro-batches of four rows has the same gradient, and arrays that stay in the processor's cache: it takes
# two thirds of the time of one whole batch, whose arrays the system must find room for at every step.
SFT = {"steps": 60, "batch_size": 64, "accumulate": 16}
SFT_RATE = 2e-3
DPO = {"steps": 40, "batch_size": 32, "accumulate": 8, "eval_batch_size": 32, "eval_every": 10, "reference_samples": 64}
DPO_RATE = 2e-4
BETAS = (0.3, 1.0)  # the first is that of the verdicts, of the credit pictures and of the run without SFT
EVALUATED, CORRUPTED, ANSWERED = 128, 600, 160  # pairs in evaluations, corrupted summaries, prompts of the sweep
LENGTHS = {"max_length": 128, "max_prompt_length": 88}  # nothing is cut
# One prompt a row with all scores at once: for rows as short as these the quickest to compile and to run.
SHAPE = {"layout": "shared", **LENGTHS}
COMPUTE = ComputeOptions(attention="dense")
MAX_NEW_TOKENS = 40


def run(config: DemoConfig, console: Console) -> dict:
    """Runs the tour, writes all runs, the figures, metrics.jsonl and report.html, and returns its summary.json."""
    began, out = time.perf_counter(), Path(config.out)
    source = f"{TASK.source}?seed={config.seed}"
    base = _base_model(config, console)
    console.print(Rule("Supervised fine-tuning on preferred summaries"))
    train(_sft(base, out, source, config.seed), console)
    for beta in BETAS:
        console.print(Rule(f"DPO from there on pairs of summaries, beta {beta:g}"))
        train(_dpo(out / "sft", out / f"dpo-{beta:g}", source, beta, config.seed), console)
    console.print(Rule(f"The same without SFT, beta {BETAS[0]:g}"))
    train(_dpo(base, out / "dpo-without-sft", source, BETAS[0], config.seed), console)
    console.print(Rule("Insight 1: which tokens are wrong?"))
    credit, scored = measure_credit(score_file(_score(out, source), console))
    show_scores(scored, console)
    show(credit, scored.out, console)
    console.print(Rule("Insight 2: what is search worth?"))
    write_figure(measure_sweep(_sweep(out, source), console), out / "sweep")
    runs = {"with_sft": str(out / f"dpo-{BETAS[0]:g}"), "without_sft": str(out / "dpo-without-sft")}
    write_figure(measure_decline(DeclineConfig(out=str(out / "decline"), **runs)), out / "decline")
    console.print(Rule("What it showed"))
    shutil.copyfile(out / f"dpo-{BETAS[0]:g}" / "metrics.jsonl", out / "metrics.jsonl")
    parts = {name: str(out / name) for name in ("credit", "sweep", "decline")}
    return write_report(
        ReportConfig(out=str(out), **parts),
        console,
        seed=config.seed,
        base_sha256=weights_hash(base),
        seconds=time.perf_counter() - began,
    )


def _base_model(config: DemoConfig, console: Console) -> Path:
    if config.from_scratch:
        console.print(Rule("Pretraining the base model from random parameters"))
        base = pretrain(Path(config.out) / "pretraining", console=console)
        same = "the same" if weights_hash(base) == weights_hash(BASE) else "other (rounding differs between machines)"
        console.print(f"base model {base}: {same} weights as the one in the package")
        return base
    record = json.loads((BASE / "pretraining.json").read_text(encoding="utf-8"))
    console.print(
        f"base model: {record['parameters']:,} parameters, pretrained for {record['steps']} steps "
        f"(seed {record['seed']}) by `{record['command']}`; --from_scratch does it again"
    )
    return BASE


def _sft(base: Path, out: Path, source: str, seed: int) -> SftConfig:
    return SftConfig(
        model=str(base),
        out=str(out / "sft"),
        data=DataOptions(train=source, max_train_rows=SFT["steps"] * SFT["batch_size"], **SHAPE),
        compute=COMPUTE,
        optimizer=OptimizerOptions(learning_rate=SFT_RATE, warmup_steps=10, schedule="cosine"),
        train=TrainOptions(seed=seed, **SFT),
    )


def _dpo(model: Path, out: Path, source: str, beta: float, seed: int) -> DpoConfig:
    return DpoConfig(
        model=str(model),
        out=str(out),
        data=DataOptions(
            train=source,
            eval=source,
            max_train_rows=DPO["steps"] * DPO["batch_size"],
            max_eval_rows=EVALUATED,
            **SHAPE,
        ),
        compute=COMPUTE,
        loss=LossOptions(beta=beta),
        optimizer=OptimizerOptions(learning_rate=DPO_RATE, warmup_steps=10),
        train=TrainOptions(seed=seed, **DPO),
    )


def _score(out: Path, source: str) -> ScoreConfig:
    return ScoreConfig(
        model=str(out / f"dpo-{BETAS[0]:g}"),
        out=str(out / "credit"),
        wrong="wrong",
        batch_size=32,
        show=4,
        compute=COMPUTE,
        data=DataOptions(eval=source, eval_split="corrupted", max_eval_rows=CORRUPTED, **LENGTHS),
    )


def _sweep(out: Path, source: str) -> SweepConfig:
    return SweepConfig(
        model=[str(out / f"dpo-{beta:g}") for beta in BETAS],
        out=str(out / "sweep"),
        max_new_tokens=MAX_NEW_TOKENS,
        batch_size=20,
        judge=JudgeOptions(kind="true_reward"),
        compute=COMPUTE,
        data=DataOptions(eval=source, max_eval_rows=ANSWERED, **LENGTHS),
    )
