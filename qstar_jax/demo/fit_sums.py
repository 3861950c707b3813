"""The base model of the task tiny-sums, fitted to its solver, slips included.

`python -m qstar_jax.demo.fit_sums OUT` rebuilds the folder that ships in the package, `qstar_jax/tasks/tiny_sums/base`.
"""

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from qstar_jax.config import ComputeOptions, DataOptions, MeshOptions, OptimizerOptions, SftConfig, TrainOptions
from qstar_jax.demo.pretrain import initial_params, weights_hash
from qstar_jax.models import CausalLM
from qstar_jax.sharding import make_mesh
from qstar_jax.store.files import write_json
from qstar_jax.store.hub import write_folder
from qstar_jax.store.open import load_model
from qstar_jax.tasks.tiny_sums import TASK
from qstar_jax.tasks.tiny_sums.tokenizer import make_tokenizer
from qstar_jax.training.run import train

STEPS, BATCH_SIZE, SEED = 800, 64, 0
LENGTHS = {"max_length": 64, "max_prompt_length": 16}  # nothing is truncated
OPTIMIZER = OptimizerOptions(
    learning_rate=4e-3, warmup_steps=20, schedule="cosine", weight_decay=0.01, beta2=0.98, max_grad_norm=1.0
)


def fit(out: Path, *, seed: int = SEED, steps: int = STEPS, console: Console | None = None) -> Path:
    """Fits a random model to solutions.

    Args:
        out: Folder for the run, with the finished model in `out/base` (fit.json there: seed, steps, versions and the
            SHA-256 of the weights).
        seed: Random seed of the parameters, the solutions and their order.
        steps: Length of the run.
        console: Where to show progress.

    Returns:
        The folder of the finished model.
    """
    tokenizer = make_tokenizer()
    model = CausalLM.from_hf(_shape(len(tokenizer)))
    write_folder(out / "random", model, initial_params(model, seed), tokenizer, "float32")
    summary = train(_config(out, seed, steps), console)
    trained = load_model(out / "run", ComputeOptions(), make_mesh(), MeshOptions())
    write_folder(out / "base", model, trained.params, tokenizer, "bfloat16")
    record = {
        "command": "python -m qstar_jax.demo.fit_sums OUT",
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(trained.params)),
        "batch_size": BATCH_SIZE,
        "seed": seed,
        "steps": steps,
        "final_loss": summary["loss"],
        "sha256": weights_hash(out / "base"),
        "versions": {package: version(package) for package in ("jax", "jaxlib", "flax", "optax")},
    }
    write_json(out / "base" / "fit.json", record)
    return out / "base"


def _shape(vocab_size: int) -> dict[str, Any]:
    """Returns the config.json: about 0.1 million parameters."""
    return {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "rope_theta": 100.0,  # solutions have less than 64 tokens
        "tie_word_embeddings": False,
    }


def _config(out: Path, seed: int, steps: int) -> SftConfig:
    data = DataOptions(
        train=f"{TASK.source}?seed={seed}",
        train_split="solutions",
        max_train_rows=steps * BATCH_SIZE,
        layout="shared",
        **LENGTHS,
    )
    return SftConfig(
        model=str(out / "random"),
        out=str(out / "run"),
        data=data,
        compute=ComputeOptions(attention="dense"),
        optimizer=OPTIMIZER,
        train=TrainOptions(seed=seed, batch_size=BATCH_SIZE, steps=steps, log_every=50),
    )


if __name__ == "__main__":
    fit(Path(sys.argv[1]), console=Console())
