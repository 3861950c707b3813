"""Whole runs on a reward: what they learn, leave behind, and repeat."""

import json

import numpy as np
import pytest

from qstar_jax.training.run_log import read_metrics


@pytest.fixture(scope="module")
def whole(tmp_path_factory, make_rl_config, tiny_rl, eval_file):
    """(run folder, summary) of an uninterrupted run that evaluates with each checkpoint."""
    out = tmp_path_factory.mktemp("runs") / "rl"
    config = make_rl_config(out, data={"eval": str(eval_file)}, train={"eval_every": 2, "eval_batch_size": 4})
    return out, tiny_rl(config)


def test_run_folder_and_metric_names(whole, metric_lines):
    out, summary = whole
    assert {"config.yaml", "metrics.jsonl", "summary.json", "checkpoints", "reference"} <= {
        p.name for p in out.iterdir()
    }
    assert json.loads((out / "summary.json").read_text()) == summary
    training = [line for line in metric_lines(out) if "loss" in line]
    assert [line["step"] for line in training] == [0, 1, 2, 3]
    names = {f"objective/{name}" for name in ("scores", "kl", "rlhf_reward", "non_score_reward", "entropy")}
    assert names <= training[0].keys() and "policy/approxkl_avg" in training[0]


def test_it_learns(tmp_path, make_rl_config, tiny_rl):
    config = make_rl_config(
        tmp_path / "rl", train={"steps": 40, "batch_size": 16, "save_every": 0}, optimizer={"learning_rate": 1e-2}
    )
    tiny_rl(config)
    _, scores = read_metrics(tmp_path / "rl")["objective/scores"]
    assert np.mean(scores[-5:]) > np.mean(scores[:5]) + 0.3
