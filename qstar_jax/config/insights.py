"""The verbs that show the paper's insights."""

from dataclasses import dataclass, field
from typing import Literal

from qstar_jax.config.compute import ComputeOptions, MeshOptions
from qstar_jax.config.data import DataOptions
from qstar_jax.config.judge import JudgeOptions
from qstar_jax.config.variants import path


@dataclass(frozen=True)
class SweepConfig:
    """The paper's second insight, measured: win rate, length and reward of responses by the width of beam search.

    Each prompt of `data.eval` gets responses with one beam (sampled, and greedy) and with wider ones. A judge compares
    each with the response in the file (column `completion`, or `chosen`). Responses are kept, and the same command
    continues an interrupted sweep.

    Args:
        model: Folder of a DPO run, or a list of several (of other betas, say), each of which becomes a curve; a
            report's verdict is about the first.
        out: Folder for sweep.json, sweep.png, comparisons.jsonl and the responses.
        reference: Folder or hub name of the reference; a DPO run brings its own.
        beta: Temperature of the implicit rewards: reward per nat; a DPO run brings its own.
        widths: Numbers of beams; a width of 1, sampled and greedy, is always tried too.
        seeds: Seeds for sampling: each prompt is sampled once with each of them.
        temperature: Temperature for sampling; the paper's is 1.
        top_k: Sample from the k most likely tokens; the paper's is 50.
        max_new_tokens: Longest response, EOS included.
        stop: Strings that end a response; its text is truncated before them.
        batch_size: Prompts decoded, or responses scored, at once.
        export: Also write the responses and verdicts in alpaca_eval's format, one folder per setting under
            `out`/alpaca_eval.
        judge: Who decides which of two responses is better. Brackets name the kinds that read an option; others refuse
            it.
        data: `data.eval` is the file of prompts; if several rows have the same prompt, the first of them counts.
            sweep.json lists the rows that are not tried (`unused_rows`), by reason, counted from 0.
    """

    model: list[str] | str = path()
    out: str = path()
    reference: str | None = path(None)
    beta: float | None = None
    widths: list[int] = field(default_factory=lambda: [2, 3, 5, 7, 10, 20])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    temperature: float = 1.0
    top_k: int = 50
    max_new_tokens: int = 128
    stop: list[str] = field(default_factory=list)
    batch_size: int = 4
    export: bool = False
    judge: JudgeOptions = field(default_factory=JudgeOptions)
    data: DataOptions = field(default_factory=DataOptions)
    compute: ComputeOptions = field(default_factory=ComputeOptions)
    mesh: MeshOptions = field(default_factory=MeshOptions)


@dataclass(frozen=True)
class DeclineConfig:
    """The paper's third insight, from the metrics of real runs: do rewards of chosen responses fall in training?

    Args:
        out: Folder for decline.json and decline.png.
        with_sft: Folder of a DPO run that began from a model fine-tuned on the chosen responses.
        without_sft: Folder of a DPO run on the same data that did not.
    """

    out: str = path()
    with_sft: str | None = path(None)
    without_sft: str | None = path(None)


@dataclass(frozen=True)
class ReportConfig:
    """One page of what `score`, `sweep`, `decline`, `select` and `demo` have measured.

    Any of them may be left out.

    Args:
        out: Folder for report.html, summary.json and the figures.
        credit: Folder that `qstar score --wrong COLUMN` wrote.
        sweep: Folder that `qstar sweep` wrote.
        decline: Folder that `qstar decline` wrote.
        control: Folder that `qstar control` wrote, or folder `control` of `qstar demo --insight control`.
        dialogue: Folder `dialogue` that `qstar demo --insight dialogue` wrote.
        steps: Folder that `qstar score --steps --wrong_step COLUMN` wrote.
        selection: Folder that `qstar select` wrote.
        reasoning: Folder `reasoning` that `qstar demo --insight reasoning` wrote.
        diffusion: Folder `diffusion` that `qstar demo --insight diffusion` wrote.
        pipeline: Folder `pipeline` that `qstar demo --insight pipeline` wrote.
        title: Heading of the page.
        show: Number of rows of `credit` to colour on the page.
    """

    out: str = path()
    credit: str | None = path(None)
    sweep: str | None = path(None)
    decline: str | None = path(None)
    control: str | None = path(None)
    dialogue: str | None = path(None)
    steps: str | None = path(None)
    selection: str | None = path(None)
    reasoning: str | None = path(None)
    diffusion: str | None = path(None)
    pipeline: str | None = path(None)
    title: str = "Your language model is a Q-function"
    show: int = 6


@dataclass(frozen=True)
class DemoConfig:
    """Insights in minutes, on two CPU cores, offline: small tasks with a known reward.

    Args:
        out: Folder for report.html, summary.json, and the runs; null: runs/demo, or runs/ and the insight's name.
        insight: `paper` shows the paper's three insights on summaries, in two to three minutes; `dialogue` what DPO on
            whole dialogues teaches in a game of questions, in about five; `reasoning` what outcomes of worked-out sums
            teach about their steps, in about three; `control` how rewards move where a policy learns to push a mass, in
            one; `diffusion` what preferences between images teach a model that draws digits
            (`pip install 'qstar_jax[diffusion]'`), in about three; `pipeline` what they teach two models, of which one
            says what the other draws, and which is to blame (the same extra), in two to three.
        from_scratch: Pretrain the base model of `paper` first instead of reading the one in the package; `dialogue`,
            `diffusion` and `pipeline` always begin from scratch, and `reasoning` from a model in the package.
        seed: Seed of the task's rows (in `dialogue` also of its things) and of their order.
    """

    out: str | None = path(None)
    insight: Literal["paper", "dialogue", "reasoning", "control", "diffusion", "pipeline"] = "paper"
    from_scratch: bool = False
    seed: int = 0
