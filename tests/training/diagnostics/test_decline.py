import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax import mdp
from qstar_jax.config import DataOptions, LossOptions, ReferenceOptions
from qstar_jax.data.feeder import Feeder
from qstar_jax.data.loading import Dataset
from qstar_jax.data.tokenization import Example
from qstar_jax.errors import InputError
from qstar_jax.training import run as run_module
from qstar_jax.training.diagnostics.decline import FILE, Probe, expected_log_ratio, make_probe
from qstar_jax.training.diagnostics.reference_samples import Samples, draw, read_samples, write_samples
from qstar_jax.training.plan import make_plan
from qstar_jax.training.reference import make_scorer

BETA, PROMPT, EOS, DRAWN = 0.5, np.array([1, 9, 20], np.int32), 2, 2048
NAMES = {f"eval_rewards/reference_{name}" for name in ("samples", "samples_stderr", "expected", "expected_stderr")}


def of_reference(metrics):
    return {name: value for name, value in metrics.items() if name.startswith("eval_rewards/reference_")}


@pytest.fixture(scope="module")
def drawn(tiny_model, tiny_params, one_device):
    """Responses of at most two tokens, which can be enumerated."""
    prompts = [PROMPT] * DRAWN
    options = {"seed": 3, "rows": DRAWN // 2, "max_new_tokens": 2, "eos_ids": (EOS,)}
    with jax.set_mesh(one_device):
        return draw(tiny_model, tiny_params, prompts, one_device, **options)


def next_logps(model, params):
    """log pi of the first token [V], and of the second one after each first one [V, V]."""
    vocabulary = model.config.vocab_size
    rows = np.concatenate([np.tile(PROMPT, (vocabulary, 1)), np.arange(vocabulary, dtype=np.int32)[:, None]], axis=1)
    logps = jax.nn.log_softmax(jax.jit(model.logits)(params, jnp.asarray(rows)).astype(jnp.float32))
    return np.asarray(logps[0, len(PROMPT) - 1], np.float64), np.asarray(logps[:, len(PROMPT)], np.float64)


def test_samples_follow_the_reference(drawn, tiny_model, tiny_params):
    first, second = (np.exp(logp) for logp in next_logps(tiny_model, tiny_params))
    found = np.bincount([response.ids[0] for response in drawn], minlength=len(first)) / DRAWN
    assert (np.abs(found - first) < 5 * np.sqrt(first * (1 - first) / DRAWN) + 1 / DRAWN).all()
    assert len(np.unique([response.ids[0] for response in drawn[: DRAWN // 2]])) > 10
    # Batches draw other numbers.
    halves = [[response.ids.tolist() for response in half] for half in (drawn[: DRAWN // 2], drawn[DRAWN // 2 :])]
    assert halves[0] != halves[1]
    likely = int(np.argmax(np.where(np.arange(len(first)) == EOS, 0, first)))
    after = [response.ids[1] for response in drawn if response.ids[0] == likely]
    found = np.bincount(after, minlength=len(first)) / len(after)
    assert (np.abs(found - second[likely]) < 5 * np.sqrt(second[likely] / len(after)) + 1 / len(after)).all()


def test_a_response_ends_with_eos_or_is_truncated(drawn):
    assert {len(response.ids) for response in drawn} == {1, 2}
    for response in drawn:
        assert response.truncated == (response.ids[-1] != EOS)
        assert len(response.ids) == 2 or response.ids[0] == EOS


@pytest.fixture(scope="module")
def probe(drawn, tiny_model, tiny_params, one_device):
    examples = [Example(PROMPT, False, (response,), 0) for response in drawn]
    with jax.set_mesh(one_device):
        feeder = Feeder(Dataset(examples, {}, ""), 512, one_device, DataOptions(layout="packed"), "")
        score = make_scorer(tiny_model, feeder)

        def logps(params):
            return [responses[0] for _, part in score(params, feeder.in_order(), 0) for responses in part]

        yield Probe(Samples(examples, logps(tiny_params)), BETA, logps)


def test_a_policy_that_is_its_reference_has_rewards_of_0(probe, tiny_params):
    found = probe(tiny_params)
    assert found.keys() == NAMES and all(value == 0 for value in found.values())


@pytest.mark.parametrize("distance", [0.03, 0.3])
def test_rewards_of_samples_are_minus_beta_times_the_exact_divergence(probe, distance, tiny_model, tiny_params):
    def move(path, x):
        return x + distance * jax.random.normal(jax.random.fold_in(jax.random.key(5), x.size), x.shape) * jnp.std(x)

    policy = jax.tree_util.tree_map_with_path(move, tiny_params)
    (ref_first, ref_second), (first, second) = (next_logps(tiny_model, p) for p in (tiny_params, policy))
    later = (np.exp(ref_second) * (ref_second - second)).sum(-1)
    later[EOS] = 0  # nothing follows
    exact = -BETA * (np.exp(ref_first) * (ref_first - first + later)).sum()
    # The library's own Eq. 16, for the first token.
    states = [jnp.asarray(x, jnp.float32)[None, None] for x in (first, ref_first)]
    of_first = -BETA * mdp.kl_divergence(*states[::-1], jnp.ones((1, 1), bool))
    np.testing.assert_allclose(of_first[0, 0], -BETA * (np.exp(ref_first) * (ref_first - first)).sum(), rtol=1e-3)

    found = probe(policy)
    for name in ("samples", "expected"):
        mean, error = (found[f"eval_rewards/reference_{name}{end}"] for end in ("", "_stderr"))
        assert mean < 0 and abs(mean - exact) < 4 * error, name
        assert error < 0.5 * abs(exact), name
    # What the control variate is for.
    assert found["eval_rewards/reference_expected_stderr"] < 0.7 * found["eval_rewards/reference_samples_stderr"]


def test_the_estimate_of_few_samples_by_hand():
    # Two samples: the mean, and half of their distance.
    mean, error = expected_log_ratio([np.array([-1.0, 0.5]), np.array([-1.5])])
    assert (mean, error) == pytest.approx((-1.0, 0.5))
    # With what is exactly proportional to its control variate nothing is left but the truth: 0.
    x = np.array([0.1, -0.2, 0.4, -0.3])
    mean, error = expected_log_ratio([np.array([value, -value]) for value in x])
    assert mean == pytest.approx(0) and error == pytest.approx(0)


def test_a_file_of_samples_is_read_as_it_was_written(tmp_path, drawn, tiny_tokenizer):
    rng = np.random.default_rng(0)
    examples = [Example(PROMPT, i == 1, (response,), 7 + i) for i, response in enumerate(drawn[:5])]
    logps = [-rng.random(len(response.ids), np.float32) for response in drawn[:5]]
    path = tmp_path / FILE
    write_samples(path, Samples(examples, logps), tiny_tokenizer)
    found = read_samples(path)
    for old, new in zip(examples, found.examples, strict=True):
        assert (old.row, old.prompt_truncated) == (new.row, new.prompt_truncated)
        assert old.responses[0].truncated == new.responses[0].truncated
        np.testing.assert_array_equal(old.prompt, new.prompt)
        np.testing.assert_array_equal(old.responses[0].ids, new.responses[0].ids)
    for old, new in zip(logps, found.ref_logps, strict=True):
        np.testing.assert_array_equal(old, new)
    assert list(tmp_path.iterdir()) == [path] and "text" in json.loads(path.read_text().splitlines()[0])


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"ref_logp"', '"logp"'),
        lambda text: text.replace('"ref_logp": [', '"ref_logp": [NaN, '),
        lambda text: text.replace('"ref_logp": [', '"ref_logp": [0.0, '),
        lambda text: "",
    ],
)
def test_a_damaged_file_of_samples_is_refused(damage, tmp_path, drawn, tiny_tokenizer):
    path = tmp_path / FILE
    examples = [Example(PROMPT, False, (response,), 0) for response in drawn[:3]]
    write_samples(path, Samples(examples, [np.zeros(len(a.ids), np.float32) for a in drawn[:3]]), tiny_tokenizer)
    path.write_text(damage(path.read_text()))
    with pytest.raises(InputError, match=r"reference_samples\.jsonl: .*restore that file, or delete it"):
        read_samples(path)


# Options shared with other runs here, so that programs are not compiled again.
def sampled(eval_file=None, **train):
    data = {"data": {"eval": str(eval_file)}} if eval_file else {}
    return {**data, "train": {"reference_samples": 6, "eval_every": 2, "eval_batch_size": 4, **train}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, make_config, tiny_train, eval_file):
    """(folder, summary) of a run with held-out rows and samples of the reference."""
    out = tmp_path_factory.mktemp("decline") / "run"
    return out, tiny_train(make_config(out, **sampled(eval_file)))


def test_a_run_logs_samples_at_each_evaluation_and_gives_a_verdict(whole, metric_lines):
    out, summary = whole
    evaluations = [line for line in metric_lines(out) if "loss" not in line]
    assert [line["step"] for line in evaluations] == [0, 2, 4, 6]
    assert all(line.keys() > NAMES and "eval_loss" in line for line in evaluations)
    assert all(value == 0 for value in of_reference(evaluations[0]).values())
    assert len({line["eval_rewards/reference_samples"] for line in evaluations}) == 4
    assert of_reference(summary) == of_reference(evaluations[-1])
    assert summary["verdict"].startswith("rewards of chosen responses ") and "held-out pairs" in summary["verdict"]
    assert "6 samples of the reference" in summary["verdict"] and "\n" not in summary["verdict"]
    assert json.loads((out / "summary.json").read_text()) == summary


def test_samples_are_no_longer_than_responses_of_the_data_and_their_prompts_are_held_out(
    whole, eval_file, tiny_tokenizer
):
    found = read_samples(whole[0] / FILE)
    prompts = {
        tuple(tiny_tokenizer(json.loads(line)["prompt"]).input_ids) for line in eval_file.read_text().splitlines()
    }
    assert len(found.examples) == 6
    assert {tuple(example.prompt.tolist()) for example in found.examples} <= prompts
    assert max(len(logps) for logps in found.ref_logps) <= 9  # eight words and EOS


def test_without_the_option_there_are_no_samples(tmp_path, make_config, tiny_train, whole, eval_file, metric_lines):
    out = tmp_path / "run"
    summary = tiny_train(make_config(out, **sampled(eval_file, reference_samples=0)))
    assert "verdict" not in summary and not of_reference(summary) and not (out / FILE).exists()
    # It is a thermometer: all other numbers are the same.
    plain = [{k: v for k, v in line.items() if k not in NAMES} for line in metric_lines(whole[0])]
    assert metric_lines(out) == plain


def test_without_held_out_rows_prompts_are_those_of_training(tmp_path, make_config, tiny_train, metric_lines):
    out = tmp_path / "run"
    summary = tiny_train(make_config(out, **sampled(reference_samples=4)))
    evaluations = [line for line in metric_lines(out) if "loss" not in line]
    assert [line["step"] for line in evaluations] == [0, 2, 4, 6]
    assert all(line.keys() == NAMES | {"step"} for line in evaluations)
    assert "training pairs" in summary["verdict"] and "4 samples" in summary["verdict"]


@pytest.mark.parametrize("count", [-1, 1])
def test_a_number_of_samples_without_a_meaning_is_refused(count, tmp_path, make_config, tiny_train):
    with pytest.raises(InputError, match=rf"train\.reference_samples is {count}; expected 0, or at least 2"):
        tiny_train(make_config(tmp_path / "run", **sampled(reference_samples=count)))


@pytest.mark.parametrize(
    "change",
    [{"loss": LossOptions(name="simpo")}, {"reference": ReferenceOptions(sync_every=2)}],
    ids=["no reference", "moving reference"],
)
def test_without_a_fixed_reference_there_are_no_samples(change, tmp_path, make_config):
    config = make_config(tmp_path / "run", **sampled(), **change)
    assert make_probe(make_plan(config), *[None] * 5) is None  # nothing is looked at


@pytest.fixture
def half_way(whole, tmp_path):
    """A copy of the whole run that ends at its checkpoint at step 4."""
    out = shutil.copytree(whole[0], tmp_path / "run")
    shutil.rmtree(out / "checkpoints" / "6")
    return out


def test_a_resumed_run_has_the_same_samples_and_numbers(
    half_way, whole, make_config, tiny_train, eval_file, metric_lines
):
    before = (half_way / FILE).read_bytes()
    config = replace(make_config(half_way, **sampled(eval_file, reference_samples=9)), resume=True)
    summary = tiny_train(config)
    assert (half_way / FILE).read_bytes() == before
    assert metric_lines(half_way) == metric_lines(whole[0])
    assert summary["verdict"] == whole[1]["verdict"]


def test_a_resumed_run_continues_without_samples_that_are_missing(half_way, make_config, tiny_train, eval_file):
    (half_way / FILE).unlink()
    summary = tiny_train(replace(make_config(half_way, **sampled(eval_file)), resume=True))
    assert "verdict" not in summary and not of_reference(summary) and summary["steps"] == 6


def test_samples_of_another_reference_are_refused(half_way, make_config, tiny_train, eval_file):
    identity = half_way / "reference_samples.identity.json"
    identity.write_text(json.dumps({"reference": "0" * 64}))
    with pytest.raises(
        InputError, match=r"samples made with reference 0{12}\.\.\., and it is \w{12}.*delete it to continue"
    ):
        tiny_train(replace(make_config(half_way, **sampled(eval_file)), resume=True))


def test_a_run_that_starts_over_draws_again(whole, tmp_path, make_config, tiny_train, eval_file, monkeypatch):
    out = tmp_path / "run"
    out.mkdir()
    (out / FILE).write_text("of a run that never came to a checkpoint")
    monkeypatch.setattr(run_module.Loop, "run", lambda self, state, *_: (state, {}))
    monkeypatch.setattr("qstar_jax.training.diagnostics.decline.sentence", lambda evidence: "")
    monkeypatch.setattr("qstar_jax.training.diagnostics.decline.collect", lambda *args, **options: None)
    tiny_train(make_config(out, **sampled(eval_file)))
    assert (out / FILE).read_bytes() == (whole[0] / FILE).read_bytes()
    tiny_train(make_config(tmp_path / "other", **sampled(eval_file, seed=1)))
    assert (tmp_path / "other" / FILE).read_bytes() != (out / FILE).read_bytes()


@pytest.mark.slow
def test_a_cached_reference_gives_the_same_rewards(whole, tmp_path, make_config, tiny_train, eval_file):
    reference = ReferenceOptions(mode="cached", cache=str(tmp_path / "cache"))
    summary = tiny_train(make_config(tmp_path / "run", **sampled(eval_file), reference=reference))
    expected = of_reference(whole[1])
    for name, value in of_reference(summary).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-3, atol=1e-5, err_msg=name)


def test_beta_is_that_of_the_first_loss_with_a_reference(tmp_path, make_config, tiny_train, eval_file, monkeypatch):
    class Seen(Exception):
        """Enough of the run."""

    def make(*arguments):
        raise Seen(make_probe(*arguments).beta)

    monkeypatch.setattr(run_module, "make_probe", make)
    with pytest.raises(Seen, match=r"0\.7"):
        loss = LossOptions(name=["sft", "dpop"], beta=0.7)
        tiny_train(make_config(tmp_path / "run", loss=loss, **sampled(eval_file)))
