"""The base model of the demo, pretrained on the language of its task.

`python -m qstar_jax.demo.pretrain OUT` rebuilds the folder that ships in the package, `qstar_jax/tasks/tiny_tldr/base`.
"""

import hashlib
import json
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from rich.console import Console

from qstar_jax.config import ComputeOptions, DataOptions, MeshOptions, OptimizerOptions, SftConfig, TrainOptions
from qstar_jax.models import CausalLM
from qstar_jax.models.causal_lm import Params
from qstar_jax.sharding import make_mesh
from qstar_jax.store.files import write_json
from qstar_jax.store.hub import write_folder
from qstar_jax.store.open import load_model
from qstar_jax.tasks.tiny_tldr.rows import documents, split_rows
from qstar_jax.tasks.tiny_tldr.tokenizer import train_tokenizer
from qstar_jax.training.run import train

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STEPS, BATCH_SIZE, SEED = 1600, 32, 0
EMBEDDING_SCALE = 0.3  # standard deviation; with the default of 1 / sqrt(128) it learns to copy facts much later
OPTIMIZER = OptimizerOptions(
    learning_rate=3e-3, warmup_steps=100, schedule="cosine", weight_decay=0.1, beta2=0.98, max_grad_norm=1.0
)


def base_config(vocab_size: int) -> dict[str, Any]:
    """Returns the config.json of the base model: about 0.4 million parameters."""
    return {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    }


def initial_params(model: CausalLM, seed: int) -> Params:
    """Draws the parameters from which pretraining begins."""
    params = model.init(jax.random.key(seed))
    width, layers = model.config.hidden_size, model.config.num_hidden_layers
    params["embed"]["embedding"] *= EMBEDDING_SCALE * width**0.5
    for part, name in (("attention", "o"), ("mlp", "down")):  # what a layer adds to the stream starts small
        params["layers"][part][name]["kernel"] *= (2 * layers) ** -0.5
    return params


def pretrain(out: Path, *, seed: int = SEED, steps: int = STEPS, console: Console | None = None) -> Path:
    """Pretrains the base model from random parameters.

    Args:
        out: Folder for the run, with the finished model in `out/base` (config.json, model.safetensors in bfloat16,
            tokenizer, and pretraining.json: seed, steps, versions and the SHA-256 of the weights).
        seed: Random seed of documents, parameters and data order.
        steps: Length of the run.
        console: Where to show progress.

    Returns:
        The folder of the finished model.
    """
    out.mkdir(parents=True, exist_ok=True)
    rows = documents(BATCH_SIZE * steps, seed)
    tokenizer = train_tokenizer(_texts(rows, seed))
    model = CausalLM.from_hf(base_config(len(tokenizer)))
    write_folder(out / "random", model, initial_params(model, seed), tokenizer, "float32")
    with (out / "documents.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    config = SftConfig(
        model=str(out / "random"),
        out=str(out / "run"),
        data=DataOptions(train=str(out / "documents.jsonl"), max_length=192, max_prompt_length=64, row_length=288),
        optimizer=OPTIMIZER,
        train=TrainOptions(steps=steps, batch_size=BATCH_SIZE, seed=seed, log_every=50),
    )
    summary = train(config, console)
    _write_base(out, model, tokenizer, {"seed": seed, "steps": steps, "final_loss": summary["loss"]})
    return out / "base"


def _texts(documents: list[dict], seed: int) -> list[str]:
    """Returns texts to train the tokenizer on: the language without its headings, and summaries for their words."""
    told = [re.sub(r"\n[A-Z;]+:", "\n", row["completion"]) for row in documents[:10_000]]
    return told + [row["chosen"] for row in split_rows("train", seed)]


def _write_base(out: Path, model: CausalLM, tokenizer: "PreTrainedTokenizerBase", record: dict):
    trained = load_model(out / "run", ComputeOptions(), make_mesh(), MeshOptions())
    write_folder(out / "base", model, trained.params, tokenizer, "bfloat16")
    record = {
        "command": "python -m qstar_jax.demo.pretrain OUT",
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(trained.params)),
        "batch_size": BATCH_SIZE,
        **record,
        "sha256": weights_hash(out / "base"),
        "versions": {package: version(package) for package in ("jax", "jaxlib", "flax", "optax")},
    }
    write_json(out / "base" / "pretraining.json", record)


def weights_hash(folder: Path) -> str:
    """Returns the SHA-256 of a folder's model.safetensors."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


if __name__ == "__main__":
    pretrain(Path(sys.argv[1]), console=Console())
