import json
from dataclasses import replace

import pytest

from qstar_jax.config import (
    DataOptions,
    DecodeOptions,
    LoraOptions,
    LossOptions,
    MeshOptions,
    OptimizerOptions,
    PlanConfig,
    ReferenceOptions,
    TrainOptions,
)
from qstar_jax.config.plan import PlanMeshOptions
from qstar_jax.config.verbs import GuidancePair
from qstar_jax.errors import InputError
from qstar_jax.plan.options import check_options, examples_of, lengths_of, mesh_options, read_models


@pytest.fixture
def config(tmp_path, tiny_config):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config))
    data = DataOptions(max_length=64, max_prompt_length=48)
    return PlanConfig(model=str(tmp_path), out=str(tmp_path / "plan"), topology="v5e:2x2", data=data)


@pytest.mark.parametrize(
    ("prompt", "response", "expected"), [(None, None, (48, 16)), (10, None, (10, 54)), (10, 5, (10, 5))]
)
def test_lengths(config, prompt, response, expected):
    config = replace(config, prompt_length=prompt, response_length=response)
    example = examples_of(config)[0]
    assert lengths_of(config) == (len(example.prompt), len(example.responses[0].ids)) == expected


def test_lengths_that_leave_nothing_and_lengths_beyond_the_context(config):
    with pytest.raises(InputError, match="a prompt of 64 and a response of 0 tokens"):
        check_options(replace(config, prompt_length=64))
    with pytest.raises(InputError, match="a prompt of 0 tokens: expected at least 1"):
        check_options(replace(config, verb="generate", prompt_length=0))
    assert check_options(config) is None
    assert "exceed the model's context of 256" in check_options(replace(config, prompt_length=300, response_length=8))
    warning = check_options(replace(config, verb="generate", decode=DecodeOptions(max_new_tokens=250)))
    assert "a prompt and 250 new tokens: 298 tokens exceed the model's context of 256" in warning


@pytest.mark.parametrize(
    ("verb", "given", "named"),
    [
        ("dpo", {"decode": DecodeOptions(method="beam")}, "decode.method beam"),
        ("dpo", {"batch_size": 8}, "batch_size 8"),
        ("dpo", {"pairs": [GuidancePair("a", "b")]}, "pairs"),
        ("dpo", {"reference": "folder"}, "reference folder"),
        ("dpo", {"resume": True}, "resume True"),
        ("sft", {"loss": LossOptions(beta=0.2)}, "loss.beta 0.2"),
        ("sft", {"reference": ReferenceOptions(mode="cached")}, "reference.mode cached"),
        ("sft", {"decode": DecodeOptions(max_new_tokens=7)}, "decode.max_new_tokens 7"),
        ("generate", {"loss": LossOptions(name="ipo")}, "loss.name ipo"),
        ("generate", {"train": TrainOptions(batch_size=8)}, "train.batch_size 8"),
        ("generate", {"optimizer": OptimizerOptions(name="lion")}, "optimizer.name lion"),
        ("generate", {"lora": LoraOptions(rank=4)}, "lora.rank 4"),
        ("generate", {"reference": ReferenceOptions(mode="cached")}, "reference.mode cached"),
        ("generate", {"response_length": 9}, "response_length 9"),
    ],
)
def test_options_of_other_verbs_are_refused_by_name(config, verb, given, named):
    with pytest.raises(InputError, match=f"--{named}.* has no effect with --verb {verb}; leave it out"):
        check_options(replace(config, verb=verb, **given))


def test_options_that_exclude_each_other(config):
    for topologies in ({"topology": None}, {"topologies": "v5e"}):
        with pytest.raises(InputError, match="give either --topology, such as v5e:4x4, or --topologies, such as v5e"):
            check_options(replace(config, **topologies))
    with pytest.raises(InputError, match="--search false has no effect with --topologies"):
        check_options(replace(config, topology=None, topologies="v5e", search=False))
    with pytest.raises(InputError, match=r"--optimizer\.warmup_steps is nan; expected a number in \[0, inf\)"):
        check_options(replace(config, optimizer=OptimizerOptions(warmup_steps=float("nan"))))
    with pytest.raises(InputError, match="--reference x has no effect with method greedy"):
        check_options(replace(config, verb="generate", reference="x"))
    with pytest.raises(InputError, match="--batch_size 0: expected at least 1"):
        check_options(replace(config, verb="generate", batch_size=0))
    with pytest.raises(InputError, match="decode: beams 3 has no effect with method greedy"):
        check_options(replace(config, verb="generate", decode=DecodeOptions(beams=3)))


@pytest.mark.parametrize(
    ("verb", "given", "expected"),
    [
        ("dpo", {}, (1, -1, 1)),
        ("dpo", {"tensor": 2}, (1, -1, 2)),
        ("dpo", {"fsdp": 4}, (-1, 4, 1)),
        ("dpo", {"data": -1}, (-1, 1, 1)),
        ("dpo", {"data": 2, "fsdp": 4}, (2, 4, 1)),
        ("sft", {}, (1, -1, 1)),
        ("generate", {}, (-1, 1, 1)),
        ("generate", {"tensor": 4}, (-1, 1, 4)),
        ("generate", {"data": 1}, (1, -1, 1)),
        ("generate", {"tensor": -1}, (1, 1, -1)),
    ],
)
def test_the_mesh_of_each_verb(config, verb, given, expected):
    mesh = PlanMeshOptions(min_shard_size=64, **given)
    options = mesh_options(replace(config, verb=verb, mesh=mesh))
    assert (options.data, options.fsdp, options.tensor) == expected
    assert type(options) is MeshOptions and options.min_shard_size == 64


def test_models_beside_the_policy(config, tmp_path, tiny_config):
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(tiny_config | {"num_hidden_layers": 3}))
    rewarded = replace(config, verb="generate", decode=DecodeOptions(method="best_of_n"))
    assert [model.config.num_hidden_layers for model in read_models(rewarded)] == [2, 2]
    assert [model.config.num_hidden_layers for model in read_models(replace(rewarded, reference=str(other)))] == [2, 3]
    pairs = replace(config, verb="generate", pairs=[GuidancePair(str(other), str(tmp_path))])
    assert [model.config.num_hidden_layers for model in read_models(pairs)] == [2, 3, 2]
    (other / "config.json").write_text(json.dumps(tiny_config | {"vocab_size": 100}))
    with pytest.raises(InputError, match=r"other has a vocabulary of 100 tokens, .* one of 60 .*need the same"):
        read_models(pairs)
    shared = replace(pairs, decode=DecodeOptions(vocabulary=60))
    assert [model.config.vocab_size for model in read_models(shared)] == [60, 100, 60]
