"""Configurations of `trl dpo`, translated and run."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from qstar_jax import training
from qstar_jax.cli.main import main
from qstar_jax.config import DpoConfig, trl
from qstar_jax.config.trl import KNOWN, translate
from qstar_jax.errors import InputError


def options_of(**given):
    options, _ = translate(given)
    return {
        f"{block}.{name}": value
        for block, values in options.items()
        if isinstance(values, dict)
        for name, value in values.items()
    }


def test_every_option_of_trl_is_known():
    library = pytest.importorskip("trl")
    records = (library.DPOConfig, library.ScriptArguments, library.ModelConfig)
    assert {field.name for record in records for field in dataclasses.fields(record)} == KNOWN - {"warmup_ratio"}


def test_defaults_are_those_of_trl():
    library = pytest.importorskip("trl")
    ours, theirs = options_of(), library.DPOConfig(output_dir="x", use_cpu=True)
    for name, value in {
        "optimizer.learning_rate": theirs.learning_rate,
        "optimizer.schedule": str(theirs.lr_scheduler_type.value),
        "optimizer.warmup_steps": theirs.warmup_steps,
        "optimizer.beta2": theirs.adam_beta2,
        "optimizer.max_grad_norm": theirs.max_grad_norm,
        "train.batch_size": theirs.per_device_train_batch_size,
        "train.epochs": theirs.num_train_epochs,
        "train.seed": theirs.seed,
        "train.save_every": theirs.save_steps,
        "data.max_length": theirs.max_length,
        "loss.beta": theirs.beta,
        "loss.name": theirs.loss_type[0],
        "compute.remat": "full" if theirs.gradient_checkpointing else "none",
    }.items():
        assert ours[name] == value, name


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 8},
            {"train.batch_size": 32, "train.accumulate": 8},
        ),
        ({"max_steps": 100, "warmup_steps": 0.1}, {"train.steps": 100, "optimizer.warmup_steps": 0.1}),
        ({"warmup_ratio": 0.1, "num_train_epochs": 1}, {"train.epochs": 1.0, "optimizer.warmup_steps": 0.1}),
        ({"max_prompt_length": 256}, {"data.max_prompt_length": 256, "data.max_length": 1024}),
        ({"save_strategy": "epoch", "num_train_epochs": 4}, {"train.save_every": 0.25}),
        ({"dataset_name": "d", "eval_strategy": "epoch"}, {"data.eval": "d", "train.eval_every": 1 / 3}),
        ({"dataset_name": "d", "eval_strategy": "steps", "eval_steps": 0.1}, {"train.eval_every": 0.1}),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, {"optimizer.schedule": "cosine"}),
        ({"lr_scheduler_type": "constant_with_warmup"}, {"optimizer.schedule": "constant"}),
        (
            {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]},
            {"loss.name": ["sigmoid", "sft"], "loss.weights": [1.0, 0.2]},
        ),
        ({"loss_type": "discopop", "discopop_tau": 0.1}, {"loss.tau": 0.1}),
        (
            {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
            {"loss.divergence": "alpha_divergence", "loss.divergence_alpha": 0.7},
        ),
        ({"bf16": False, "gradient_checkpointing": False}, {"compute.dtype": "float32", "compute.remat": "none"}),
        ({"optim": "rmsprop"}, {"optimizer.name": "rmsprop"}),
        ({"dataset_name": "d", "eval_strategy": "steps", "eval_steps": 5}, {"data.eval": "d", "train.eval_every": 5}),
        (
            {"load_best_model_at_end": True, "metric_for_best_model": "eval_rewards/margins"},
            {"train.keep_best": "rewards/margins"},
        ),
        ({"sync_ref_model": True, "ref_model_sync_steps": 64}, {"reference.sync_every": 64, "reference.sync_mix": 0.6}),
        ({"precompute_ref_log_probs": True}, {"reference.mode": "cached"}),
        (
            {"use_peft": True, "lora_r": 8, "lora_target_modules": ["q_proj"]},
            {"lora.rank": 8, "lora.alpha": 32.0, "lora.targets": ["q_proj"]},
        ),
        ({"seed": 1, "data_seed": 2, "save_total_limit": 3}, {"train.seed": 2, "train.keep_checkpoints": 3}),
    ],
)
def test_options_become_ours(given, expected):
    options = options_of(**given)
    assert {name: options.get(name) for name in expected} == expected


@pytest.mark.parametrize(
    ("given", "note"),
    [
        ({"load_in_4bit": True}, "load_in_4bit True: not supported; parameters are stored as compute.param_dtype says"),
        ({"use_weighting": True}, "use_weighting True: not supported"),
        ({"trust_remote_code": True}, "trust_remote_code True: not supported"),
        ({"optim": "sgd"}, "optim sgd: not supported; adamw instead"),
        ({"deepspeed": "zero3.json"}, "deepspeed: mesh.fsdp is the number of devices that share parameters"),
        ({"label_pad_token_id": -100}, "label_pad_token_id: not read, as it does not change the numbers"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type cosine_with_min_lr: not supported; cosine"),
        ({"use_peft": True}, "lora_dropout: TRL's default is 0.05"),
        ({"fp16": True}, "fp16: bfloat16 instead"),
        ({"resume_from_checkpoint": "a/b"}, "resume_from_checkpoint a/b: --resume continues the run in --out"),
        ({"eval_strategy": "epoch", "max_steps": 9}, "eval_strategy epoch with max_steps: at the end only"),
        ({"eval_strategy": "steps", "dataset_name": __file__}, "is a file without splits: set data.eval to one"),
        (
            {"metric_for_best_model": "bleu", "load_best_model_at_end": True},
            "metric_for_best_model bleu: not supported",
        ),
    ],
)
def test_what_was_not_taken_over_is_said(given, note):
    assert any(note in said for said in translate(given)[1])
    assert not any(note in said for said in translate({})[1])


def test_a_run_is_resumed_only_where_it_lies():
    assert translate({"resume_from_checkpoint": True})[0]["resume"] is True
    assert "resume" not in translate({"resume_from_checkpoint": "a/b"})[0]


def test_the_table_of_options_is_complete():
    """Each option that is translated has a row, which names options that exist."""
    text = (Path(training.__file__).parent / "README.md").read_text(encoding="utf-8")
    table = text.split("| `trl dpo` | `qstar dpo` |")[1].split("\n\n")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", table, re.MULTILINE))
    assert rows.keys() == trl._SAME.keys() | trl._CONVERTED.keys()
    for ours in re.findall(r"`([\w.]+)`", " ".join(rows.values())):
        block = DpoConfig
        for part in ours.split("."):
            block = {field.name: field.type for field in dataclasses.fields(block)}[part]
    for name, (ours, _) in trl._SAME.items():
        assert rows[name] == f"`{ours}`"


def test_options_that_trl_does_not_have_are_refused():
    faults = (
        "--from_trl: datasets is not supported: name one dataset, with dataset_name\n"
        "--from_trl: `trl dpo` has no option 'betta' (TRL 1.16); the nearest is beta\n"
        "--from_trl: `trl dpo` has no option 'lerning_rate' (TRL 1.16); the nearest is learning_rate"
    )
    with pytest.raises(InputError, match=re.escape(faults)):
        translate({"betta": 0.1, "lerning_rate": 1, "datasets": []})


def test_a_file_of_trl_trains(tmp_path, hf_folder, train_file, eval_file, on_devices, capsys):
    given = {
        "model_name_or_path": str(hf_folder), "dataset_name": str(train_file), "output_dir": str(tmp_path / "run"),
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 2, "beta": 0.3, "bf16": False,
        "learning_rate": 1e-3, "max_length": 64, "report_to": "wandb",
    }  # fmt: skip
    path = tmp_path / "trl.yaml"
    path.write_text(yaml.safe_dump(given))
    with on_devices(1):
        words = ["--loss.beta", "0.4", "--train.reference_samples", "0", "--data.eval", str(train_file)]
        assert main(["dpo", "--from_trl", str(path), *words]) == 0
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["loss"]["beta"] == 0.4 and config["train"]["batch_size"] == 8 and config["train"]["accumulate"] == 2
    shown = capsys.readouterr()
    assert "--from_trl: report_to: metrics.jsonl, TensorBoard's files" in shown.err
    assert "warning: data.eval is data.train" in shown.out


def test_the_command_line_decides_how_long_a_run_is(tmp_path, capsys):
    path = tmp_path / "trl.yaml"
    path.write_text("model_name_or_path: m\noutput_dir: o\ndataset_name: d\n")
    with pytest.raises(SystemExit):
        main(["dpo", "--from_trl", str(path), "--train.steps", "4", "--print_config"])
    train = yaml.safe_load(capsys.readouterr().out)["train"]
    assert (train["steps"], train["epochs"]) == (4, None)


@pytest.mark.parametrize(
    ("text", "message"), [("- a", "expected options by name"), ("a: [", "not readable"), (None, "cannot be read")]
)
def test_files_that_are_none_of_trl_are_refused(text, message, tmp_path, capsys):
    path = tmp_path / "trl.yaml"
    if text is not None:
        path.write_text(text)
    assert main(["dpo", f"--from_trl={path}"]) == 2
    assert message in capsys.readouterr().err
