"""Rows beyond a model's positions, at each verb that reads rows; what is said of them is tested with the data."""

import json
import shutil

import pytest

from qstar_jax.cli.main import main
from qstar_jax.models import llama

REWARD = ["--reference", "MODEL", "--beta", "1"]
JUDGE = ["--judge.beta", "1", "--judge.batch_size", "8"]


@pytest.fixture(scope="module")
def short(hf_folder, tmp_path_factory):
    """The tiny model, made for four tokens."""
    folder = shutil.copytree(hf_folder, tmp_path_factory.mktemp("short") / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4}))
    return folder


@pytest.mark.parametrize(
    "words",
    [
        ["dpo", "--data.train", "FILE", "--train.steps", "1"],
        ["sft", "--data.train", "FILE", "--train.steps", "1"],
        ["score", "--data.eval", "FILE", *REWARD],
        ["generate", "--data.eval", "FILE"],
        ["generate", "--prompt", "w1"],
        ["sweep", "--data.eval", "FILE", *REWARD, "--judge.model", "MODEL", "--judge.reference", "MODEL", *JUDGE],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_positions_that_are_learned_end(words, short, eval_file, tmp_path, one_device_only, monkeypatch, capsys):
    monkeypatch.setattr(llama, "POSITIONS", "learned")
    names = {"FILE": str(eval_file), "MODEL": str(short)}
    words = [names.get(word, word) for word in words]
    assert main([*words, "--model", str(short), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "and the model was made for 4 (max_position_embeddings); it has no positions beyond" in said
