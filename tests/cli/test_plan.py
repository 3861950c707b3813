import json
from pathlib import Path

import jax
import pytest

from qstar_jax.cli.main import main
from qstar_jax.plan import plan as plan_module
from qstar_jax.plan import topology as topology_module


@pytest.fixture
def model(tmp_path, tiny_config):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config))
    return str(tmp_path)


@pytest.fixture
def cpus(monkeypatch):
    for module in (plan_module, topology_module):
        monkeypatch.setattr(module, "topology_devices", lambda topology: jax.devices())


WORDS = "--data.max_length 64 --data.max_prompt_length 48 --train.batch_size 8".split()


@pytest.mark.parametrize("verb", ["dpo", "sft"])
def test_a_plan_is_printed_and_written(verb, model, cpus, tmp_path, capsys):
    out = tmp_path / "plans" / verb
    words = ["--model", model, "--topology", "v5e:2x4", "--verb", verb, "--out", str(out), *WORDS]
    assert main(["plan", *words]) == 0
    plan = json.loads((out / "plan.json").read_text())
    assert plan["fits"] and plan["changes"] == [] and plan["config"]["mesh"]["fsdp"] == -1
    printed = capsys.readouterr().out
    assert "v5e:2x4, as given: fits" in printed and "A step on v5e:2x4: 8 devices, 16.0 GiB each" in printed
    assert f"{plan['flops']['needed']:.3g}" in printed and "binds" in printed


def test_the_configurations_of_runs_are_read(model, cpus, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "data: {train: /not/there.jsonl, max_length: 64, max_prompt_length: 48}\n"
        "optimizer: {warmup_steps: 150}\ntrain: {batch_size: 4}\nmesh: {data: 4, fsdp: 1, tensor: 2}\n"
    )
    out = tmp_path / "out"
    words = ["--config", str(file), "--model", model, "--topology", "v5e:2x4", "--out", str(out)]
    assert main(["plan", *words]) == 0
    plan = json.loads((out / "plan.json").read_text())
    assert plan["config"]["mesh"]["data"] == 4 and "all-reduce" in plan["collectives"]


def test_the_model_of_an_earlier_run(dpo_run, cpus, tmp_path):
    out = tmp_path / "out"
    assert main(["plan", "--model", str(dpo_run), "--topology", "v5e:2x4", "--out", str(out), *WORDS]) == 0
    assert json.loads((out / "plan.json").read_text())["fits"]


def test_decoding_is_planned_with_the_options_of_generate(model, cpus, tmp_path, capsys):
    file = tmp_path / "generate.yaml"
    file.write_text(
        f"batch_size: 2\nreference: {model}\ndata: {{eval: /not/there.jsonl, max_prompt_length: 48}}\n"
        "decode: {method: best_of_n, num_samples: 4, rejection_interval: 3, max_new_tokens: 8, stop: [w1]}\n"
    )
    out = tmp_path / "out"
    words = ["--config", str(file), "--verb", "generate", "--model", model, "--topology", "v5e:2x4", "--out", str(out)]
    assert main(["plan", *words]) == 0
    plan = json.loads((out / "plan.json").read_text())
    assert plan["fits"] and plan["tokens"] == 2 * 8
    assert plan["config"]["decode"]["num_samples"] == 4 and plan["config"]["mesh"]["data"] == -1
    assert "loss" not in plan["config"] and plan["config"]["reference"] == model
    printed = capsys.readouterr().out
    assert "Decoding (best_of_n, 2 prompts) on v5e:2x4: 8 devices" in printed and "MFU" not in printed
    assert f"{plan['tokens_per_second']:,.0f}" in printed and "new tokens per second" in printed


@pytest.mark.parametrize(("verb", "column"), [("dpo", "expected MFU"), ("generate", "new tokens per second")])
def test_gpus_for_which_nothing_can_be_compiled_are_estimated(verb, column, model, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--model", model, "--topology", "a100-80gb:1x1x8", "--verb", verb, "--out", str(out)]
    words += WORDS if verb == "dpo" else ["--batch_size", "8"]
    assert main(["plan", *words]) == 0
    plan = json.loads((out / "plan.json").read_text())
    assert plan["estimate"] and plan["fits"] and plan["compile_seconds"] is None and plan["devices"] == 8
    printed = capsys.readouterr().out
    assert "per device, estimated" in printed and "programs cannot be compiled for this GPU" in printed
    assert column in printed and "seconds to compile" not in printed


def test_the_first_setting_that_fits_by_estimates(tmp_path, tiny_config, capsys):
    size = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128256}
    (tmp_path / "config.json").write_text(json.dumps(tiny_config | size | {"tie_word_embeddings": True}))
    out = tmp_path / "out"
    words = ["--model", str(tmp_path), "--topology", "rtx4090:1x1x1", "--out", str(out), "--train.batch_size", "2"]
    assert main(["plan", *words, "--compute.dtype", "bfloat16"]) == 0
    plan = json.loads((out / "plan.json").read_text())
    changes = ["train.accumulate 2", "compute.remat full", "reference.mode cached", "lora.rank 16"]
    assert plan["fits"] and plan["changes"] == changes
    assert plan["config"]["lora"]["rank"] == 16 and plan["config"]["compute"]["remat"] == "full"
    printed = capsys.readouterr().out
    assert "rtx4090:1x1x1, as given: does not fit" in printed and "lora.rank 16: fits" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give either --topology, such as v5e:4x4, or --topologies"),
        (["--topology", "v5e:2x2", "--topologies", "v5e"], "give either"),
        (["--topology", "v9:2x2"], "unknown topology 'v9:2x2'; expected a chip and its arrangement, such as v4"),
        (["--topologies", "v9"], "unknown chip 'v9'; expected one of v4, v5e, v5p, v6e, tpu7x, h100, h200"),
        (["--topology", "a100:1x1x8"], "unknown topology 'a100:1x1x8'; expected a chip and its arrangement"),
        (["--topology", "l4:1x1x4", "--mesh.fsdp", "3"], "does not fit 4 device(s)"),
        (["--topology", "l4:1x1x4", "--train.batch_size", "6"], "does not divide evenly over 4 devices"),
        (["--topologies", "l4", "--train.batch_size", "3", "--mesh.fsdp", "2"], "no slice of l4 suits the mesh and"),
        (["--topology", "v5e:2x4", "--train.batch_size", "12"], "does not divide evenly over 8 devices"),
        (["--topology", "v5e:2x4", "--mesh.fsdp", "3"], "does not fit 8 device"),
        (["--topology", "v5e:2x4", "--prompt_length", "64"], "a response of 0 tokens"),
        (["--topology", "v5e:2x4", "--decode.beams", "5"], "--decode.beams 5 has no effect with --verb dpo"),
        (["--topologies", "v5e", "--search", "false"], "--search false has no effect with --topologies"),
    ],
)
def test_bad_input_is_one_sentence(words, message, model, cpus, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["plan", "--model", model, "--out", str(out), *WORDS, *words]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1 and not out.exists()


def test_decoding_with_sharded_parameters_is_estimated_over_tensor_only(model, tmp_path, capsys):
    words = ["plan", "--verb", "generate", "--model", model, "--topology", "l4:1x1x4", "--out", str(tmp_path / "out")]
    assert main([*words, "--mesh.fsdp", "4"]) == 2
    assert "mesh fsdp=4: of decoding with parameters sharded so, nothing is estimated" in capsys.readouterr().err
    assert main([*words, "--mesh.tensor", "4", "--mesh.min_shard_size", "64"]) == 0


@pytest.mark.parametrize("words", [["--verb", "rl"], ["--rl.kl_coef", "0.1"], ["--config", "configs/rl_tldr.yaml"]])
def test_a_run_of_rl_is_planned_in_two_parts(words, model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(Path(plan_module.__file__).parents[2])
    with pytest.raises(SystemExit) as error:
        main(["plan", "--model", model, "--topology", "v5e:2x4", "--out", str(tmp_path / "out"), *words])
    text = capsys.readouterr().err
    assert error.value.code == 2 and "a run of rl has two programs" in text and "loss.alpha" not in text


def test_a_model_that_fits_nowhere(tmp_path, tiny_config, capsys):
    size = {"hidden_size": 65536, "intermediate_size": 262144, "num_hidden_layers": 300, "vocab_size": 256000}
    (tmp_path / "config.json").write_text(json.dumps(tiny_config | size))
    words = ["plan", "--model", str(tmp_path), "--out", str(tmp_path / "out"), "--train.batch_size", "1"]
    assert main([*words, "--topologies", "t4"]) == 2
    error = capsys.readouterr().err
    assert "no slice of t4 that suits the mesh and train.batch_size 1 holds this run; tried t4:1x1x1\n" in error
    assert main([*words, "--topology", "t4:1x1x1"]) == 2
    assert "t4:1x1x1 does not hold this run, not even with compute.remat full, reference" in capsys.readouterr().err


def test_a_run_that_fits_nowhere(model, cpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plan_module.Plan, "fits", False)
    words = ["--model", model, "--topology", "v5e:2x4", "--out", str(tmp_path / "out"), *WORDS]
    assert main(["plan", *words, "--lora.rank", "2", "--compute.remat", "full"]) == 2
    assert "v5e:2x4 does not hold this run, not even with compute.param_dtype bfloat16;" in capsys.readouterr().err
