"""The tour: SFT, DPO, then the paper's three insights, each measured against the true reward of the task."""

import json
import time
from pathlib import Path
from random import Random

import jax
from rich.console import Console
from rich.rule import Rule
from rich.table import Table

from qstar_jax.config import (
    ComputeOptions,
    DataOptions,
    DemoConfig,
    DpoConfig,
    LossOptions,
    MeshOptions,
    OptimizerOptions,
    SftConfig,
    TrainOptions,
)
from qstar_jax.demo import task
from qstar_jax.demo.insights import BETA, LENGTHS, credit_assignment, findings, reward_of_samples, search
from qstar_jax.demo.pretrain import BASE, pretrain, weights_hash
from qstar_jax.demo.vocabulary import split_words
from qstar_jax.evaluation.scored import ScoredResponse
from qstar_jax.loading import load_model
from qstar_jax.report.page import heatmap_page
from qstar_jax.report.terminal import print_heatmaps
from qstar_jax.sharding import make_mesh
from qstar_jax.training.run import train

SFT_STEPS, SFT_BATCH, SFT_RATE = 80, 64, 5e-4
DPO_STEPS, DPO_BATCH, DPO_RATE = 100, 32, 2e-4
CORRUPTED, SUMMARISED, SHOWN = 128, 128, 3  # test posts for insight 1, for insights 2 and 3, and pairs that are shown


def run(config: DemoConfig, console: Console) -> dict:
    """Runs the tour and writes report.html, summary.json, metrics.jsonl and the two runs.

    Args:
        config: Folder, seed, and whether to pretrain first.
        console: Where to show it.

    Returns:
        The summary that is also written to summary.json.
    """
    began, out = time.perf_counter(), Path(config.out)
    console.print(Rule("A language model as a Q-function: the demo of qstar_jax"))
    base = _base_model(config, console)
    _write_data(out / "data", config.seed)
    console.print(Rule("Supervised fine-tuning on summaries, a quarter of them flawed"))
    train(_sft_config(base, out, config.seed), console)
    console.print(Rule("DPO on pairs: a right summary against one with a wrong fact, or one that runs on"))
    dpo = train(_dpo_config(out, config.seed), console)

    mesh = make_mesh()
    with jax.set_mesh(mesh):
        sft_model, dpo_model = (
            load_model(out / name, ComputeOptions(), mesh, MeshOptions()) for name in ("sft", "dpo")
        )
        credit, scored = credit_assignment(dpo_model, sft_model, out / "data" / "corrupted.jsonl", mesh)
        found, samples = search({"sft": sft_model, "dpo": dpo_model}, _posts(config.seed), mesh)
        path = out / "data" / "reference_samples.jsonl"
        on_samples = reward_of_samples(dpo_model, sft_model, samples, path, mesh)
    held_out = {name: dpo[f"eval_rewards/{name}"] for name in ("chosen", "rejected", "margins", "accuracies")}
    summary = {
        "credit": credit,
        "search": found,
        "decline": {**held_out, "reference_samples": on_samples},
        "base_sha256": weights_hash(base),
        "seconds": time.perf_counter() - began,
    }
    said, shown = findings(summary), scored[: 2 * SHOWN]
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    (out / "metrics.jsonl").write_bytes((out / "dpo" / "metrics.jsonl").read_bytes())
    page = heatmap_page(shown, "What DPO taught a small model about summaries", notes=said)
    (out / "report.html").write_text(page, encoding="utf-8")
    _show(shown, found, said, out, console)
    return summary


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


def _write_data(folder: Path, seed: int):
    folder.mkdir(parents=True, exist_ok=True)
    train_seed, test_seed = 2 * seed, 2 * seed + 1  # never the same posts
    files = {
        "sft": task.completion_rows(SFT_STEPS * SFT_BATCH, train_seed),
        "pairs": task.preference_rows(DPO_STEPS * DPO_BATCH, train_seed),
        "pairs_test": task.preference_rows(256, test_seed),
        "corrupted": _corrupted_rows(CORRUPTED, test_seed),
    }
    for name, rows in files.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def _posts(seed: int) -> list[task.Post]:
    rng = Random(f"search {seed}")
    return [task.make_post(rng) for _ in range(SUMMARISED)]


def _corrupted_rows(n: int, seed: int) -> list[dict]:
    """Makes pairs that differ in one word only, as in the paper's Figure 1."""
    rng = Random(f"corrupted {seed}")
    rows = []
    while len(rows) < n:
        post = task.make_post(rng)
        corrupted, _, index = task.corrupt(post, rng)
        right = next((s for s in _summaries(post) if _differ_in_one_word(s, corrupted, index)), None)
        if right is not None:
            rows.append({"prompt": post.prompt, "chosen": right, "rejected": corrupted, "wrong_word": index})
    return rows


def _summaries(post: task.Post) -> list[str]:
    return [task.reference_summary(post, form) for form in range(len(post.family.summaries))]


def _differ_in_one_word(right: str, corrupted: str, index: int) -> bool:
    right_words, words = split_words(right), split_words(corrupted)
    return len(right_words) == len(words) and right_words[:index] + right_words[index + 1 :] == (
        words[:index] + words[index + 1 :]
    )


def _sft_config(base: Path, out: Path, seed: int) -> SftConfig:
    return SftConfig(
        model=str(base),
        out=str(out / "sft"),
        data=DataOptions(train=str(out / "data" / "sft.jsonl"), **LENGTHS),
        optimizer=OptimizerOptions(learning_rate=SFT_RATE, warmup_steps=10, schedule="cosine"),
        train=TrainOptions(steps=SFT_STEPS, batch_size=SFT_BATCH, seed=seed),
    )


def _dpo_config(out: Path, seed: int) -> DpoConfig:
    data = DataOptions(train=str(out / "data" / "pairs.jsonl"), eval=str(out / "data" / "pairs_test.jsonl"), **LENGTHS)
    return DpoConfig(
        model=str(out / "sft"),
        out=str(out / "dpo"),
        data=data,
        loss=LossOptions(beta=BETA),
        optimizer=OptimizerOptions(learning_rate=DPO_RATE, warmup_steps=10),
        train=TrainOptions(
            steps=DPO_STEPS,
            batch_size=DPO_BATCH,
            eval_batch_size=64,
            eval_every=20,
            seed=seed,
            reference_samples=0,  # `reward_of_samples` measures the same with the samples of the search
        ),
    )


def _show(shown: list[ScoredResponse], found: dict, said: list[str], out: Path, console: Console):
    console.print(Rule("Insight 1: answer-level labels, token-level credit"))
    print_heatmaps(shown, console)
    console.print(Rule("Insight 2: search by likelihood is search by reward"))
    table = Table("model", "decoder", "true reward", "best possible", "perfect", "tokens")
    for name, decoders in found.items():
        for decoder, result in decoders.items():
            table.add_row(
                name,
                decoder,
                f"{result['true_reward']:.2f}",
                f"{result['best_possible']:.2f}",
                f"{result['perfect']:.0%}",
                f"{result['tokens']:.1f}",
            )
    console.print(table)
    console.print(Rule("What it showed"))
    for finding in said:
        console.print(finding, markup=False, highlight=False)
    console.print("\nFiles:", style="bold")
    for name, what in (
        ("report.html", "the coloured summaries as a page"),
        ("summary.json", "all figures above"),
        ("metrics.jsonl", "the DPO run, step by step"),
        ("sft", "run folder after SFT"),
        ("dpo", "run folder after DPO: try `qstar score` and `qstar generate` on it"),
    ):
        console.print(f"  {out / name}  {what}", markup=False, highlight=False, soft_wrap=True)
