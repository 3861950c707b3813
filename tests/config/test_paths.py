from dataclasses import fields, is_dataclass
from typing import get_type_hints

import pytest

from qstar_jax import config
from qstar_jax.cli.main import VERBS, main
from qstar_jax.config.paths import check_paths
from qstar_jax.errors import InputError
from qstar_jax.store import cloud

PATHS = {
    "file", "model", "out", "reference", "base", "pairs.tuned", "pairs.untuned", "data.train", "data.eval",
    "data.chat_template", "reference.cache", "reference.guide", "judge.model", "judge.reference", "judge.prompt",
    "judge.cache", "export", "credit", "reward.model", "reward.reference", "reward.guide",
    "sweep", "decline", "control", "dialogue", "steps", "with_sft", "without_sft", "samples",
    "generations", "scores", "selection", "reasoning", "task", "diffusion", "pipeline",
    "run", "stages.model", "data.prompts",
}  # fmt: skip
# Options that are text and no path.
WORDS = {
    "right", "pattern", "step_ends",
    "prompt", "system", "split", "title", "kind", "wrong", "decode.stop", "decode.delimiters", "stop", "judge.base_url",
    "loss.name", "loss.divergence", "lora.targets", "max_shard_size", "topology", "topologies", "game",
    "log.wandb", "log.trackio", "train.profile",
    "reward.answer", "reward.extract", "reward.pattern",
    "completion", "label", "reward", "wrong_step", "step_delimiter",
    "stages.name", "stages.template", "stages.lora.targets", "data.split",
}  # fmt: skip
COLUMNS = """name train_split eval_split prompt chosen rejected completion label reward reference_rewards tools system
    date step_delimiter""".split()


@pytest.mark.parametrize(
    ("words", "option"),
    [
        ("dpo --model m --out gs://bucket/run --data.train d.jsonl", "--out gs://bucket/run"),
        ("sft --model s3://bucket/m --out o --data.train d.jsonl", "--model s3://bucket/m"),
        ("dpo --model m --out o --data.train https://host/d.jsonl", "--data.train https://host/d.jsonl"),
        ("dpo --model m --out o --data.eval hf://datasets/a/d.parquet", "--data.eval hf://"),
        ("dpo --model m --out o --reference.cache gs:/bucket", "--reference.cache gs:/bucket"),
        ("score --model m --out file:///tmp/o --data.eval d", "--out file:///tmp/o"),
        ("score --model m --reference abfss://x@y/m --out o", "--reference abfss://"),
        ("generate --model m --out gs://o --prompt http://is.a/prompt", "--out gs://o"),
        (
            'generate --model m --out o --prompt p --pairs [{"tuned":"a","untuned":"gs://b/c"}]',
            "--pairs.untuned gs://b",
        ),
        ("sweep --model [a,s3a://b/c] --out o", "--model s3a://b/c"),
        ("sweep --model a --out o --judge.cache s3://b", "--judge.cache s3://b"),
        ("decline --with_sft gs://b/run --out o", "--with_sft gs://"),
        ("report --credit gs://b/run --out o", "--credit gs://"),
        ("export --model m --out hdfs://n/m", "--out hdfs://"),
        ("demo --out gs://b/demo", "--out gs://"),
    ],
)
def test_addresses_are_found_by_name_and_no_folder_is_made(words, option, tmp_path, monkeypatch, capsys):
    def refuse(place, *_, **__):
        raise InputError(f"{place} is an address")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cloud.Place, "at", staticmethod(lambda name, address: f"--{name} {address}"))
    monkeypatch.setattr(cloud, "copy", refuse)
    monkeypatch.setattr(cloud, "Mirror", refuse)
    assert main(words.split(" ")) == 2
    message = capsys.readouterr().err
    assert option in message and "is an address" in message
    assert not list(tmp_path.iterdir())


def test_paths_hub_names_and_what_is_built_in_are_taken():
    for place in (
        "runs/x",
        "/tmp/x",
        "~/x",
        "owner/model",
        "builtin:tiny-tldr?seed=3",
        r"C:\runs",
        "C:/runs",
        "./gs:/x",
    ):
        check_paths(config.DpoConfig(model=place, out=place, data=config.DataOptions(train=place)))
    check_paths(
        config.GenerateConfig(model="m", out="o", prompt="https://host", decode=config.DecodeOptions(stop=["a://"]))
    )
    judge = config.JudgeOptions(kind="llm", model="gpt", base_url="http://localhost:8000/v1")
    check_paths(config.SweepConfig(model=["a", "b"], out="o", judge=judge))
    with pytest.raises(InputError, match=r"--judge\.reference gs://"):
        check_paths(config.SweepConfig(model="a", out="o", judge=config.JudgeOptions(reference="gs://b/c")))


def texts(options, prefix=""):
    """Dotted names of all options that can be text of any kind, and whether they are declared as paths."""
    for field in fields(options):
        kind, name = get_type_hints(options)[field.name], f"{prefix}{field.name}"
        if is_dataclass(kind):
            yield from texts(kind, f"{name}.")
        elif "GuidancePair" in str(kind):
            yield from texts(config.GuidancePair, f"{name}.")
        elif "StageOptions" in str(kind):
            yield from texts(config.StageOptions, f"{name}.")
        elif "Literal" not in str(kind) and "dict" not in str(kind) and "str" in str(kind):
            yield name, field.metadata.get("path", False)


def test_every_option_of_text_is_known_as_a_path_or_as_none():
    """So that nobody adds a path and forgets to declare it."""
    found = {text for options, _ in VERBS.values() for text in texts(options)}
    assert {name for name, is_path in found if is_path} == PATHS
    assert {name for name, is_path in found if not is_path} <= {*WORDS, *(f"data.{column}" for column in COLUMNS)}
