"""The files in configs/ are runs that can be started: every option is read, and all of them fit together."""

from dataclasses import asdict
from pathlib import Path

import jax
import pytest
import yaml

from qstar_jax.cli.main import main
from qstar_jax.data.tokenization import tokenize
from qstar_jax.sharding import make_mesh
from qstar_jax.training.optimizers import make_optimizer
from qstar_jax.training.plan import make_plan

PATHS = {path.stem: path for path in sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))}
MODELS = {
    "sft_tldr": "EleutherAI/pythia-2.8b",
    "dpo_tldr": "runs/sft_tldr",
    "dpo_qwen3": "Qwen/Qwen3-4B",
    "dpo_gemma3": "google/gemma-3-4b-it",
    "dpo_llama3": "meta-llama/Llama-3.1-8B-Instruct",
}


@pytest.fixture
def options(monkeypatch):
    """`options(name)`: what the verb with which the file's name begins makes of it; nothing is run."""

    def read(name):
        seen, verb = [], name.partition("_")[0]
        monkeypatch.setattr(f"qstar_jax.cli.{verb}.run", seen.append)
        given = yaml.safe_load(PATHS[name].read_text())
        needed = ("out",) if verb == "pipeline" else ("model", "out")
        words = [word for key in needed if key not in given for word in (f"--{key}", key)]
        assert main([verb, "--config", str(PATHS[name]), *words]) == 0
        return given, seen[0]

    return read


def assert_holds(found: dict, given: dict):
    for name, value in given.items():
        if isinstance(value, dict) and name != "chat_template_kwargs":
            assert_holds(found[name], value)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for part, given_part in zip(found[name], value, strict=True):
                assert_holds(part, given_part)
        else:
            assert found[name] == value, name


@pytest.mark.parametrize("name", PATHS)
def test_each_is_read_by_the_verb_that_its_name_begins_with(name, options):
    given, found = options(name)
    assert_holds(asdict(found), given)


def test_those_of_known_models_are_there():
    assert MODELS.keys() <= PATHS.keys()


@pytest.mark.parametrize("name", MODELS)
def test_those_of_known_models_are_complete_and_fit_eight_devices(name, options, tiny_tokenizer):
    _, found = options(name)
    assert found.model == MODELS[name] and found.out == f"runs/{name}"
    assert found.data.train and found.data.eval and found.train.save_every
    assert tokenize([], tiny_tokenizer, found.data) == ([], [])  # the lengths leave room for answers
    mesh = make_mesh(found.mesh, jax.devices()[:8])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 8, "tensor": 1}
    for rows in (
        found.train.batch_size / found.train.accumulate,
        found.train.eval_batch_size or found.train.batch_size,
    ):
        assert rows % 8 == 0
    assert make_optimizer(found.optimizer, 1000)
    if name.startswith("dpo"):
        assert "beta=0.1" in make_plan(found).objective.description
