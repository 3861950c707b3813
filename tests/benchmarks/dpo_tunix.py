"""Tunix's DPOTrainer as a worker of dpo_vs_trl.py: the same requests on stdin as dpo_peers.py, the same lines of JSON.

    python tests/benchmarks/dpo_tunix.py --model FOLDER --pairs '[FILE.npz]' [--batch 4]

Runs in an environment of its own (pip install google-tunix==0.1.7 jax==0.10.2 jsonargparse). The trainer runs its own
loop and is given batches as the parent asks for steps. Float32 with a live reference only: the model's class computes
in the type of its weights, and the trainer takes no log-probabilities computed before.
"""

import functools
import itertools
import json
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jsonargparse import auto_cli
from tunix.models.llama3 import model as llama
from tunix.models.llama3.params import create_model_from_safe_tensors
from tunix.sft.dpo.dpo_trainer import DPOTrainer, DPOTrainingConfig, TrainingInput
from worker import Turns, answering


def load_model(folder: str) -> llama.Llama3:
    """Loads the float32 weights of a Llama."""
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    rope = config.get("rope_parameters") or config  # as transformers 5 writes them, or older ones
    if config["model_type"] != "llama" or config.get("rope_scaling") or rope.get("rope_type", "default") != "default":
        sys.exit(f"{folder} is no Llama with plain rotary embeddings; Tunix's class has no others")
    # Attention of tunix 0.1.7 never hands the config's rope_theta on, so that a million would be used for every model.
    llama.apply_rope = functools.partial(llama.apply_rope, rope_theta=rope["rope_theta"])
    own = llama.ModelConfig(
        num_layers=config["num_hidden_layers"],
        vocab_size=config["vocab_size"],
        embed_dim=config["hidden_size"],
        hidden_dim=config["intermediate_size"],
        num_heads=config["num_attention_heads"],
        head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        rope_theta=rope["rope_theta"],
        norm_eps=config["rms_norm_eps"],
        weight_tying=config["tie_word_embeddings"],
    )
    return create_model_from_safe_tensors(folder, own, dtype=jnp.float32)


def pad(rows: list[np.ndarray], pad_id: int, left: bool) -> tuple[np.ndarray, np.ndarray]:
    """Pads rows to the longest: token ids and mask."""
    lengths = np.array([len(row) for row in rows])[:, None]
    columns = np.arange(lengths.max())
    mask = columns >= lengths.max() - lengths if left else columns < lengths
    ids = np.full(mask.shape, pad_id, np.int32)
    ids[mask] = np.concatenate(rows)
    return ids, mask


def read_batches(path: str, batch: int) -> list[TrainingInput]:
    """Reads whole batches of pairs, all of one shape, for the trainer compiles a program for each shape."""
    with np.load(path, allow_pickle=False) as file:
        prompts = np.split(file["prompts"], np.cumsum(file["prompt_lengths"])[:-1])
        answers = np.split(file["answers"], np.cumsum(file["answer_lengths"])[:-1])
        pad_id = int(file["pad_id"])
    prompt_ids, prompt_mask = pad(prompts, pad_id, left=True)
    ids, mask = pad(answers, pad_id, left=False)
    columns = (prompt_ids, prompt_mask, ids[::2], mask[::2], ids[1::2], mask[1::2])
    starts = range(0, len(prompts) // batch * batch, batch)
    return [TrainingInput(*(column[start : start + batch] for column in columns)) for start in starts]


class Trainer(DPOTrainer):
    """Records the losses, which the trainer reports one step late."""

    losses = ()

    def _post_process_train_step(self, aux):
        super()._post_process_train_step(aux)
        self.losses = [*self.losses, self._buffered_train_metrics.losses[-1]]

    def take_losses(self) -> list[float]:
        """Waits for the steps under way and returns the losses since the last call."""
        losses, self.losses = [float(loss) for loss in self.losses], ()
        return losses


def train(model: str, batches: Iterator[TrainingInput], batch: int, learning_rate: float, turns: Turns):
    """Trains as long as more steps are wanted."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(learning_rate, weight_decay=0.0))
    config = DPOTrainingConfig(beta=0.1, eval_every_n_steps=10**9)
    trainer = Trainer(load_model(model), load_model(model), optimizer, config)

    # Where no mesh is set, the trainer leaves this to its first step, and the second would compile once more.
    nnx.update(trainer.optimizer, jax.device_put(nnx.state(trainer.optimizer), jax.devices()[0]))

    def wanted() -> Iterator[TrainingInput]:
        more = True
        while more:
            yield next(batches)
            more = turns.wants_more(trainer.take_losses()[0], batch)

    trainer.train(wanted())


def main(model: str, pairs: list[str], batch: int = 4, learning_rate: float = 1e-6):
    """Waits for requests and trains.

    Args:
        model: Hugging Face folder of a Llama.
        pairs: Files of the pairs' tokens.
        batch: Pairs per step.
        learning_rate: Of AdamW, constant.
    """
    answers = sys.stdout
    with answering(answers):
        versions = {name: version(name) for name in ("google-tunix", "jax", "flax")}
        turns = Turns(answers, versions=versions)
        for index in turns.begun():
            train(model, itertools.cycle(read_batches(pairs[index], batch)), batch, learning_rate, turns)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
