"""Whole runs on a reward: what they learn, leave behind, and repeat."""

import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
from rich.console import Console

from qstar_jax.config import ComputeOptions, LoraOptions, MeshOptions
from qstar_jax.errors import InputError
from qstar_jax.store.open import load_model
from qstar_jax.store.references import find_beta
from qstar_jax.training.rl.run import train_rl
from qstar_jax.training.run_log import read_metrics

OBJECTIVE = {f"objective/{name}" for name in ("scores", "kl", "rlhf_reward", "non_score_reward", "entropy")}
METRICS = {
    "step",
    "loss",
    *OBJECTIVE,
    "objective/scores_stderr",
    "objective/rlhf_reward_stderr",
    "frac_reward_zero_std",
    "policy/approxkl_avg",
    "policy/clipfrac_avg",
    "val/ratio",
    "lengths/completion",
    "truncated/completion",
    "grad_norm",
    "learning_rate",
    "epoch",
}


@pytest.fixture(scope="module")
def programs():
    """Programs that were compiled so far, one entry each."""
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if "backend_compile" in event else None
    )
    return compiled


@pytest.fixture(scope="module")
def watched(tmp_path_factory, make_rl_config, tiny_rl, eval_file, programs):
    """(run folder, summary, programs compiled at each line) of a run that evaluates with each checkpoint."""
    out, at_line = tmp_path_factory.mktemp("runs") / "rl", []
    config = make_rl_config(out, data={"eval": str(eval_file)}, train={"eval_every": 2, "eval_batch_size": 4})
    return out, tiny_rl(config, watch=lambda: at_line.append(len(programs))), at_line


@pytest.fixture(scope="module")
def whole(watched):
    """(run folder, summary) of an uninterrupted run that evaluates with each checkpoint."""
    return watched[:2]


def test_run_folder_and_metric_names(whole, metric_lines):
    out, summary = whole
    names = {path.name for path in out.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "summary.json", "checkpoints", "reference"} <= names
    assert json.loads((out / "summary.json").read_text()) == summary
    training = [line for line in metric_lines(out) if "loss" in line]
    assert [line["step"] for line in training] == [0, 1, 2, 3] and all(line.keys() == METRICS for line in training)
    evaluations = [line for line in metric_lines(out) if "loss" not in line]
    assert [line["step"] for line in evaluations] == [0, 2, 4]
    assert {f"eval_{name}" for name in OBJECTIVE} <= evaluations[0].keys()
    raw = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(line["perf/samples_per_second"] > 0 for line in raw if line["step"] > 0 and "loss" in line)


def test_what_samples_earn_adds_up_and_starts_at_the_reference(whole, metric_lines):
    for line in metric_lines(whole[0]):
        prefix = "" if "loss" in line else "eval_"
        scores, kl, total = (line[f"{prefix}objective/{name}"] for name in ("scores", "kl", "rlhf_reward"))
        assert total == pytest.approx(scores - 0.05 * kl, abs=1e-5)
        if line["step"] == 0:
            assert abs(kl) < 1e-5
    # The sampler's log-probabilities are those of the training pass, at every step of one update.
    training = [line for line in metric_lines(whole[0]) if "loss" in line]
    assert all(line["policy/approxkl_avg"] < 1e-10 for line in training)
    assert training[-1]["objective/kl"] > 0.05


def test_it_learns(tmp_path, make_rl_config, tiny_rl):
    train = {"steps": 30, "batch_size": 16, "save_every": 0}
    tiny_rl(make_rl_config(tmp_path / "rl", train=train, optimizer={"learning_rate": 1e-2}))
    scores = read_metrics(tmp_path / "rl")["objective/scores"][1]
    assert np.mean(scores[:3]) < -0.2 and np.mean(scores[-5:]) > 0.8  # 1 is the maximum


def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(
    whole, tmp_path, make_rl_config, tiny_rl, eval_file, metric_lines, arrays_of
):
    out = tmp_path / "resumed"
    shutil.copytree(whole[0], out)
    shutil.rmtree(out / "checkpoints" / "4")
    config = make_rl_config(out, data={"eval": str(eval_file)}, train={"eval_every": 2, "eval_batch_size": 4})
    tiny_rl(replace(config, resume=True))
    assert metric_lines(out) == metric_lines(whole[0])
    jax.tree.map(np.testing.assert_array_equal, arrays_of(out), arrays_of(whole[0]))


PPO = {"algorithm": "ppo", "inner_epochs": 2, "minibatches": 2}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, make_rl_config, tiny_rl):
    """(configuration, run folder) of two steps of four updates of an adapter each, saved after both."""
    out = tmp_path_factory.mktemp("runs") / "adapter"
    config = make_rl_config(out, rl=PPO, lora=LoraOptions(rank=2), train={"steps": 2, "save_every": 1})
    tiny_rl(config)
    return config, out


@pytest.mark.parametrize(
    "mesh",
    [
        None,  # the adapter, on one device
        pytest.param(MeshOptions(data=2, fsdp=4, min_shard_size=64), marks=pytest.mark.slow),  # all parameters
    ],
    ids=["adapter", "mesh"],
)
def test_a_run_of_several_updates_per_step_resumes_to_the_bit(
    mesh, request, tmp_path, make_rl_config, tiny_rl, metric_lines, arrays_of
):
    if mesh is None:
        config, whole = request.getfixturevalue("adapter")
    else:
        whole = tmp_path / "whole"
        config = make_rl_config(whole, rl=PPO, mesh=mesh, train={"steps": 2, "save_every": 1, "batch_size": 16})
        tiny_rl(config)
    out = tmp_path / "resumed"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoints" / "2")
    tiny_rl(replace(config, out=str(out), resume=True))
    lines = metric_lines(out)
    assert lines == metric_lines(whole) and [line["step"] for line in lines] == [0, 1]
    jax.tree.map(np.testing.assert_array_equal, arrays_of(out), arrays_of(whole))


@pytest.mark.slow
def test_a_later_update_that_is_not_finite_is_named_and_the_state_before_the_step_kept(
    adapter, tmp_path, tiny_rl, arrays_of
):
    calls = []

    def reward(pairs):  # huge in the second minibatch of the second step, also when it is repeated
        calls.append(len(pairs))
        half = len(pairs) // 2 if len(calls) >= 2 else len(pairs)
        return [1.0 - 0.25 * len(r.split()) for _, r in pairs[:half]] + [
            3e38 * (-1) ** number for number in range(len(pairs) - half)
        ]

    config = replace(adapter[0], out=str(tmp_path / "rl"), train=replace(adapter[0].train, save_every=0))
    message = r"step 1 of .*in update 2 of 4, the gradient of .* is not finite, first in .*kept as checkpoint 1"
    with pytest.raises(FloatingPointError, match=message):
        tiny_rl(config, reward=reward)
    good = tmp_path / "good"
    shutil.copytree(adapter[1] / "checkpoints" / "1", good / "checkpoints" / "1")
    jax.tree.map(np.testing.assert_array_equal, arrays_of(tmp_path / "rl"), arrays_of(good))


def test_a_run_does_not_resume_with_another_reward(whole, make_rl_config, tiny_rl, eval_file):
    config = make_rl_config(whole[0], data={"eval": str(eval_file)}, rl={"kl_coef": 0.1})
    with pytest.raises(InputError, match=r"rl\.kl_coef was 0\.05"):
        tiny_rl(replace(config, resume=True))


def test_rewards_see_prompts_as_their_file_has_them(make_rl_config, train_file, tmp_path, on_devices):
    seen = []

    def stop(prompts):
        seen.append(prompts)
        raise InputError("seen enough")

    config = make_rl_config(tmp_path / "rl", data={"max_prompt_length": 2, "max_length": 8})
    with on_devices(1), pytest.raises(InputError, match="seen enough"):
        train_rl(config, stop, Console(quiet=True))
    rows = [json.loads(line) for line in train_file.read_text().splitlines()]
    # The policy reads a BOS token first, and of long prompts the end only.
    assert any(example.prompt_truncated for example in seen[0].dataset.examples)
    assert seen[0].texts == {row: rows[row]["prompt"] for row in range(len(rows))}


def same_numbers(lines, expected):
    assert len(lines) == len(expected)
    for line, other in zip(lines, expected, strict=True):
        assert line == pytest.approx(other, rel=2e-3, abs=2e-4)


@pytest.mark.slow
def test_a_mesh_of_eight_draws_the_same_samples_and_takes_the_same_steps(
    whole, tmp_path, make_rl_config, tiny_rl, eval_file, metric_lines
):
    mesh = MeshOptions(data=2, fsdp=2, tensor=2, min_shard_size=64)
    train = {"eval_every": 2, "eval_batch_size": 4}
    tiny_rl(make_rl_config(tmp_path / "rl", data={"eval": str(eval_file)}, train=train, mesh=mesh))
    same_numbers(metric_lines(tmp_path / "rl"), metric_lines(whole[0]))


@pytest.mark.slow
def test_ppo_with_one_update_is_rloo_in_any_layout_and_number_of_micro_batches(
    whole, tmp_path, make_rl_config, tiny_rl, metric_lines
):
    rl = {"algorithm": "ppo", "inner_epochs": 1, "minibatches": 1}
    config = make_rl_config(tmp_path / "rl", rl=rl, data={"layout": "plain"}, train={"accumulate": 2})
    tiny_rl(config)
    expected = [line for line in metric_lines(whole[0]) if "loss" in line]
    lines = metric_lines(tmp_path / "rl")
    for line in (*lines, *expected):
        line.pop("loss")  # that of REINFORCE is another number with the same gradient
    same_numbers(lines, expected)


def test_nothing_is_compiled_after_the_first_step(watched, metric_lines):
    out, _, at_line = watched
    lines = metric_lines(out)
    first = next(number for number, line in enumerate(lines) if "loss" in line)
    assert len(at_line) == len(lines) and at_line[0] > 0
    assert at_line[first + 1] == at_line[-1]


def test_ppo_updates_several_times_and_compiles_nothing_after_the_first_steps(
    whole, programs, tmp_path, make_rl_config, tiny_rl, metric_lines
):
    at_line = []
    rl = {"algorithm": "ppo", "inner_epochs": 2, "minibatches": 2, "clip_ratio": 0.01}
    config = make_rl_config(tmp_path / "rl", rl=rl, train={"accumulate": 2, "save_every": 0})
    tiny_rl(config, watch=lambda: at_line.append(len(programs)))
    assert at_line[0] > 0 and at_line[1] == at_line[3]  # of lines for steps 0 to 3
    lines = metric_lines(tmp_path / "rl")
    assert lines[0]["objective/scores"] == metric_lines(whole[0])[1]["objective/scores"]  # the same first samples
    assert lines[0]["policy/approxkl_avg"] > 1e-6 and lines[-1]["policy/clipfrac_avg"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_an_adapter_is_trained_and_every_verb_opens_it(
    devices, tmp_path, make_rl_config, tiny_rl, one_device, hf_folder
):
    size = 2 if devices == 8 else 1
    mesh = MeshOptions(data=size, fsdp=size, tensor=size, min_shard_size=64)
    config = make_rl_config(tmp_path / "rl", lora=LoraOptions(rank=2), train={"steps": 2, "save_every": 0}, mesh=mesh)
    summary = tiny_rl(config)
    assert summary["policy/approxkl_avg"] < 1e-10  # samples are drawn with the merged adapter
    base = load_model(hf_folder, ComputeOptions(), one_device, MeshOptions())
    merged = load_model(tmp_path / "rl", ComputeOptions(), one_device, MeshOptions())
    assert merged.reference == tmp_path / "rl" / "base"
    kernels = [loaded.params["layers"]["mlp"]["down"]["kernel"] for loaded in (merged, base)]
    assert np.any(kernels[0] != kernels[1])
    assert find_beta(merged, None, "rl", "--beta") == 0.05


@pytest.mark.slow
def test_advantages_that_overflow_stop_the_run_and_are_named(tmp_path, make_rl_config, tiny_rl):
    def huge(pairs):
        return [3e38 * (-1) ** number for number in range(len(pairs))]

    config = make_rl_config(tmp_path / "rl", train={"accumulate": 2})
    with pytest.raises(FloatingPointError, match=r"step 0 of .*train\.jsonl: loss .*the gradient of .* is not finite"):
        tiny_rl(config, reward=huge)
