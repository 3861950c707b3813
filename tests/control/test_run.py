import json
import os
import shutil
import signal
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from scipy.linalg import solve_discrete_lyapunov

from qstar_jax.cli.main import main
from qstar_jax.config import ControlConfig
from qstar_jax.config.control import with_task_defaults
from qstar_jax.control import learning, lqr
from qstar_jax.control.actor import Actor
from qstar_jax.control.options import resolve
from qstar_jax.control.tasks import load_task
from qstar_jax.errors import InputError
from qstar_jax.evaluation.insights.control import Control
from qstar_jax.interruption import CTRL_C, TEMPORARY
from qstar_jax.training.run_log import read_metrics

SMALL = """--train.steps 100 --train.eval_every 50 --train.batch_size 16 --segments.count 200
    --segments.eval_segments 40 --optimizer.learning_rate 1e-2""".split()
CLONED_AND_PAIRED = ("--train.bc_steps", "300", "--segments.pairs", "300")


def control(out, *words, task="lqr", more=CLONED_AND_PAIRED):
    return main(["control", "--task", str(task), "--out", str(out), *SMALL, *more, *words])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "lqr"
    assert control(out, "--arms", "[with_bc,without_bc,with_bc_kl,best_bc]") == 0
    return out


def start_and_end(run):
    metrics = read_metrics(run)
    return {name: (values[0], values[-1]) for name, (_, values) in metrics.items()}


def test_runs_leave_their_files(runs):
    for arm in ("with_bc", "without_bc", "with_bc_kl", "best_bc"):
        folder = runs / f"{arm}-0"
        assert {"config.yaml", "metrics.jsonl", "summary.json", "actor.npz"} <= {file.name for file in folder.iterdir()}
        options = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        assert options["arms"] == [arm] and options["loss"]["beta"] == 0.1  # nulls are filled in
    assert json.loads((runs / "summary.json").read_text(encoding="utf-8")).keys() == {
        f"{arm}-0" for arm in ("with_bc", "without_bc", "with_bc_kl", "best_bc")
    }


def test_rewards_begin_at_0_and_the_loss_falls(runs):
    for arm in ("with_bc", "without_bc", "with_bc_kl"):
        values = start_and_end(runs / f"{arm}-0")
        for name in ("chosen", "rejected", "margins", "reference_expected"):
            assert abs(values[f"eval_rewards/{name}"][0]) < 1e-6
        assert values["eval_loss"][1] < values["eval_loss"][0]
    assert read_metrics(runs / "best_bc-0")["eval_loss"][0] == [0]
    # CPL-KL and CPL share a clone, and are ranked at the start by log pi or not at all.
    both = [start_and_end(runs / f"{arm}-0") for arm in ("with_bc", "with_bc_kl")]
    assert both[0]["eval_logps/chosen"][0] == both[1]["eval_logps/chosen"][0]
    assert both[0]["eval_logps/chosen"][1] != both[1]["eval_logps/chosen"][1]
    np.testing.assert_allclose(both[1]["eval_loss"][0], np.log(2), rtol=1e-6)


def test_chosen_rewards_fall_after_cloning_and_rise_without(runs):
    """Fig. 3 right, on the task that is solved exactly."""
    record = Control.read(runs)
    rewards = [record.find(arm, 0).rewards for arm in ("with_bc", "without_bc")]
    assert rewards[0].last("chosen")[0] < 0 < rewards[1].last("chosen")[0]
    assert [run.beta for run in rewards] == [0.1, 0.1]
    assert rewards[0].curves["reference"][-1] < 0
    assert "chosen segments" in rewards[0].verdict and "exact KL" in rewards[0].verdict
    assert "rose" in rewards[1].verdict
    assert record.finding().reproduced is True
    assert (runs / "control.png").stat().st_size > 0
    # The record has what the runs logged.
    logged = start_and_end(runs / "with_bc-0")
    clone = record.find("with_bc", 0)
    assert clone.logps["rejected"] == logged["eval_logps/rejected"] and clone.accuracy == logged["eval_accuracies"][1]
    assert clone.outcomes["gain error"].values[-1].mean == logged["eval_gain_error"][1]
    assert clone.outcomes["gain error"].steps == (0, 100)


def test_the_stored_policy_has_the_gain_error_that_was_logged(runs):
    stored = np.load(runs / "with_bc-0" / "actor.npz", allow_pickle=False)
    gain = lqr.solve(lqr.point_mass()).gain
    error = np.linalg.norm(stored["layer_0/kernel"].T + gain) / np.linalg.norm(gain)
    np.testing.assert_allclose(start_and_end(runs / "with_bc-0")["eval_gain_error"][1], error, rtol=1e-5)
    assert (stored["shift"] == 0).all() and (stored["scale"] == 1).all()


def test_what_a_policy_costs_is_relative_to_the_optimum():
    """Against the value of the policy -K s / 2, which is what the data's policy does without noise."""
    measure = load_task(with_task_defaults(ControlConfig("lqr", "x"))).measure
    problem, actor = lqr.point_mass(), Actor("gaussian", 4, 2, hidden=())
    optimum = lqr.solve(problem)
    found = {}
    for share in (1.0, 0.5):
        params = actor.init(jax.random.key(0))
        params["layer_0"]["kernel"] = jnp.asarray(-share * optimum.gain.T)
        found[share] = measure(actor, params, 1)
    np.testing.assert_allclose(list(found[1.0].values()), 0, atol=1e-6)
    closed = problem.dynamics - problem.control @ optimum.gain / 2
    stage = problem.state_cost + optimum.gain.T @ problem.action_cost @ optimum.gain / 4
    value = solve_discrete_lyapunov(problem.discount**0.5 * closed.T, stage)
    # From standard normal states a value matrix costs its trace; 512 states are a sample of them.
    expected = np.trace(value) / np.trace(optimum.value_matrix) - 1
    np.testing.assert_allclose(found[0.5]["eval_excess_cost"], expected, rtol=0.05)
    np.testing.assert_allclose(found[0.5]["eval_gain_error"], 0.5, rtol=1e-6)


def test_the_expectation_is_minus_beta_kl_and_log_probabilities_have_no_dropout():
    """Against numbers by hand: KL of two means at distance d is d^2 / 2 std^2, here pi d^2."""
    from qstar_jax.control.held_out import held_out_metrics
    from qstar_jax.control.learning import SegmentArrays

    rng = np.random.default_rng(0)
    actor = Actor("deterministic", 2, 1, hidden=(), dropout=0.5)
    params = {"layer_0": {"kernel": jnp.array([[0.3], [-0.2]]), "bias": jnp.array([0.1])}}
    start = {"layer_0": {"kernel": jnp.zeros((2, 1)), "bias": jnp.zeros(1)}}
    states, actions = rng.normal(size=(4, 3, 2)), rng.normal(size=(4, 3, 1))
    segments = SegmentArrays(*(jnp.asarray(x, jnp.float32) for x in (states, actions, np.zeros(4), np.zeros((4, 3)))))
    pairs = np.array([[2, 0], [1, 3]])
    found = held_out_metrics(actor, start, segments, pairs, beta=0.7, bias=0.5, discount=0.9)(params)
    mean = np.tanh(states @ [0.3, -0.2] + 0.1)
    logp = -np.pi * (actions[..., 0] - mean) ** 2
    rewards = 0.7 * (logp + np.pi * actions[..., 0] ** 2) @ 0.9 ** np.arange(3)
    np.testing.assert_allclose(found["eval_logps/chosen"], logp.sum(1)[[2, 1]].mean(), rtol=1e-5)
    np.testing.assert_allclose(found["eval_rewards/chosen"], rewards[[2, 1]].mean(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["eval_rewards/rejected"], rewards[[0, 3]].mean(), rtol=1e-5)
    margins = rewards[[2, 1]] - rewards[[0, 3]]
    np.testing.assert_allclose(found["eval_rewards/margins_stderr"], abs(np.diff(margins))[0] / 2, rtol=1e-5)
    expected = -0.7 * np.pi * (mean**2 @ 0.9 ** np.arange(3)).mean()
    np.testing.assert_allclose(found["eval_rewards/reference_expected"], expected, rtol=1e-5)
    advantages = 0.7 * logp @ 0.9 ** np.arange(3)
    right = (advantages[[2, 1]] > advantages[[0, 3]]).mean()
    loss = np.log1p(np.exp(0.5 * advantages[[0, 3]] - advantages[[2, 1]])).mean()
    np.testing.assert_allclose([found["eval_accuracies"], found["eval_loss"]], [right, loss], rtol=1e-5)


def test_the_same_command_continues_and_another_is_refused(runs, capsys):
    before = (runs / "with_bc-0" / "metrics.jsonl").read_bytes()
    assert control(runs) == 0
    assert "with_bc-0: complete" in capsys.readouterr().out.replace("\n", "")
    assert (runs / "with_bc-0" / "metrics.jsonl").read_bytes() == before
    assert control(runs, "--loss.bias", "0.9") == 2
    assert "has a run with other options (loss" in capsys.readouterr().err


def test_a_run_that_was_killed_begins_anew_and_ends_equal(runs, tmp_path):
    folder = shutil.copytree(runs, tmp_path / "lqr") / "with_bc-0"
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:2]) + lines[2][:9])
    (folder / "actor.npz").unlink()
    (folder / "summary.json").unlink()
    kept = (tmp_path / "lqr" / "without_bc-0" / "actor.npz").stat()
    assert control(tmp_path / "lqr") == 0
    assert (tmp_path / "lqr" / "without_bc-0" / "actor.npz").stat() == kept
    assert json.loads((folder / "summary.json").read_text()) == json.loads(
        (runs / "with_bc-0" / "summary.json").read_text()
    )
    assert read_metrics(folder) == read_metrics(runs / "with_bc-0")
    ended, whole = (np.load(run / "actor.npz", allow_pickle=False) for run in (folder, runs / "with_bc-0"))
    assert sorted(ended) == sorted(whole)
    for name in whole:
        np.testing.assert_array_equal(ended[name], whole[name])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, TEMPORARY), (signal.SIGINT, CTRL_C)])
def test_a_signal_ends_the_run_and_the_command_says_how_to_go_on(number, code, runs, tmp_path, monkeypatch, capsys):
    out = shutil.copytree(runs, tmp_path / "lqr")
    (out / "without_bc-0" / "summary.json").unlink()

    def signalled(*_, **__):
        os.kill(os.getpid(), number)
        raise AssertionError("the run went on")

    with monkeypatch.context() as patch:
        patch.setattr(learning, "minimizer", signalled)
        assert control(out) == code
    said = capsys.readouterr().err.splitlines()
    expected = "qstar control: stopped; finished runs are kept, without_bc-0 begins anew; go on with"
    assert said[-2] == expected and said[-1].startswith("qstar control --task lqr --out ")
    assert control(out) == 0
    assert read_metrics(out / "without_bc-0") == read_metrics(runs / "without_bc-0")


@pytest.mark.parametrize("kind", ["deterministic", "squashed"])
def test_a_file_of_episodes_and_all_pairs(kind, tmp_path):
    rng = np.random.default_rng(0)
    file = tmp_path / "episodes.npz"
    observations = 5 + 3 * rng.normal(size=(12, 21, 3))
    actions = np.clip(0.5 * rng.normal(size=(12, 20, 2)), -1, 1)
    rewards = -((actions - 0.4) ** 2).sum(-1)
    np.savez(file, observations=observations, actions=actions, rewards=rewards, lengths=np.full(12, 20))
    words = ["--segments.label", "reward", "--segments.length", "5", "--actor.hidden", "[8]", "--loss.pairs", "all",
             "--arms", "[without_bc]", "--actor.kind", kind]  # fmt: skip
    assert control(tmp_path / "runs", *words, task=file, more=()) == 0
    run = tmp_path / "runs" / "without_bc-0"
    values = start_and_end(run)
    assert values["eval_accuracies"][1] > 0.8  # the better actions are near 0.4
    stored = np.load(run / "actor.npz", allow_pickle=False)
    np.testing.assert_allclose(stored["shift"], 5, atol=1)
    np.testing.assert_allclose(stored["scale"], 3, atol=0.5)
    record = Control.read(tmp_path / "runs")
    assert record.find("without_bc", 0).outcomes == {} and record.finding().reproduced is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--loss.pairs", "all", "--segments.pairs", "10000"], "preferences cannot be drawn at random"),
        (["--loss.bias", "1.5"], "loss.bias is 1.5; expected a number in (0, 1]"),
        (["--train.steps", "0"], "train.steps is 0; expected a number in [1, inf)"),
        (["--actor.dropout", "1"], "actor.dropout is 1.0; expected a number in [0, 1)"),
        (["--segments.discount", "1"], "segments.discount is 1.0"),
        (["--segments.length", "30"], "no episode has 30 steps"),
        (
            "--segments.sampled false --loss.pairs all --segments.pairs 10000 --train.batch_size 999".split(),
            "train.batch_size is 999",
        ),
        (["--arms", "[]"], "--arms []: expected at least one"),
        (["--actor.kind", "squashed"], "whose actions are in (-1, 1), but those of lqr reach"),
    ],
)
def test_options_without_a_meaning_are_refused(words, message, tmp_path, capsys):
    assert control(tmp_path / "x", *words) == 2
    assert message in capsys.readouterr().err


def configured(task="lqr", arms=("with_bc", "without_bc"), seeds=(0,), **blocks):
    """Options of a task; `train={"steps": 3}` changes one of a block."""
    config = ControlConfig(task, "x", arms=list(arms), seeds=list(seeds))
    return replace(config, **{name: replace(getattr(config, name), **change) for name, change in blocks.items()})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": {"beta": float("nan")}}, r"--loss\.beta is nan; expected a number in \(0, inf\)"),
        ({"loss": {"beta": float("inf")}}, r"--loss\.beta is inf"),
        ({"loss": {"bias": float("nan")}}, r"--loss\.bias is nan; expected a number in \(0, 1\]"),
        ({"optimizer": {"learning_rate": -1.0}}, r"--optimizer\.learning_rate is -1\.0"),
        ({"optimizer": {"learning_rate": float("nan")}}, r"--optimizer\.learning_rate is nan"),
        ({"optimizer": {"warmup_steps": float("nan")}}, r"--optimizer\.warmup_steps is nan"),
        ({"optimizer": {"warmup_steps": 1.5}}, r"optimizer\.warmup_steps 1\.5: expected a number of steps"),
        ({"optimizer": {"decay": 0.9}}, "decay 0.9 has no effect with name adamw"),
        ({"actor": {"hidden": [8, 0]}}, r"--actor\.hidden\[1\] is 0; expected a number in \[1, inf\)"),
        ({"segments": {"seed": -1}}, r"--segments\.seed is -1"),
        ({"seeds": [0, 10**30]}, r"--seeds\[1\] is 10+; expected a number in"),
        ({"seeds": [1, 1]}, r"--seeds \[1, 1\]: expected at least one, and each once"),
        ({"arms": ["with_bc", "with_bc"]}, r"--arms \['with_bc', 'with_bc'\]: expected at least one, and each once"),
    ],
)
def test_numbers_out_of_range_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        resolve(configured(**changes))


LINEAR = {"hidden": [], "dropout": 0.5}
ALL_PAIRS = {"loss": {"pairs": "all"}, "segments": {"sampled": False}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"episodes": 7}}, r"--train\.episodes 7 has no effect with --task lqr"),
        ({"task": "a.npz", "train": {"episodes": 7}}, r"--train\.episodes 7 has no effect with --task a\.npz, a file"),
        (
            {"task": "a.npz", "train": {"success_every": 7}},
            r"--train\.success_every 7 has no effect with --task a\.npz",
        ),
        ({"actor": {"dropout": 0.5}}, r"--actor\.dropout 0\.5 has no effect with --actor\.hidden \[\]"),
        ({"task": "a.npz", "actor": LINEAR}, r"--actor\.dropout 0\.5 has no effect with --actor\.hidden \[\]"),
        ({"actor": {"kind": "squashed", "std": 0.5}}, r"--actor\.std 0\.5 has no effect with --actor\.kind squashed"),
        ({**ALL_PAIRS, "segments": {"pairs": 9}}, r"--segments\.pairs 9 has no effect with --loss\.pairs all"),
        ({"arms": ["without_bc"], "train": {"bc_steps": 9}}, r"--train\.bc_steps 9 has no effect without an arm"),
        ({"arms": ["best_bc"], **ALL_PAIRS}, r"--loss\.pairs all has no effect with --arms \[best_bc\]"),
        ({"arms": ["best_bc"], "segments": {"pairs": 9}}, r"--segments\.pairs 9 has no effect with --arms"),
        ({"arms": ["best_bc"], "train": {"steps": 9}}, r"--train\.steps 9 has no effect with --arms"),
        ({"arms": ["best_bc"], "train": {"eval_every": 9}}, r"--train\.eval_every 9 has no effect with --arms"),
        ({"arms": ["best_bc"], "train": {"success_every": 9}}, r"--train\.success_every 9 has no effect with --arms"),
    ],
)
def test_options_that_nothing_reads_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        resolve(configured(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train": {"success_every": 7}},
        {"task": "bin-picking-v3", "train": {"success_every": 7, "episodes": 7}},
        {"task": "a.npz", "actor": {"hidden": [], "kind": "squashed"}},
        {"actor": {"hidden": [8], "dropout": 0.5, "std": 0.5}},
        ALL_PAIRS,
        {"arms": ["without_bc"], "train": {"steps": 9}},
        {"arms": ["without_bc", "best_bc"], "train": {"bc_steps": 9, "steps": 9}, "loss": {"beta": 0.2}},
        {"arms": ["best_bc"], "train": {"bc_steps": 9}, "loss": {"beta": 0.2}},
    ],
)
def test_options_that_are_read_and_what_a_run_recorded_are_accepted(changes):
    resolved = resolve(configured(**changes))
    assert resolve(resolved) == resolved


def test_files_that_are_none_are_refused(tmp_path, capsys):
    assert control(tmp_path / "x", task=tmp_path / "nothing.npz") == 2
    assert "no such file; expected lqr, bin-picking-v3 or an .npz file" in capsys.readouterr().err
