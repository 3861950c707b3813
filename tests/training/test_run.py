import io
import json
import math
import shutil
import struct
import time
from dataclasses import asdict, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from rich.console import Console
from tensorboardX.proto import event_pb2

from qstar_jax.config import DataOptions, LossOptions, OptimizerOptions, ReferenceOptions
from qstar_jax.data.loading import load_examples
from qstar_jax.errors import InputError
from qstar_jax.store.checkpoints import find_checkpoint, read_description
from qstar_jax.store.reference_cache import ReferenceCache
from qstar_jax.training import loop as loop_module
from qstar_jax.training import reference as reference_module
from qstar_jax.training import run as run_module
from qstar_jax.training.continuation import check_folder, check_same_options
from qstar_jax.training.plan import make_plan
from qstar_jax.training.run_log import RunLog, read_metrics

DPO_METRICS = {
    "step",
    "loss",
    "rewards/chosen",
    "rewards/chosen_stderr",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "lengths/chosen",
    "lengths/rejected",
    "truncated/chosen",
    "truncated/rejected",
    "grad_norm",
    "learning_rate",
    "epoch",
}


@pytest.fixture(scope="module", params=["dpo", pytest.param("sft", marks=pytest.mark.slow)])
def whole(request, tmp_path_factory, make_config, tiny_train, eval_file):
    """(verb, run folder, summary) of an uninterrupted run that evaluates with each checkpoint."""
    out = tmp_path_factory.mktemp("runs") / request.param
    return request.param, out, tiny_train(make_config(out, request.param, **evaluated(eval_file)))


def evaluated(eval_file, **train):
    return {"data": {"eval": str(eval_file)}, "train": {"eval_every": 2, "eval_batch_size": 4, **train}}


@pytest.fixture(scope="module")
def dpo_run(tmp_path_factory, make_config, tiny_train, eval_file):
    """A DPO run that evaluates eleven pairs in batches of four, every third step."""
    out = tmp_path_factory.mktemp("runs") / "with_eval"
    train = {"eval_every": 3, "eval_batch_size": 4, "keep_checkpoints": 1}
    return out, tiny_train(make_config(out, data={"eval": str(eval_file)}, train=train))


def test_run_folder_and_metric_names(dpo_run, metric_lines):
    out, summary = dpo_run
    names = {path.name for path in out.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "summary.json", "checkpoints", "reference", "tensorboard"} <= names
    assert next((out / "tensorboard").glob("events.out.tfevents.*")).stat().st_size > 1000
    assert json.loads((out / "summary.json").read_text()) == summary
    lines = metric_lines(out)
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == list(range(6))
    assert all(line.keys() == DPO_METRICS for line in training)
    evaluations = [line for line in lines if "loss" not in line]
    assert [line["step"] for line in evaluations] == [0, 3, 6]
    assert evaluations[0].keys() == {"step"} | {
        f"eval_{name}" for name in DPO_METRICS - {"step", "grad_norm", "learning_rate", "epoch"}
    }
    raw = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    speeds = [line for line in raw if "perf/tokens_per_second" in line]
    assert len(speeds) == 5 and all(line["perf/mfu"] > 0 and line["perf/seconds_per_step"] > 0 for line in speeds)


def test_config_yaml_is_the_resolved_configuration(dpo_run, hf_folder):
    config = yaml.safe_load((dpo_run[0] / "config.yaml").read_text())
    assert config["model"] == str(hf_folder) and config["train"]["batch_size"] == 8
    assert config["loss"]["name"] == "sigmoid" and config["loss"]["beta"] == 0.1
    assert read_description(find_checkpoint(dpo_run[0])).options == config


def test_summary_has_the_evaluation_before_and_after(dpo_run, metric_lines):
    out, summary = dpo_run
    evaluations = [line for line in metric_lines(out) if "loss" not in line]
    for name in ("eval_loss", "eval_rewards/margins", "eval_logps/chosen"):
        assert summary[f"before_{name}"] == evaluations[0][name] and summary[name] == evaluations[-1][name]
    assert summary["before_eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert summary["eval_loss"] != summary["before_eval_loss"]
    assert summary["steps"] == 6 and summary["seconds"] > 0 and summary["peak_memory_bytes"] > 2**20


def test_first_loss_is_ln_2_and_the_next_is_not(dpo_run, metric_lines):
    losses = [line["loss"] for line in metric_lines(dpo_run[0]) if "loss" in line]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and abs(losses[-1] - math.log(2)) > 1e-3


def test_rates_and_epochs_are_those_of_the_steps(dpo_run, metric_lines):
    training = [line for line in metric_lines(dpo_run[0]) if "loss" in line]
    np.testing.assert_allclose(
        [line["learning_rate"] for line in training], [3e-3 * (1 - i / 6) for i in range(6)], rtol=1e-5
    )
    np.testing.assert_allclose([line["epoch"] for line in training], [(i + 1) * 8 / 40 for i in range(6)])


def test_evaluation_is_the_plain_mean_over_all_rows(
    dpo_run, eval_file, tiny_model, tiny_params, tiny_tokenizer, arrays_of
):
    # Eleven rows in batches of four: the fill-up row must not count, and the last batch must not weigh too much.
    out, summary = dpo_run
    after = arrays_of(out)[0]
    logits = jax.jit(tiny_model.logits)
    rewards = []
    for example in load_examples(str(eval_file), "", "preferences", tiny_tokenizer, DataOptions()).examples:
        sums = []
        for response in example.responses:
            ids = np.concatenate([example.prompt, response.ids])
            row, start = jnp.zeros((1, 32), jnp.int32).at[0, : len(ids)].set(ids), len(example.prompt)
            ratio = 0.0
            for sign, params in ((1, after), (-1, tiny_params)):
                logp = jax.nn.log_softmax(logits(params, row, jnp.array([len(ids)]))[0])
                ratio += sign * float(logp[jnp.arange(start - 1, len(ids) - 1), ids[start:]].sum())
            sums.append(0.1 * ratio)
        rewards.append(sums)
    chosen, rejected = np.array(rewards).T
    margin = chosen - rejected
    assert len(margin) == 11
    np.testing.assert_allclose(summary["eval_rewards/chosen"], chosen.mean(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(summary["eval_rewards/margins"], margin.mean(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(summary["eval_loss"], np.log1p(np.exp(-margin)).mean(), rtol=1e-5)
    np.testing.assert_allclose(summary["eval_rewards/accuracies"], (margin > 0).mean(), rtol=1e-6)


def test_only_the_newest_checkpoints_are_kept(dpo_run, whole):
    assert [path.name for path in (dpo_run[0] / "checkpoints").iterdir() if path.name.isdigit()] == ["6"]
    assert sorted(path.name for path in (whole[1] / "checkpoints").iterdir() if path.name.isdigit()) == ["4", "6"]


def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    whole, tmp_path, make_config, tiny_train, kill_at, arrays_of, metric_lines, eval_file
):
    verb, expected, _ = whole
    out = tmp_path / "run"

    kill_at(make_config(out, verb, **evaluated(eval_file)), 5)  # a step after the checkpoint at 4
    assert find_checkpoint(out).name == "4"
    # Intervals and folder may change.
    tiny_train(_resume(make_config(out, verb, **evaluated(eval_file, keep_checkpoints=5))))
    assert find_checkpoint(out).name == "6"
    jax.tree.map(np.testing.assert_array_equal, arrays_of(out), arrays_of(expected))
    assert metric_lines(out) == metric_lines(expected)


def _resume(config):
    return replace(config, resume=True)


@pytest.mark.parametrize(
    ("section", "change", "named"),
    [
        ("optimizer", {"learning_rate": 1e-4}, "optimizer.learning_rate was 0.003.*0.0001"),
        ("train", {"seed": 1}, "train.seed was 0"),
        ("train", {"batch_size": 4}, "train.batch_size was 8"),
        ("train", {"steps": 9}, "train.steps was 6"),
        ("loss", LossOptions(beta=0.2), "loss.beta was 0.1"),
        ("data", {"max_length": 512}, "data.max_length was 1024"),
    ],
)
def test_a_run_does_not_resume_with_other_options(section, change, named, dpo_run, make_config, tiny_train, eval_file):
    sections = {"data": {}, section: change}
    config = make_config(dpo_run[0], **{k: v for k, v in sections.items() if v})
    with pytest.raises(InputError, match=named):
        tiny_train(_resume(config))


def test_a_run_does_not_resume_with_other_data(dpo_run, make_config, tiny_train, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "w1", "chosen": "w2", "rejected": "w3"}\n' * 8)
    with pytest.raises(InputError, match=r"data\.train was"):
        tiny_train(_resume(make_config(dpo_run[0], data={"train": str(other)})))


@pytest.fixture(scope="module")
def changeable_run(tmp_path_factory, make_config, tiny_train, train_file, eval_file):
    """(config, run folder): a run of two steps whose files a test may change, if it puts them back."""
    place = tmp_path_factory.mktemp("own")
    files = {name: str(shutil.copy(file, place)) for name, file in (("train", train_file), ("eval", eval_file))}
    train = {"steps": 2, "save_every": 1, "eval_batch_size": 4}
    config = make_config(place / "run", data=files, train=train)
    tiny_train(config)
    shutil.rmtree(place / "run" / "checkpoints" / "2")
    return replace(config, resume=True)


def reordered(lines):
    return lines[::-1]


def one_more(lines):
    return [*lines, '{"prompt": "w1", "chosen": "w2", "rejected": "w3"}']


def one_word(lines):
    return [lines[0].replace('"chosen": "', '"chosen": "w7 '), *lines[1:]]


@pytest.mark.parametrize("change", [reordered, one_more, one_word])
@pytest.mark.parametrize("name", ["train", "eval"])
def test_a_run_does_not_resume_with_data_that_changed_in_place(name, change, changeable_run, tiny_train, tmp_path):
    path = Path(getattr(changeable_run.data, name))
    before, metrics = path.read_text(), (Path(changeable_run.out) / "metrics.jsonl").read_bytes()
    path.write_text("\n".join(change(before.splitlines())) + "\n")
    try:
        with pytest.raises(
            InputError, match=rf"data\.{name}\) gives other examples .*SHA-256 \w{{12}}\.\.\. then.*restore that"
        ):
            tiny_train(changeable_run)
    finally:
        path.write_text(before)
    assert (Path(changeable_run.out) / "metrics.jsonl").read_bytes() == metrics


@pytest.mark.slow
def test_a_run_resumes_with_the_same_examples_however_their_file_is_written(changeable_run, tiny_train, tmp_path):
    out = shutil.copytree(changeable_run.out, tmp_path / "run")
    path = Path(changeable_run.data.train)
    before = path.read_text()
    path.write_text("".join(json.dumps(json.loads(line) | {"note": 1}) + "\n\n" for line in before.splitlines()))
    try:
        tiny_train(replace(changeable_run, out=str(out)))
    finally:
        path.write_text(before)
    assert find_checkpoint(out).name == "2"


def test_other_held_out_data_are_announced(changeable_run, train_file, tmp_path, tiny_train, monkeypatch):
    out, console = (
        shutil.copytree(changeable_run.out, tmp_path / "run"),
        Console(record=True, quiet=False, file=io.StringIO()),
    )
    monkeypatch.setattr("qstar_jax.training.run.Console", lambda **_: console)
    config = replace(changeable_run, out=str(out), data=replace(changeable_run.data, eval=str(train_file)))
    monkeypatch.setattr(run_module.Loop, "run", lambda self, state, *_: (state, {}))
    tiny_train(config, console)
    output = console.export_text().replace("\n", " ")
    assert "held-out examples differ from here on (11 examples" in output and "before, 40 examples" in output


def test_a_run_does_not_resume_from_another_model(dpo_run, make_config, tiny_train):
    """It would never be read, and checkpoints would name a model from which they did not start."""
    with pytest.raises(InputError, match=r"model was .* and is 'another' now"):
        tiny_train(_resume(replace(make_config(dpo_run[0]), model="another")))


def test_the_evaluation_batch_size_is_fixed_for_a_loss_that_couples_examples(make_config, tmp_path):
    def check(loss):
        stored, now = (make_plan(make_config(tmp_path, train={"eval_batch_size": size}, loss=loss)) for size in (4, 0))
        check_same_options(now, asdict(stored.config))

    check(LossOptions())
    with pytest.raises(InputError, match=r"train\.eval_batch_size was 4"):
        check(LossOptions(name="aot"))


class Killed(BaseException):
    """Raised where a signal would kill the process."""


@pytest.fixture
def kill_at(monkeypatch, tiny_train):
    """`kill_at(config, done)`: runs until so many steps are done."""

    def run(config, step):
        real = RunLog.advance
        with monkeypatch.context() as patch:

            def advance(self, done):
                real(self, done)
                if done == step:
                    raise Killed

            patch.setattr(RunLog, "advance", advance)
            with pytest.raises(Killed):
                tiny_train(config)

    return run


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_over(
    dpo_run, tmp_path, make_config, tiny_train, kill_at, metric_lines, eval_file, capsys
):
    out, train = tmp_path / "run", {"eval_every": 3, "eval_batch_size": 4, "keep_checkpoints": 1}
    config = make_config(out, data={"eval": str(eval_file)}, train=train)
    kill_at(config, 1)
    assert [line["step"] for line in metric_lines(out)] == [0, 0] and find_checkpoint(out) is None
    (out / "reference_samples.jsonl").write_text("of the run that was killed")
    with pytest.raises(InputError, match=r"train\.seed was 0 .* and is 1 now"):  # going on would be another run
        tiny_train(_resume(replace(config, train=replace(config.train, seed=1))))
    tiny_train(_resume(config))
    assert metric_lines(out) == metric_lines(dpo_run[0]) and not (out / "reference_samples.jsonl").exists()


def test_a_folder_without_checkpoint_is_described(make_config, tiny_train, tmp_path):
    config = make_config(tmp_path / "run")
    assert check_folder(make_plan(config)) is None
    assert "holds no run yet, so it begins at step 0" in check_folder(make_plan(_resume(config)))
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "config.yaml"
    path.write_text(yaml.safe_dump(asdict(make_plan(config).config)))
    other = replace(config, train=replace(config.train, seed=1))
    for again in (config, other, _resume(config)):
        assert "ended before its first checkpoint; it starts over" in check_folder(make_plan(again))
    with pytest.raises(InputError, match=r"train\.seed was 0"):
        check_folder(make_plan(_resume(other)))
    for text, message in (("decode: {}", "belongs to another verb"), ("a: [", "not readable")):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            tiny_train(config)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_another_verb_does_not_resume(whole, make_config, tiny_train, tmp_path):
    verb, out, _ = whole
    out = shutil.copytree(out, tmp_path / "run")
    with pytest.raises(InputError, match="--resume"):
        tiny_train(_resume(make_config(out, "sft" if verb == "dpo" else "dpo")))


def test_a_complete_run_stays_as_it_is(dpo_run, make_config, tiny_train):
    out, summary = dpo_run
    before = (out / "metrics.jsonl").read_bytes()
    assert tiny_train(_resume(make_config(out))) == summary
    assert (out / "metrics.jsonl").read_bytes() == before


def test_an_existing_run_is_not_touched_without_resume(dpo_run, make_config, tiny_train):
    before = (dpo_run[0] / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match=r"already holds a run with a checkpoint at step 6.*--resume"):
        tiny_train(make_config(dpo_run[0]))
    assert (dpo_run[0] / "metrics.jsonl").read_bytes() == before


def board_events(folder):
    """(tag, step) of all scalars that TensorBoard shows: a session's start drops what is not before its step."""
    found = []
    for path in sorted(folder.glob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime_ns):
        content = path.read_bytes()
        while content:  # records: length (8 bytes), its checksum (4), the event, its checksum (4)
            (size,) = struct.unpack("<Q", content[:8])
            event = event_pb2.Event.FromString(content[12 : 12 + size])
            content = content[16 + size :]
            if event.session_log.status == event_pb2.SessionLog.START:
                found = [(tag, step) for tag, step in found if step < event.step]
            found += [(value.tag, event.step) for value in event.summary.value]
    return found


def test_metrics_that_a_resumed_run_keeps(tmp_path):
    def log(start):
        return RunLog(tmp_path, steps=4, start=start, console=Console(quiet=True))

    with log(0) as first:
        for step in (0, 1, 2):
            if step != 1:
                first.write(step, {"eval_loss": 0.5})
            first.write(step, {"loss": 0.6})
    time.sleep(1.1)  # files of TensorBoard are named by the second
    with log(2):  # the checkpoint at 2 was written between its two lines
        pass
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    expected = [("eval_loss", 0), ("loss", 0), ("loss", 1), ("eval_loss", 2)]
    assert [(name, line["step"]) for line in lines for name in line if name != "step"] == expected
    assert board_events(tmp_path / "tensorboard") == expected
    with log(0):  # there is no checkpoint at 0: all comes again
        pass
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_a_torn_last_line_of_metrics_does_not_stop_a_resumed_run(tmp_path):
    # A process that is killed can leave half a line.
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 0, "loss": 0.7}\n{"step": 1, "loss": 0.6}\n{"step": 2, "eval_loss": 0.5}\n{"step": 3, "lo'
    )
    assert read_metrics(tmp_path) == {"loss": ([0, 1], [0.7, 0.6]), "eval_loss": ([2], [0.5])}
    with RunLog(tmp_path, steps=4, start=2, console=Console(quiet=True)):
        pass
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2]


@pytest.mark.parametrize(("option", "size"), [("batch_size", 7), ("eval_batch_size", 3)])
def test_batches_that_do_not_divide_evenly_are_refused(option, size, make_config, tiny_train, tmp_path, eval_file):
    config = make_config(tmp_path / "run", data={"eval": str(eval_file)}, train={option: size}, mesh={"fsdp": 2})
    with pytest.raises(InputError, match=rf"--train\.{option} {size} does not divide evenly over 2 devices"):
        tiny_train(config)


def test_a_batch_holds_at_least_one_row(make_config, tiny_train, tmp_path):
    with pytest.raises(InputError, match=r"--train\.batch_size is 0; expected a number in \[1, 1e6\]"):
        tiny_train(make_config(tmp_path / "run", train={"batch_size": 0}))


def test_missing_training_data_is_named(make_config, tiny_train, tmp_path):
    with pytest.raises(InputError, match=r"--data\.train is missing"):
        tiny_train(make_config(tmp_path / "run", data={"train": ""}))
    assert not (tmp_path / "run").exists()


def test_a_policy_that_is_not_its_reference_is_refused(make_config, tiny_train, tmp_path, monkeypatch):
    real = run_module.build_state

    def build_state(*arguments):
        state = real(*arguments)
        return replace(state, ref_params=jax.tree.map(lambda x: x * 1.1, state.ref_params))

    monkeypatch.setattr(run_module, "build_state", build_state)
    with pytest.raises(RuntimeError, match=r"the loss at step 0 is .*expected 0\.693147.*rewards/chosen.*dropout"):
        tiny_train(make_config(tmp_path / "run"))
    assert find_checkpoint(tmp_path / "run") is None


@pytest.fixture
def prepared(make_config, tiny_train, tmp_path, monkeypatch):
    """`prepared(**sections)`: the loop that a configuration leads to; nothing is trained."""
    loops = []

    def run(self, state, start, batch):
        loops.append(self)
        return state, {}

    monkeypatch.setattr(loop_module.Loop, "run", run)
    monkeypatch.setattr(run_module, "make_evaluator", lambda *arguments: None)

    def prepare(verb="dpo", **sections):
        tiny_train(make_config(tmp_path / f"run{len(loops)}", verb, **sections))
        return loops[-1]

    return prepare


def test_options_of_data_and_order_change_the_batches(prepared):
    plain = prepared().source.at_step(0)
    assert (np.asarray(plain.tokens) != prepared().source.at_step(1).tokens).any()
    short = prepared(data={"max_length": 8, "max_prompt_length": 4}).source.at_step(0)
    assert (np.asarray(short.prompt_lengths) <= 4).all() and np.asarray(short.truncated).any()
    assert not np.asarray(plain.truncated).any()
    few = prepared(data={"max_train_rows": 2})
    assert len(few.source.feeder.dataset.examples) == 2
    assert prepared(train={"batch_size": 4}).source.at_step(0).index.shape[0] == 4
    swapped = prepared(data={"chosen": "rejected", "rejected": "chosen"}).source.at_step(0)
    np.testing.assert_array_equal(swapped.response_lengths, plain.response_lengths[:, ::-1])
    laid_out = {
        layout: prepared(data={"layout": layout}).source.at_step(0).tokens.shape[0] for layout in ("shared", "plain")
    }
    packed = prepared(data={"row_length": 160}).source.at_step(0).tokens
    assert packed.shape[1] == 160 and len(packed) < laid_out["shared"] == 8 and laid_out["plain"] == 16


def test_zero_steps_mean_one_epoch(prepared):
    assert prepared(train={"steps": 0}).steps == 5 and prepared(train={"steps": 0, "batch_size": 16}).steps == 3


def test_a_loss_without_a_reference_keeps_none(make_config, tiny_train, tmp_path, eval_file, metric_lines):
    out = tmp_path / "run"
    loss = LossOptions(name="simpo")
    summary = tiny_train(make_config(out, loss=loss, data={"eval": str(eval_file)}, train={"save_every": 0}))
    assert not (out / "reference").exists() and summary["eval_loss"] != summary["before_eval_loss"]
    training = [line["loss"] for line in metric_lines(out) if "loss" in line]
    assert training[-1] < training[0]  # the batch of step 5 is that of step 0: five batches are an epoch
    resolved = yaml.safe_load((out / "config.yaml").read_text())["loss"]
    assert (resolved["beta"], resolved["gamma"], resolved["tau"]) == (2.0, 0.5, None)


@pytest.fixture(scope="module")
def cached_run(tmp_path_factory, make_config, tiny_train, eval_file):
    """The run of `dpo_run` with a cached reference: (config, run folder, cache folder)."""
    out, cache = (tmp_path_factory.mktemp("cached") / name for name in ("run", "cache"))
    train = {"eval_every": 3, "eval_batch_size": 4, "keep_checkpoints": 1}
    reference = ReferenceOptions(mode="cached", cache=str(cache))
    config = make_config(out, data={"eval": str(eval_file)}, train=train, reference=reference)
    tiny_train(config)
    return config, out, cache


def test_a_cached_reference_changes_no_number(cached_run, dpo_run, metric_lines):
    _, out, cache = cached_run
    assert len([path for path in cache.glob("*/complete.json")]) == 2  # training and held-out pairs
    found, expected = metric_lines(out), metric_lines(dpo_run[0])
    assert [line.keys() for line in found] == [line.keys() for line in expected]
    for line, other in zip(found, expected, strict=True):
        for name in line:
            np.testing.assert_allclose(line[name], other[name], rtol=1e-4, atol=1e-4, err_msg=name)


def test_a_cached_reference_is_not_computed_again(cached_run, tiny_train, tmp_path, monkeypatch):
    config, _, cache = cached_run
    parts = {path: path.read_bytes() for path in cache.glob("*/*")}
    monkeypatch.setattr(ReferenceCache, "write", None)  # a call would raise
    tiny_train(replace(config, out=str(tmp_path / "again")))
    assert {path: path.read_bytes() for path in cache.glob("*/*")} == parts


def test_a_cache_that_does_not_fit_is_refused_before_training(cached_run, tiny_train, tmp_path, monkeypatch):
    config, _, _ = cached_run
    real = reference_module.score_policy

    def shifted(*inputs):
        scores = real(*inputs)
        return replace(scores, logp=scores.logp + 0.01)

    monkeypatch.setattr(reference_module, "score_policy", shifted)
    with pytest.raises(InputError, match=r"0\.01"):
        tiny_train(replace(config, out=str(tmp_path / "run")))
    assert find_checkpoint(tmp_path / "run") is None


@pytest.mark.slow
def test_a_run_with_a_cached_reference_resumes_without_its_parameters(cached_run, tiny_train, tmp_path, metric_lines):
    config, whole, _ = cached_run
    out = tmp_path / "run"
    kept = replace(config, out=str(out), train=replace(config.train, keep_checkpoints=9))
    tiny_train(kept)
    for step in ("4", "6"):
        shutil.rmtree(out / "checkpoints" / step)
    shutil.rmtree(out / "reference")
    tiny_train(replace(kept, resume=True))
    last = [[line for line in metric_lines(run) if line["step"] == 5 and "loss" in line][-1] for run in (out, whole)]
    assert last[0] == last[1]
    # Without the cache there is nothing to go on with.
    shutil.rmtree(out / "checkpoints" / "6")
    nowhere = replace(kept, resume=True, reference=replace(kept.reference, cache=str(tmp_path / "none")))
    with pytest.raises(InputError, match=r"0 of 40 examples .*begin a new run, or put the cache back"):
        tiny_train(nowhere)


def test_a_reference_that_changed_is_noticed(make_config, tiny_train, tmp_path, dpo_run):
    out = tmp_path / "run"
    config = make_config(out)
    tiny_train(config)
    shutil.rmtree(out / "checkpoints" / "6")
    shutil.rmtree(out / "reference")
    shutil.copytree(out / "checkpoints" / "4", out / "reference")  # whole, with its checksums, but of other weights
    with pytest.raises(InputError, match=r"reference has changed since the run began"):
        tiny_train(replace(config, resume=True))


def test_micro_batches_change_no_number(make_config, tiny_train, tmp_path, dpo_run, metric_lines):
    out = tmp_path / "run"
    tiny_train(make_config(out, train={"accumulate": 4, "save_every": 0}))
    plain = [line["loss"] for line in metric_lines(dpo_run[0]) if "loss" in line]
    np.testing.assert_allclose([line["loss"] for line in metric_lines(out) if "loss" in line], plain, rtol=1e-4)


def test_a_cache_for_a_loss_without_a_reference_is_refused(make_config, tiny_train, tmp_path):
    reference = ReferenceOptions(mode="cached", cache=str(tmp_path))
    with pytest.raises(InputError, match=r"reference\.mode is cached, and simpo.* has no reference"):
        tiny_train(make_config(tmp_path / "run", loss=LossOptions(name="simpo"), reference=reference))


def test_micro_batches_of_a_loss_that_couples_examples_are_refused(make_config, tiny_train, tmp_path):
    config = make_config(tmp_path / "run", loss=LossOptions(name="aot"), train={"accumulate": 2})
    with pytest.raises(InputError, match=r"train\.accumulate 2: aot.* looks at its whole batch"):
        tiny_train(config)


def test_contradicting_options_of_a_loss_are_refused_before_anything_is_read(make_config, tiny_train, tmp_path):
    with pytest.raises(InputError, match=r"gamma 1.0 has no effect with name hinge; simpo reads it"):
        tiny_train(replace(make_config(tmp_path / "run", loss=LossOptions(name="hinge", gamma=1.0)), model="nowhere"))


# Other options are covered by other tests of this file.
@pytest.mark.thin("train-{'seed': 1}")
@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("optimizer", {"learning_rate": 6e-3}),
        ("train", {"seed": 1}),
        ("loss", LossOptions(beta=0.5)),
    ],
    ids=str,
)
def test_options_reach_the_run(section, change, make_config, tiny_train, tmp_path, dpo_run, metric_lines):
    # test_optimizers.py covers every option of the optimizer.
    changes = {"train": {"save_every": 0}}
    changes[section] = {**changes.get(section, {}), **change} if isinstance(change, dict) else change
    tiny_train(make_config(tmp_path / "run", **changes))
    found, plain = (
        [line["loss"] for line in metric_lines(out) if "loss" in line][-1] for out in (tmp_path / "run", dpo_run[0])
    )
    assert abs(found - plain) > 1e-4


def test_a_run_starts_from_an_earlier_run(dpo_run, make_config, tiny_train, tmp_path, arrays_of):
    first = dpo_run[0]
    config = replace(
        make_config(tmp_path / "run", train={"steps": 1}, optimizer=OptimizerOptions(learning_rate=0.0)),
        model=str(first),
    )
    tiny_train(config)
    jax.tree.map(np.testing.assert_array_equal, arrays_of(tmp_path / "run")[0], arrays_of(first)[0])
    assert Path(tmp_path / "run" / "reference").is_dir()


def test_examples_may_be_changed_for_an_ablation(tmp_path, make_config, on_devices, metric_lines):
    def first_token_only(example):
        masks = [np.arange(len(response.ids)) == 0 for response in example.responses]
        responses = zip(example.responses, masks, strict=True)
        return replace(example, responses=tuple(replace(r, action_mask=mask) for r, mask in responses))

    config = make_config(tmp_path / "run", train={"steps": 1})
    with on_devices(1):
        run_module.train(config, Console(quiet=True), change=first_token_only)
        assert metric_lines(tmp_path / "run")[0]["lengths/chosen"] == 1
        with pytest.raises(InputError, match=r"data\.train"):  # a resumed run must have the same examples
            run_module.train(replace(config, resume=True), Console(quiet=True))
