"""Rows beyond a model's positions, at each verb that reads rows; what is said of them is tested with the data."""

import jax
import pytest

from qstar_jax.cli.main import main
from qstar_jax.models import CausalLM
from qstar_jax.store import hub

REWARD = ["--reference", "MODEL", "--beta", "1"]
LONG = ["--rl.max_new_tokens", "5000", "--train.batch_size", "8"]
JUDGE = ["--judge.beta", "1", "--judge.batch_size", "8"]


@pytest.fixture(scope="module")
def short(tiny_tokenizer, tmp_path_factory):
    """A tiny GPT-2, whose learned positions end after four tokens."""
    sizes = {"vocab_size": 60, "n_embd": 8, "n_head": 2, "n_layer": 1, "n_positions": 4}
    model = CausalLM.from_hf({"model_type": "gpt2", **sizes})
    folder = tmp_path_factory.mktemp("short")
    hub.write_folder(folder, model, jax.jit(model.init)(jax.random.key(0)), tiny_tokenizer, "float32")
    return folder


@pytest.mark.parametrize(
    "words",
    [
        ["dpo", "--data.train", "FILE", "--train.steps", "1"],
        ["sft", "--data.train", "FILE", "--train.steps", "1"],
        ["rl", "--data.train", "FILE", "--reward.kind", "verifier", "--reward.answer", "chosen", *LONG],
        ["score", "--data.eval", "FILE", *REWARD],
        ["select", "--data.eval", "FILE", *REWARD, "--right", "chosen", "--samples", "2"],
        ["generate", "--data.eval", "FILE"],
        ["generate", "--prompt", "w1"],
        ["sweep", "--data.eval", "FILE", *REWARD, "--judge.model", "MODEL", "--judge.reference", "MODEL", *JUDGE],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_positions_that_are_learned_end(words, short, eval_file, tmp_path, one_device_only, capsys):
    names = {"FILE": str(eval_file), "MODEL": str(short)}
    words = [names.get(word, word) for word in words]
    assert main([*words, "--model", str(short), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "tokens exceed the model's context of 4 (max_position_embeddings); it has no positions beyond" in said
