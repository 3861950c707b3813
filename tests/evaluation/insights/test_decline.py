import json

import pytest
import yaml

from qstar_jax.errors import InputError
from qstar_jax.evaluation.insights.decline import Decline, decline_run


def write_run(folder, lines, loss=None, verdict="it fell"):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text(yaml.safe_dump({"loss": loss or {"name": "sigmoid", "beta": 0.2}}))
    (folder / "summary.json").write_text(json.dumps({"verdict": verdict}))
    return folder


def evaluation(step, chosen, error=0.01):
    return {
        "step": step,
        "eval_rewards/chosen": chosen,
        "eval_rewards/chosen_stderr": error,
        "eval_rewards/rejected": chosen - step,
        "eval_rewards/margins": float(step),
        "eval_rewards/reference_expected": -0.5 * step,
        "eval_rewards/reference_expected_stderr": 0.1,
    }


def test_held_out_curves_come_first(tmp_path):
    lines = [
        {"step": 0, "rewards/chosen": 9.0},
        evaluation(0, 0.0),
        {"step": 5, "rewards/chosen": 9.0},
        evaluation(10, -1.0),
    ]
    found = decline_run("a run", write_run(tmp_path / "run", lines))
    assert found.held_out and found.beta == 0.2 and found.verdict == "it fell"
    assert found.steps == [0, 10]
    assert found.curves == {
        "chosen": [0.0, -1.0],
        "rejected": [0.0, -11.0],
        "margin": [0.0, 10.0],
        "reference": [0, -5],
    }
    assert found.stderr == {"chosen": [0.01, 0.01], "reference": [0.1, 0.1]}


def test_a_run_without_evaluation_shows_its_training(tmp_path):
    lines = [
        {"step": s, "rewards/chosen": -0.1 * s, "rewards/rejected": -s, "rewards/margins": 0.9 * s} for s in range(3)
    ]
    found = decline_run("a run", write_run(tmp_path / "run", lines))
    assert not found.held_out and "reference" not in found.curves and found.steps == [0, 1, 2]


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"no metrics\.jsonl; expected the folder of a run of `qstar dpo`"):
        decline_run("x", tmp_path)
    with pytest.raises(InputError, match=r"its metrics\.jsonl has no rewards/chosen"):
        decline_run("x", write_run(tmp_path / "empty", [{"step": 0, "loss": 1.0}]))
    (tmp_path / "empty" / "config.yaml").write_text("model: m\n")
    with pytest.raises(InputError, match="not a run with a preference loss"):
        decline_run("x", tmp_path / "empty")


@pytest.mark.parametrize(
    ("with_sft", "without", "reproduced"),
    [
        (-1.0, 1.0, True),
        (-1.0, 0.001, True),  # no trend
        (1.0, 1.0, False),
        (-1.0, -1.0, False),
        (-0.015, 0.001, None),  # noise hides whether it fell
        (-0.025, -0.01, None),  # or whether they differ
        (-1.0, None, None),
    ],
)
def test_the_verdict_follows_the_numbers(tmp_path, with_sft, without, reproduced):
    ends = {"with SFT": with_sft, "without SFT": without}
    runs = [
        decline_run(name, write_run(tmp_path / name.replace(" ", "-"), [evaluation(0, 0.0), evaluation(10, end)]))
        for name, end in ends.items()
        if end is not None
    ]
    finding = Decline(tuple(runs)).finding()
    assert finding.reproduced is reproduced and f"chosen {with_sft:+.3f} +- 0.020" in finding.measured
