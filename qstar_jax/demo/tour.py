"""The tour: SFT, DPO, then the paper's three insights, each measured against the true reward of the task."""

import json
import time
from pathlib import Path
from random import Random

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.rule import Rule
from rich.table import Table

from qstar_jax.config import (
    ComputeOptions,
    DataOptions,
    DecodeOptions,
    DemoConfig,
    DpoConfig,
    LossOptions,
    MeshOptions,
    OptimizerOptions,
    SftConfig,
    TrainOptions,
)
from qstar_jax.data.loading import load_examples
from qstar_jax.decoding.generate import generate
from qstar_jax.demo import task
from qstar_jax.demo.pretrain import BASE, pretrain, weights_hash
from qstar_jax.demo.vocabulary import split_words
from qstar_jax.evaluation.scored import ScoredResponse, by_row
from qstar_jax.evaluation.token_rewards import score_dataset
from qstar_jax.loading import load_model
from qstar_jax.report.page import heatmap_page
from qstar_jax.report.terminal import print_heatmaps
from qstar_jax.sharding import make_mesh
from qstar_jax.training.run import train

DATA = {"max_length": 128, "max_prompt_length": 96}
SFT_STEPS, SFT_BATCH, SFT_RATE = 80, 64, 5e-4
DPO_STEPS, DPO_BATCH, DPO_RATE, BETA = 80, 32, 2e-4, 0.1
CORRUPTED, SUMMARISED, SHOWN = 128, 128, 3  # test posts for insights 1 and 2, and pairs that are shown
DECODERS = {
    "greedy": DecodeOptions(max_new_tokens=40),
    "5 beams": DecodeOptions(max_new_tokens=40, beams=5),
}


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
        credit, shown = _credit_assignment(out, mesh)
        search = _search(out, config.seed, mesh)
    summary = {
        "credit": credit,
        "search": search,
        "decline": {name: dpo[f"eval_rewards/{name}"] for name in ("chosen", "rejected", "margins", "accuracies")},
        "base_sha256": weights_hash(base),
        "seconds": time.perf_counter() - began,
    }
    findings = _findings(summary)
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    (out / "metrics.jsonl").write_bytes((out / "dpo" / "metrics.jsonl").read_bytes())
    page = heatmap_page(shown, "What DPO taught a small model about summaries", notes=findings)
    (out / "report.html").write_text(page, encoding="utf-8")
    _show(shown, search, findings, out, console)
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
        data=DataOptions(train=str(out / "data" / "sft.jsonl"), **DATA),
        optimizer=OptimizerOptions(learning_rate=SFT_RATE, warmup_steps=10, schedule="cosine"),
        train=TrainOptions(steps=SFT_STEPS, batch_size=SFT_BATCH, seed=seed),
    )


def _dpo_config(out: Path, seed: int) -> DpoConfig:
    data = DataOptions(train=str(out / "data" / "pairs.jsonl"), eval=str(out / "data" / "pairs_test.jsonl"), **DATA)
    return DpoConfig(
        model=str(out / "sft"),
        out=str(out / "dpo"),
        data=data,
        loss=LossOptions(beta=BETA),
        optimizer=OptimizerOptions(learning_rate=DPO_RATE, warmup_steps=10),
        train=TrainOptions(steps=DPO_STEPS, batch_size=DPO_BATCH, eval_batch_size=64, eval_every=20, seed=seed),
    )


def _credit_assignment(out: Path, mesh: Mesh) -> tuple[dict, list[ScoredResponse]]:
    """Insight 1: in a summary with one wrong word, does that word get the lowest reward?"""
    path = out / "data" / "corrupted.jsonl"
    policy = load_model(out / "dpo", ComputeOptions(), mesh, MeshOptions())
    reference = load_model(policy.reference, ComputeOptions(), mesh, MeshOptions())
    dataset = load_examples(str(path), "test", "preferences", policy.tokenizer, DataOptions(**DATA))
    scored = score_dataset(policy, reference.params, dataset, beta=BETA, batch_size=32, mesh=mesh)
    wrong_word = [json.loads(line)["wrong_word"] for line in path.read_text(encoding="utf-8").splitlines()]
    pairs = by_row(scored)
    hits = [int(np.argmin(bad.reward)) == wrong_word[bad.row] for _, bad in pairs]
    wins = [good.total_reward > bad.total_reward for good, bad in pairs]
    gap = [bad.reward[wrong_word[bad.row]] - good.reward[wrong_word[bad.row]] for good, bad in pairs]
    return {
        "pairs": len(pairs),
        "wrong_word_is_lowest": float(np.mean(hits)),
        "chance": float(np.mean([1 / len(bad.reward) for _, bad in pairs])),
        "right_summary_preferred": float(np.mean(wins)),
        "reward_of_wrong_word_minus_right_word": float(np.mean(gap)),
    }, [answer for pair in pairs[:SHOWN] for answer in pair]


def _search(out: Path, seed: int, mesh: Mesh) -> dict[str, dict[str, dict[str, float]]]:
    """Insight 2: true rewards of greedy and beam answers to new posts, before and after DPO."""
    rng = Random(f"search {seed}")
    posts = [task.make_post(rng) for _ in range(SUMMARISED)]
    results: dict[str, dict[str, dict[str, float]]] = {}
    for name in ("sft", "dpo"):
        loaded = load_model(out / name, ComputeOptions(), mesh, MeshOptions())
        prompts = [np.array(loaded.tokenizer(post.prompt)["input_ids"], np.int32) for post in posts]
        results[name] = {}
        for decoder, options in DECODERS.items():
            answers = [found[0] for found in generate(loaded, prompts, options, mesh)]
            rewards = [task.true_reward(post, answer.text) for post, answer in zip(posts, answers, strict=True)]
            best = [task.true_reward(post, task.reference_summary(post)) for post in posts]
            results[name][decoder] = {
                "true_reward": float(np.mean(rewards)),
                "best_possible": float(np.mean(best)),
                "perfect": float(np.mean(np.isclose(rewards, best))),
                "tokens": float(np.mean([len(answer.tokens) for answer in answers])),
            }
    return results


def _findings(summary: dict) -> list[str]:
    credit, search, decline = summary["credit"], summary["search"], summary["decline"]
    before, greedy, beams = search["sft"]["greedy"], search["dpo"]["greedy"], search["dpo"]["5 beams"]
    moved = "fell" if decline["chosen"] < 0 else "rose"
    return [
        f"1. Credit. In {credit['wrong_word_is_lowest']:.0%} of {credit['pairs']} summaries with one wrong word, that "
        f"word got the lowest reward of all (chance: {credit['chance']:.0%}), although training saw labels of whole "
        "answers only.",
        f"2. Search. The mean true reward of greedy summaries went from {before['true_reward']:.2f} after SFT to "
        f"{greedy['true_reward']:.2f} after DPO (best possible {greedy['best_possible']:.2f}); five beams by "
        f"likelihood reach {beams['true_reward']:.2f}, and {beams['perfect']:.0%} of their summaries are perfect "
        f"(greedy: {greedy['perfect']:.0%}).",
        f"3. Decline. On held-out pairs the implicit reward of chosen summaries {moved} from 0 to "
        f"{decline['chosen']:+.2f}, while the margin grew to {decline['margins']:+.2f} and "
        f"{decline['accuracies']:.0%} of pairs were ranked right. What counts is the margin; on samples of the "
        "reference itself, theory asks for a fall (Eq. 16).",
    ]


def _show(shown: list[ScoredResponse], search: dict, findings: list[str], out: Path, console: Console):
    console.print(Rule("Insight 1: answer-level labels, token-level credit"))
    print_heatmaps(shown, console)
    console.print(Rule("Insight 2: search by likelihood is search by reward"))
    table = Table("model", "decoder", "true reward", "best possible", "perfect", "tokens")
    for name, decoders in search.items():
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
    for finding in findings:
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
