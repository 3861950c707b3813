"""The insight `dialogue`: a player of the game of questions, fitted to a mediocre one, and DPO on whole dialogues.

It calls what the verbs call. One run is an ablation, for which no verb has an option: it is trained on replies too.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.rule import Rule

from qstar_jax.config import (
    ComputeOptions,
    DataOptions,
    DemoConfig,
    DpoConfig,
    LossOptions,
    MeshOptions,
    OptimizerOptions,
    ReportConfig,
    ScoreConfig,
    SftConfig,
    TrainOptions,
)
from qstar_jax.data.tokenization import Example, Response
from qstar_jax.demo.pretrain import initial_params
from qstar_jax.evaluation.insights.dialogue import ALL, NOISY, PLAYER, TURNS, HeldOut, measure_dialogue
from qstar_jax.evaluation.score import score_file
from qstar_jax.models import CausalLM
from qstar_jax.report.insights import show
from qstar_jax.report.summary import write_report
from qstar_jax.sharding import make_mesh, use_mesh
from qstar_jax.store.hub import write_folder
from qstar_jax.store.open import load_model
from qstar_jax.tasks.tiny_questions import TASK
from qstar_jax.tasks.tiny_questions.game import NOISE
from qstar_jax.tasks.tiny_questions.rows import documents, lists, split_rows
from qstar_jax.tasks.tiny_questions.tokenizer import make_tokenizer
from qstar_jax.training.run import train


@dataclass(frozen=True)
class Size:
    """How much is trained and played.

    Attributes:
        lists: Steps of pretraining on lists of things.
        dialogues: Steps of SFT on dialogues of the mediocre player.
        steps: Steps of DPO.
        held_out: Pairs of dialogues whose turns are scored.
        games: Sampled games per thing.
    """

    lists: int = 400
    dialogues: int = 300
    steps: int = 150
    held_out: int = 500
    games: int = 32


BETA = 0.3
BATCH_SIZE = 64  # dialogues, or pairs of them, per step; micro-batches stay in the processor's cache, see `tour`
FIT_RATE, DPO_RATE = 4e-3, 3e-4
LENGTHS = {"max_length": 80, "max_prompt_length": 64}  # nothing is truncated
COMPUTE = ComputeOptions(attention="dense")


def run(config: DemoConfig, console: Console, size: Size | None = None) -> dict:
    """Trains and plays, writes all runs, dialogue/ and report.html, and returns its summary.json."""
    began, out, size = time.perf_counter(), Path(config.out), size or Size()
    console.print(Rule("Pretraining on what may be meant after some answers"))
    _write_random(out / "random", config.seed)
    train(_fit(out / "random", out / "base", lists, size.lists, config.seed), console)
    console.print(Rule("Supervised fine-tuning on dialogues of a mediocre player"))
    train(_fit(out / "base", out / "player", documents, size.dialogues, config.seed), console)
    for name, (folder, split, change) in _RUNS.items():
        console.print(Rule(f"{name}: {size.steps * BATCH_SIZE:,} pairs of whole dialogues, beta {BETA:g}"))
        train(_dpo(out / "player", out / folder, split, config.seed, size), console, change=change)
    console.print(Rule("What did it learn to ask?"))
    held_out = [_held_out(name, out, config.seed, size, console) for name in _RUNS]
    mesh, folders = make_mesh(), {PLAYER: "player"} | {name: folder for name, (folder, *_) in _RUNS.items()}
    with use_mesh(mesh, COMPUTE.dtype):
        record = measure_dialogue(
            {name: load_model(out / folder, COMPUTE, mesh, MeshOptions()) for name, folder in folders.items()},
            held_out,
            seed=config.seed,
            beta=BETA,
            pairs=size.steps * BATCH_SIZE,
            games_per_thing=size.games,
            out=out / "dialogue",
        )
    show(record, out / "dialogue", console)
    console.print(Rule("What it showed"))
    report = ReportConfig(out=str(out), dialogue=str(out / "dialogue"))
    return write_report(report, console, seed=config.seed, size=asdict(size), seconds=time.perf_counter() - began)


def with_replies(example: Example) -> Example:
    """Makes actions of all tokens, as if the policy had written the replies: the ablation."""

    def change(response: Response) -> Response:
        return replace(response, action_mask=np.ones_like(response.action_mask), turns=np.zeros_like(response.turns))

    return replace(example, responses=tuple(map(change, example.responses)))


# Policy -> folder of its run, split of its pairs, what becomes of their examples
_RUNS = {
    TURNS: ("turns", "train", None),
    ALL: ("replies-too", "train", with_replies),
    NOISY: ("noisy", "noisy", None),
}


def _write_random(folder: Path, seed: int):
    """Writes the random model with which everything begins: about 0.2 million parameters."""
    tokenizer = make_tokenizer("<eos>")
    keys = {
        "model_type": "llama",
        "vocab_size": len(tokenizer),
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 24,
        "max_position_embeddings": 128,
        "rope_theta": 100.0,  # dialogues have less than 64 tokens
        "tie_word_embeddings": False,
    }
    model = CausalLM.from_hf(keys)
    write_folder(folder, model, initial_params(model, seed), tokenizer, "float32")


def _fit(model: Path, out: Path, texts: Callable[[int, int, float], list[str]], steps: int, seed: int) -> SftConfig:
    """Writes texts as a file, on all of whose tokens the model is fitted: it learns to expect replies as well.

    Half of their answerers err, so that one player can be the reference for both kinds.
    """
    texts = [text for noise in (0.0, NOISE) for text in texts(steps * BATCH_SIZE // 2, seed, noise)]
    rows = [dict(zip(("prompt", "completion"), text.split("<assistant>", 1), strict=True)) for text in texts]
    path = out.with_suffix(".jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return SftConfig(
        model=str(model),
        out=str(out),
        data=DataOptions(train=str(path), layout="shared", **LENGTHS),
        compute=COMPUTE,
        optimizer=OptimizerOptions(
            learning_rate=FIT_RATE, warmup_steps=50, schedule="cosine", weight_decay=0.01, beta2=0.98, max_grad_norm=1.0
        ),
        train=TrainOptions(seed=seed, batch_size=BATCH_SIZE, accumulate=4, log_every=50),
    )


def _dpo(model: Path, out: Path, split: str, seed: int, size: Size) -> DpoConfig:
    rows = size.steps * BATCH_SIZE
    return DpoConfig(
        model=str(model),
        out=str(out),
        data=DataOptions(train=_source(seed), train_split=split, max_train_rows=rows, layout="shared", **LENGTHS),
        compute=COMPUTE,
        loss=LossOptions(beta=BETA),
        optimizer=OptimizerOptions(learning_rate=DPO_RATE, warmup_steps=10),
        train=TrainOptions(seed=seed, batch_size=BATCH_SIZE, accumulate=16, log_every=25, reference_samples=0),
    )


def _held_out(name: str, out: Path, seed: int, size: Size, console: Console) -> HeldOut:
    """Scores held-out dialogues by a policy and its reference."""
    folder, noisy = _RUNS[name][0], name == NOISY
    split = "noisy_test" if noisy else "test"
    config = ScoreConfig(
        model=str(out / folder),
        out=str(out / f"scores-{folder}"),
        batch_size=50,
        show=0,
        alternatives=0,
        compute=COMPUTE,
        data=DataOptions(eval=_source(seed), eval_split=split, max_eval_rows=size.held_out, **LENGTHS),
    )
    return HeldOut(name, split_rows(split, seed, size.held_out), score_file(config, console).responses, noisy)


def _source(seed: int) -> str:
    return f"{TASK.source}?seed={seed}"
