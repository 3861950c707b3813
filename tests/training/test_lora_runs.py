"""Runs that train an adapter: the reference is the base, checkpoints hold the adapter, every verb reads them."""

import json
import math
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
from rich.console import Console

from qstar_jax.cli.main import main
from qstar_jax.config import ComputeOptions, LoraOptions, LossOptions, MeshOptions, ReferenceOptions
from qstar_jax.errors import InputError
from qstar_jax.store.checkpoints import BASE
from qstar_jax.store.open import load_model
from qstar_jax.training import run as run_module
from qstar_jax.training.plan import make_plan
from qstar_jax.training.setup import with_adapter

LORA = LoraOptions(rank=4)


@pytest.fixture(scope="module")
def lora_config(make_config):
    """As `make_config`, of four steps and with an adapter."""

    def make(out, verb="dpo", **changes):
        changes = {"lora": LORA, **changes, "train": {"steps": 4, **changes.get("train", {})}}
        return make_config(out, verb, **changes)

    return make


@pytest.fixture(scope="module")
def evaluated(eval_file):
    return {"data": {"eval": str(eval_file)}, "train": {"eval_every": 2, "eval_batch_size": 4}}


@pytest.fixture(scope="module")
def run(tmp_path_factory, lora_config, tiny_train, evaluated):
    out = tmp_path_factory.mktemp("lora") / "run"
    return out, tiny_train(lora_config(out, **evaluated))


def losses_of(metric_lines, out):
    return [line["loss"] for line in metric_lines(out) if "loss" in line]


def test_the_reference_is_the_base_and_the_start_its_equal(run, metric_lines, hf_folder, one_device):
    out, summary = run
    losses = losses_of(metric_lines, out)
    assert abs(losses[0] - math.log(2)) < 1e-6 and losses[-1] < losses[0] - 1e-3
    assert summary["before_eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    names = {path.name for path in out.iterdir()}
    assert BASE in names and "reference" not in names
    base = load_model(hf_folder, ComputeOptions(), one_device, MeshOptions())
    stored = load_model(out / BASE, ComputeOptions(), one_device, MeshOptions())
    jax.tree.map(np.testing.assert_array_equal, stored.params, base.params)
    merged = load_model(out, ComputeOptions(), one_device, MeshOptions())
    assert merged.model == base.model and merged.reference == out / BASE
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), merged.params, base.params)
    assert moved["layers"]["attention"]["q"]["kernel"] and moved["layers"]["mlp"]["down"]["kernel"]
    assert not moved["embed"]["embedding"] and not moved["norm"]["scale"]


def test_resuming_changes_no_number(run, evaluated, lora_config, tiny_train, tmp_path, metric_lines, arrays_of):
    config = lora_config(tmp_path / "run", **evaluated)
    shutil.copytree(run[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    tiny_train(replace(config, resume=True))
    assert metric_lines(tmp_path / "run") == metric_lines(run[0])
    jax.tree.map(np.testing.assert_array_equal, arrays_of(tmp_path / "run"), arrays_of(run[0]))


def test_a_base_that_was_exchanged_is_noticed(run, evaluated, lora_config, tiny_train, tmp_path, one_device):
    out = tmp_path / "run"
    shutil.copytree(run[0], out)
    shutil.rmtree(out / "checkpoints" / "4")
    other = {"lora": LoraOptions(), "train": {"steps": 1, "save_every": 0}}
    tiny_train(lora_config(tmp_path / "other", **other))
    shutil.rmtree(out / BASE)
    shutil.copytree(tmp_path / "other" / "checkpoints" / "1", out / BASE)  # whole, with its checksums
    with pytest.raises(InputError, match=r"base has changed since the run began"):
        tiny_train(replace(lora_config(out, **evaluated), resume=True))
    with pytest.raises(
        InputError, match=r"base has changed since the run began.* open another run"
    ):  # by any other verb
        load_model(out, ComputeOptions(), one_device, MeshOptions())


@pytest.mark.thin("cached")
@pytest.mark.parametrize("mode", ["live", "cached"])
def test_every_kind_of_reference_gives_the_same_run(mode, run, lora_config, tiny_train, tmp_path, metric_lines):
    reference = ReferenceOptions(mode=mode, cache=str(tmp_path / "cache") if mode == "cached" else None)
    tiny_train(lora_config(tmp_path / "run", reference=reference, train={"save_every": 0}))
    np.testing.assert_allclose(losses_of(metric_lines, tmp_path / "run"), losses_of(metric_lines, run[0]), rtol=1e-5)


def test_each_option_reaches_the_model(tiny_model):
    """What rank, alpha and targets do to the numbers is tested with the model."""
    assert with_adapter(tiny_model, LoraOptions()) == tiny_model
    usual = with_adapter(tiny_model, LORA).lora
    assert (usual.rank, usual.alpha, usual.targets) == (4, 8.0, tuple(tiny_model.linear_layers))
    other = with_adapter(tiny_model, LoraOptions(rank=2, alpha=1.0, targets=["v_proj", "q_proj"])).lora
    assert (other.rank, other.alpha, other.targets) == (2, 1.0, ("q_proj", "v_proj"))


@pytest.mark.slow
def test_eight_devices_are_one(run, lora_config, tiny_train, tmp_path, metric_lines):
    mesh = MeshOptions(data=2, fsdp=2, tensor=2, min_shard_size=64)
    tiny_train(lora_config(tmp_path / "run", mesh=mesh, train={"save_every": 0}))
    np.testing.assert_allclose(losses_of(metric_lines, tmp_path / "run"), losses_of(metric_lines, run[0]), rtol=1e-5)


@pytest.mark.slow
def test_sft_trains_an_adapter_too(lora_config, evaluated, tiny_train, tmp_path, one_device):
    out = tmp_path / "run"
    summary = tiny_train(lora_config(out, "sft", compute=ComputeOptions(param_dtype="bfloat16"), **evaluated))
    assert summary["eval_loss"] < summary["before_eval_loss"]
    loaded = load_model(out, ComputeOptions(), one_device, MeshOptions())
    assert loaded.reference is None and (out / BASE).is_dir()


@pytest.mark.slow
def test_micro_batches(run, lora_config, tiny_train, tmp_path, metric_lines):
    tiny_train(lora_config(tmp_path / "run", train={"accumulate": 4, "save_every": 0}))
    np.testing.assert_allclose(losses_of(metric_lines, tmp_path / "run"), losses_of(metric_lines, run[0]), rtol=1e-4)


def test_score_takes_the_base_as_reference(run, tmp_path, eval_file, monkeypatch, one_device_only):
    words = ["score", "--model", run[0], "--out", tmp_path, "--data.eval", eval_file, "--show", "0"]
    assert main([str(word) for word in words]) == 0
    line = json.loads((tmp_path / "scores.jsonl").read_text().splitlines()[0])
    assert any(abs(token) > 1e-4 for token in line["reward"])


def test_export_writes_the_model_and_the_adapter(run, tmp_path, hf_folder, one_device, one_device_only, capsys):
    merged = load_model(run[0], ComputeOptions(), one_device, MeshOptions())
    tokens = np.random.default_rng(0).integers(3, 60, (2, 9)).astype(np.int32)
    expected = merged.model.logits(merged.params, tokens)
    for part in ("model", "adapter"):
        out = tmp_path / part
        assert main(["export", "--model", str(run[0]), "--out", str(out), "--part", part]) == 0
        loaded = load_model(out, ComputeOptions(), one_device, MeshOptions())
        np.testing.assert_allclose(loaded.model.logits(loaded.params, tokens), expected, atol=1e-5)
        assert main(["export", "--model", str(run[0]), "--out", str(out), "--part", part]) == 2
    assert "already holds a model" in capsys.readouterr().err
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        hf_folder
    )
    named = tmp_path / "named"
    assert (
        main(["export", "--model", str(run[0]), "--out", str(named), "--part", "adapter", "--base", "some/model"]) == 0
    )
    assert json.loads((named / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/model"


def test_export_refuses_what_it_cannot_write(run, tmp_path, hf_folder, one_device_only, capsys):
    assert main(["export", "--model", str(hf_folder), "--out", str(tmp_path / "a"), "--part", "adapter"]) == 2
    assert "holds no adapter" in capsys.readouterr().err
    assert main(["export", "--model", str(hf_folder), "--out", str(tmp_path / "a"), "--base", "x"]) == 2
    assert "--part adapter" in capsys.readouterr().err
    assert (
        main(
            ["export", "--model", str(run[0]), "--out", str(tmp_path / "a"), "--part", "adapter", "--base", str(run[0])]
        )
        == 2
    )
    assert "which PEFT cannot open" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_export_in_half_precision(run, tmp_path, one_device_only):
    assert main(["export", "--model", str(run[0]), "--out", str(tmp_path / "a"), "--dtype", "bfloat16"]) == 0
    assert json.loads((tmp_path / "a" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": LoraOptions(alpha=8.0)}, r"lora\.alpha has no effect without an adapter; set lora\.rank"),
        ({"lora": LoraOptions(targets=["q_proj"])}, r"lora\.targets has no effect"),
        ({"lora": LoraOptions(rank=-1)}, r"lora: .*at least 1 \(found: -1\)"),
        ({"lora": LoraOptions(rank=2, targets=["query"])}, r"lora: .*found: 'query'"),
        ({"reference": ReferenceOptions(mode="adapter")}, r"reference\.mode adapter .*set lora\.rank"),
        ({"reference": ReferenceOptions(mode="none")}, r"reference\.mode is none, and sigmoid.* compares"),
        ({"reference": ReferenceOptions(sync_mix=0.5)}, r"sync_mix has no effect without reference\.sync_every"),
        ({"reference": ReferenceOptions(sync_every=2, sync_mix=1.5)}, r"sync_mix above 0 and at most 1"),
        ({"reference": ReferenceOptions(sync_every=2), "lora": LORA}, r"moves the parameters of a live reference"),
        ({"reference": ReferenceOptions(mode="cached", sync_every=2)}, r"found: mode cached"),
        (
            {"loss": LossOptions(name="simpo"), "reference": ReferenceOptions(mode="live")},
            r"reference\.mode is live, and simpo.* has no reference",
        ),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(changes, message, make_config, tiny_train, tmp_path):
    with pytest.raises(InputError, match=message):
        tiny_train(make_config(tmp_path / "run", **changes))


def test_auto_says_what_it_took(make_config, tmp_path, monkeypatch):
    """The resolved mode stands in config.yaml."""
    for changes, mode in (({}, "live"), ({"lora": LORA}, "adapter"), ({"loss": LossOptions(name="simpo")}, "none")):
        assert make_plan(make_config(tmp_path, **changes)).config.reference.mode == mode


def test_a_reference_that_moves_with_each_step(make_config, tiny_train, tmp_path, metric_lines, evaluated):
    """With a whole step of the reference after each one of the policy, every loss is that of equal models."""
    always = ReferenceOptions(sync_every=1)
    tiny_train(make_config(tmp_path / "always", reference=always, **evaluated))
    assert np.allclose(losses_of(metric_lines, tmp_path / "always"), math.log(2), atol=1e-6)
    found = [line["eval_loss"] for line in metric_lines(tmp_path / "always") if "eval_loss" in line]
    assert np.allclose(found, math.log(2), atol=1e-6)  # evaluation is beside the reference as it is now


@pytest.mark.slow
def test_a_moving_reference_is_resumed_where_it_was(make_config, tiny_train, tmp_path, metric_lines):
    half = ReferenceOptions(sync_every=2, sync_mix=0.5)
    config = make_config(tmp_path / "half", reference=half, train={"keep_checkpoints": 9})
    tiny_train(config)
    halfway = losses_of(metric_lines, tmp_path / "half")
    for step in ("4", "6"):
        shutil.rmtree(tmp_path / "half" / "checkpoints" / step)
    tiny_train(replace(config, resume=True))
    assert losses_of(metric_lines, tmp_path / "half") == halfway


def test_the_terminal_says_which_loss(make_config, tmp_path, capsys):
    """`Console` reaches the run: what is resolved is shown before anything is loaded."""
    config = replace(make_config(tmp_path, lora=LoraOptions(rank=-1)))
    with pytest.raises(InputError):
        run_module.train(config, Console(width=200))
    assert "loss: sigmoid" in capsys.readouterr().out
