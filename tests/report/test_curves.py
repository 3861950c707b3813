import json

import pytest

from qstar_jax.errors import InputError
from qstar_jax.report.curves import draw_curves, write_curves
from qstar_jax.training.run_log import read_metrics

LINES = [
    {"step": 0, "eval_loss": 0.7, "eval_rewards/chosen": 0.0, "eval_rewards/chosen_stderr": 0.0},
    {"step": 0, "loss": 0.69, "rewards/chosen": 0.0, "rewards/rejected": 0.0, "rewards/margins": 0.0},
    {"step": 1, "loss": 0.60, "rewards/chosen": 0.1, "rewards/rejected": -0.1, "rewards/margins": 0.2},
    {"step": 2, "eval_loss": 0.5, "eval_rewards/chosen": 0.3, "eval_rewards/chosen_stderr": 0.1},
]


@pytest.fixture
def run(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return tmp_path


def test_metrics_are_read_with_their_steps(run):
    found = read_metrics(run)
    assert found["loss"] == ([0, 1], [0.69, 0.60]) and found["eval_loss"] == ([0, 2], [0.7, 0.5])


@pytest.mark.parametrize(
    "line", ["5", "[]", '{"loss": 0.5}', '{"step": "1"}', '{"step": 1, "loss": "low"}', '{"step": 1, "loss": null}']
)
def test_lines_of_other_things_are_refused_by_number(line, run):
    path = run / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 3, "lo')  # a process that was killed leaves half a line
    assert read_metrics(run)["loss"] == ([0, 1], [0.69, 0.60])
    path.write_text(path.read_text() + f"\n{line}\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl line 6: not metrics of a step \(.*; restore or remove it"):
        read_metrics(run)


def test_every_curve_that_has_numbers_is_drawn(run):
    axes = draw_curves(read_metrics(run)).axes
    assert [a.get_title() for a in axes] == ["loss", "implicit rewards", "reward margin"]  # no accuracy was logged
    rewards = {line.get_label(): list(line.get_ydata()) for line in axes[1].lines}
    assert rewards == {
        "chosen, training": [0.0, 0.1],
        "chosen, held out": [0.0, 0.3],
        "rejected, training": [0.0, -0.1],
    }
    (band,) = axes[1].collections
    assert band.get_paths()[0].vertices[:, 1].max() == pytest.approx(0.5)  # two standard errors above


def test_a_run_of_fine_tuning_has_a_loss_only():
    (axes,) = draw_curves({"loss": ([0, 1], [3.0, 2.0])}).axes
    assert axes.get_title() == "loss"


def test_a_picture_lies_in_the_run(run):
    assert write_curves(run).read_bytes()[:4] == b"\x89PNG" and (run / "curves.png").exists()
