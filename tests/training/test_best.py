"""The best checkpoint of a run, early stopping, and the length of a run in epochs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qstar_jax.errors import InputError
from qstar_jax.store.checkpoint_store import CheckpointStore
from qstar_jax.store.checkpoints import find_checkpoint, read_best
from qstar_jax.training.best import BestEvaluation
from qstar_jax.training.plan import make_plan


@pytest.fixture(scope="module")
def overfitted(tmp_path_factory, make_config, tiny_train, eval_file):
    """Twelve steps at a rate that soon makes held-out pairs worse, evaluated after each."""
    train = {"steps": 12, "eval_every": 1, "save_every": 0, "keep_checkpoints": 1, "keep_best": "loss", "patience": 3}
    config = make_config(
        tmp_path_factory.mktemp("best") / "run", data={"eval": str(eval_file)}, train=train, optimizer=FAST
    )
    return config, tiny_train(config)


FAST = {"learning_rate": 3e-2, "schedule": "constant"}


def evaluations(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line and line["step"] > 0}


def test_the_best_checkpoint_is_kept_and_read(overfitted, tmp_path):
    config, summary = overfitted
    out = Path(config.out)
    losses = evaluations(out)
    best = min(losses, key=losses.get)
    # It stops three evaluations after the best one, and keeps the best checkpoint beside the newest.
    assert summary["steps"] == best + 3 < 12 and max(losses) == best + 3
    assert sorted(int(path.name) for path in (out / "checkpoints").iterdir() if path.name.isdigit()) == [best, best + 3]
    assert find_checkpoint(out).name == str(best)
    assert find_checkpoint(out / "checkpoints").name == str(best + 3)
    record = read_best(out)
    assert (record["metric"], record["step"], record["value"]) == ("eval_loss", best, losses[best])
    with CheckpointStore(out, 1) as store:
        assert store.latest_step == best + 3  # from which it would resume


def test_a_stopped_run_is_complete(overfitted, tiny_train, make_config):
    config, summary = overfitted
    assert tiny_train(replace(config, resume=True)) == summary


def test_a_resumed_run_finds_the_same_best(overfitted, make_config, tiny_train, tmp_path, eval_file, monkeypatch):
    config, summary = overfitted
    again = replace(config, out=str(tmp_path / "run"), train=replace(config.train, save_every=2))
    save = CheckpointStore.save

    def save_or_die(store, step, arrays, description):
        save(store, step, arrays, description)
        if step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CheckpointStore, "save", save_or_die)
        tiny_train(again)
    resumed = tiny_train(replace(again, resume=True))
    assert resumed["steps"] == summary["steps"]
    assert read_best(Path(again.out)) == read_best(Path(config.out))


@pytest.mark.parametrize(
    ("metric", "values", "best", "exhausted"),
    [
        ("loss", [0.6, 0.5, 0.5, 0.7], 2, True),
        ("rewards/margins", [0.1, 0.5, 0.4, 0.6], 4, False),
        ("rewards/accuracies", [0.9, 0.5, 0.4, 0.6], 1, True),
    ],
)
def test_better_is_less_loss_and_more_of_anything_else(metric, values, best, exhausted, tmp_path):
    kept = BestEvaluation(tmp_path, metric, patience=2)
    for step, value in enumerate(values, start=1):
        kept.add(step, {f"eval_{metric}": value})
    assert read_best(tmp_path)["step"] == best and kept.is_exhausted == exhausted
    assert not BestEvaluation(tmp_path, metric, start=4).is_exhausted  # without patience, never
    # One that resumes at an earlier step has not seen the later ones.
    kept = BestEvaluation(tmp_path, metric, patience=2, start=1)
    kept.add(2, {f"eval_{metric}": values[1]})
    assert (kept.step == 2) == (best != 1)


@pytest.mark.parametrize(
    ("train", "held_out", "message"),
    [
        ({"epochs": 2.0}, True, r"train.steps 6 and train.epochs 2.0 contradict each other"),
        ({"steps": 0, "epochs": -1.0}, True, "more than 0 passes"),
        ({"patience": 2}, True, "train.keep_best, the metric that must improve"),
        ({"keep_best": "loss", "eval_every": 1}, False, "needs data.eval, held-out rows"),
        ({"keep_best": "loss"}, True, "needs train.eval_every"),
        ({"eval_every": 2.5}, True, r"train.eval_every 2.5: expected a number of steps, or a share of all steps below"),
        ({"save_every": -1}, True, r"train.save_every -1: expected a number of steps"),
    ],
)
@pytest.mark.parametrize("verb", ["sft", "dpo"])
def test_contradictions_are_refused(train, held_out, message, verb, make_config, tmp_path, eval_file):
    data = {"eval": str(eval_file)} if held_out else {}
    with pytest.raises(InputError, match=message):
        make_plan(make_config(tmp_path, verb, train=train, data=data))


def test_sft_has_no_rewards_to_keep(make_config, tmp_path, eval_file):
    train = {"keep_best": "rewards/margins", "eval_every": 2}
    with pytest.raises(InputError, match="not measured by this verb; set it to loss"):
        make_plan(make_config(tmp_path, "sft", train=train, data={"eval": str(eval_file)}))


@pytest.mark.parametrize(("epochs", "steps"), [(None, 5), (0.5, 3), (1.2, 6)])
def test_epochs_are_passes_over_the_rows(epochs, steps, make_config, tiny_train, tmp_path):
    summary = tiny_train(make_config(tmp_path / "run", train={"steps": 0, "epochs": epochs, "save_every": 0}))
    assert summary["steps"] == steps  # of forty rows, eight at a time
