"""Losses that read divergences of whole distributions, or the token rewards of another run."""

import io
import math
import shutil
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from qstar_jax import losses
from qstar_jax.config import LoraOptions, LossOptions, ReferenceOptions, WeightingOptions
from qstar_jax.errors import InputError
from qstar_jax.scoring import response_alternatives, score_divergence, score_tokens
from qstar_jax.training.objectives import preference_loss_fn, preference_objective
from qstar_jax.training.plan import make_plan


@pytest.fixture(scope="module")
def reference(tiny_params):
    return jax.tree.map(lambda x: x * 1.1, tiny_params)


def test_the_divergence_is_that_of_whole_distributions(tiny_model, tiny_params, reference, pair_batch):
    batch = pair_batch(3, fill_to=4)
    scores, kl = score_divergence(tiny_model, tiny_params, reference, batch)
    expected = score_tokens(tiny_model, tiny_params, reference, batch)
    for name in ("logp", "ref_logp", "logz", "mask"):
        np.testing.assert_allclose(getattr(scores, name), getattr(expected, name), rtol=1e-5, atol=1e-5)
    # All tokens of the vocabulary as alternatives spell both distributions out.
    vocabulary = tiny_model.config.vocab_size
    _, logp, ref_logp = response_alternatives(tiny_model, tiny_params, reference, batch, vocabulary)
    by_hand = (np.exp(ref_logp) * (ref_logp - logp)).sum(-1)
    np.testing.assert_allclose(kl, np.where(batch.action_mask, by_hand, 0), rtol=1e-3, atol=1e-6)
    assert kl.max() > 1e-3 and not np.abs(score_divergence(tiny_model, reference, reference, batch)[1]).max() > 1e-6


@pytest.mark.parametrize("name", ["tdpo1", "tdpo2"])
def test_tdpo_is_its_loss_of_the_scores(name, tiny_model, tiny_params, reference, pair_batch):
    batch, loss = pair_batch(4), losses.make_loss(name, beta=0.5)
    found, _ = jax.jit(preference_loss_fn(tiny_model, loss))(tiny_params, reference, batch)
    scores, kl = score_divergence(tiny_model, tiny_params, reference, batch)
    np.testing.assert_allclose(found, loss(scores, kl=kl)[0].mean(), rtol=1e-5)
    assert abs(float(found) - float(losses.make_loss(beta=0.5)(scores)[0].mean())) > 1e-4


@pytest.mark.slow
def test_no_gradient_of_a_divergence_reaches_the_reference(tiny_model, tiny_params, reference, pair_batch):
    loss_fn, batch = preference_loss_fn(tiny_model, losses.make_loss("tdpo1")), pair_batch(2)
    grads = jax.grad(lambda both: loss_fn(*both, batch)[0])((tiny_params, reference))
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(grads[0])) > 0
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(grads[1])) == 0


@pytest.mark.parametrize("rank", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_tdpo_trains_from_the_command_line(rank, make_config, tiny_train, tmp_path, eval_file, metric_lines):
    loss, data = LossOptions(name="tdpo2", alpha=2.0), {"eval": str(eval_file)}
    tiny_train(make_config(tmp_path / "run", loss=loss, data=data, lora=LoraOptions(rank=rank)))
    lines = [line["eval_loss"] for line in metric_lines(tmp_path / "run") if "eval_loss" in line]
    assert lines[0] == pytest.approx(math.log(2), rel=1e-4) and abs(lines[-1] - lines[0]) > 1e-5


def test_a_cached_reference_is_not_enough_for_a_divergence(make_config, tmp_path):
    with pytest.raises(InputError, match=r"reference.mode is cached, and tdpo1.* compares whole distributions"):
        make_plan(make_config(tmp_path, loss=LossOptions(name="tdpo1"), reference=ReferenceOptions(mode="cached")))


@pytest.fixture(scope="module")
def guide(tmp_path_factory, make_config, tiny_train):
    """Folder and summary of a DPO run."""
    out = tmp_path_factory.mktemp("runs") / "guide"
    return out, tiny_train(make_config(out))


@pytest.mark.slow
def test_tgdpo_reads_the_token_rewards_of_a_run(guide, make_config, tiny_train, tmp_path, eval_file):
    cache, (guide, dpo) = tmp_path / "cache", guide

    def run(out, **options):
        settings = ReferenceOptions(guide=str(guide), cache=str(cache), mode="cached")
        loss = LossOptions(name="tgdpo", **options)
        console = Console(record=True, width=400, file=io.StringIO())
        config = make_config(tmp_path / out, loss=loss, reference=settings, data={"eval": str(eval_file)})
        return tiny_train(config, console), console.export_text()

    summary, text = run("first")
    assert f"guide: token rewards of {guide}, beta 0.1" in text and math.isfinite(summary["eval_loss"])
    # Policy and reference of the guide on both files; the reference is also that of the run.
    assert len(list(cache.iterdir())) == 4
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}
    plain, _ = run("second", alpha=0.0)
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()} == before
    assert abs(plain["loss"] - summary["loss"]) > 1e-6
    # Without guidance it is DPO, as the guide was trained.
    assert plain["loss"] == pytest.approx(dpo["loss"], rel=1e-4)


def test_guides_are_refused_by_name(make_config, tiny_train, tmp_path, hf_folder):
    def refusal(name, guide):
        config = make_config(tmp_path, loss=LossOptions(name=name), reference=ReferenceOptions(guide=guide))
        with pytest.raises(InputError) as caught:
            tiny_train(config)
        return str(caught.value)

    assert "needs the folder of a DPO run whose token rewards guide it; set reference.guide" in refusal("tgdpo", None)
    assert "does not read reference.guide x (tgdpo and weighted_sigmoid do)" in refusal("sigmoid", "x")
    assert "has no reference, so it gives no token rewards" in refusal("tgdpo", str(hf_folder))


@pytest.mark.slow
def test_a_run_resumes_with_its_guide_only(guide, make_config, tiny_train, tmp_path):
    moved, out = tmp_path / "guide", tmp_path / "run"
    shutil.copytree(guide[0], moved)
    settings = ReferenceOptions(guide=str(moved), cache=str(tmp_path / "cache"))
    config = make_config(out, loss=LossOptions(name="tgdpo"), reference=settings, resume=False)
    tiny_train(config)
    shutil.rmtree(moved)
    tiny_train(make_config(moved, optimizer={"learning_rate": 1e-2}))
    config = make_config(out, loss=LossOptions(name="tgdpo"), reference=settings, resume=True)
    with pytest.raises(InputError, match=r"reference.guide .* are not those with which the run in .* began"):
        tiny_train(config)


@pytest.fixture(scope="module")
def weighted(guide, make_config, tiny_train, tmp_path_factory):
    """Trains with weights of tokens: `(folder, **weighting) -> summary`; all share one cache of the guide."""
    cache = tmp_path_factory.mktemp("cache")

    def run(out, loss="weighted_sigmoid", **weighting):
        settings = ReferenceOptions(guide=str(guide[0]), cache=str(cache), mode="cached")
        console = Console(record=True, width=400, file=io.StringIO())
        config = make_config(
            out, loss=LossOptions(name=loss), reference=settings, weighting=WeightingOptions(**weighting)
        )
        summary = tiny_train(config, console)
        # Weights are made of log-ratios, whatever the guide's beta is.
        assert f"guide: log-ratios of {guide[0]} at each token, in nats" in console.export_text()
        return summary

    return run


@pytest.fixture(scope="module")
def evenly_weighted(weighted, tmp_path_factory):
    """The summary of a run whose weights are all 1."""
    return weighted(tmp_path_factory.mktemp("even") / "run", transform="select", top=1.0)


@pytest.mark.thin("select", "exponential-5.0", "random-1")
@pytest.mark.parametrize(
    "options",
    [
        {"transform": "select"},
        {"transform": "select", "top": 0.7},
        {"transform": "exponential"},
        {"transform": "exponential", "sharpness": 5.0},
        {"transform": "threshold_and_scale"},
        {"transform": "rank_based"},
        {"transform": "random"},
        {"transform": "random", "control_seed": 1},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_weighted_tokens_train_from_the_command_line(options, evenly_weighted, weighted, guide, tmp_path):
    """The losses are DPO's for weights of 1, and others for any other weights."""
    assert evenly_weighted["loss"] == pytest.approx(guide[1]["loss"], rel=1e-4)
    assert abs(weighted(tmp_path / "run", **options)["loss"] - evenly_weighted["loss"]) > 1e-6


def test_weights_are_those_of_the_guides_log_ratios_in_nats(tiny_model, tiny_params, reference, pair_batch):
    batch = pair_batch(4)
    guide = jax.random.normal(jax.random.key(5), batch.action_mask.shape)
    batch = replace(batch, guide_rewards=guide)
    loss = losses.make_loss("weighted_sigmoid", beta=0.5)
    weigh = partial(losses.TOKEN_WEIGHTS["exponential"], sharpness=2.0)
    found, _ = jax.jit(preference_loss_fn(tiny_model, loss, weigh))(tiny_params, reference, batch)
    scores = score_tokens(tiny_model, tiny_params, reference, batch)
    expected = losses.weighted_sigmoid(scores.log_ratios(), scores.mask, weigh(guide, scores.mask), beta=0.5)[0].mean()
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert preference_objective(loss, weigh).guide_beta == 1.0


@pytest.mark.parametrize(
    ("name", "weighting", "message"),
    [
        ("weighted_sigmoid", {}, "needs weights of tokens; set weighting.transform, to exponential, threshold,"),
        ("sigmoid", {"transform": "select"}, "weighting.transform has no effect with loss.name sigmoid"),
        ("kto", {"transform": "select"}, "weighting.transform has no effect with loss.name kto"),
        (
            ["weighted_sigmoid", "tgdpo"],
            {"transform": "select"},
            "tgdpo reads the guide's rewards and weighted_sigmoid",
        ),
        ("weighted_sigmoid", {"transform": "select", "low": 1.0}, "low 1.0 has no effect with transform select"),
        ("weighted_sigmoid", {"top": 0.5}, "top 0.5 has no effect with transform none"),
        ("weighted_sigmoid", {"transform": "select", "top": 0.0}, r"expected a number in \(0, 1\]"),
        ("weighted_sigmoid", {"transform": "threshold", "low": 2.0}, "low 2.0 must be below weighting.high 1.0"),
        ("weighted_sigmoid", {"transform": "binary"}, "'binary' is unknown; choose from"),
        ("weighted_sigmoid", {"transform": "select"}, "needs the folder of a DPO run"),
    ],
)
def test_weightings_that_have_no_effect_are_refused(name, weighting, message, make_config, tmp_path):
    with pytest.raises(InputError, match=message):
        make_plan(make_config(tmp_path, loss=LossOptions(name=name), weighting=WeightingOptions(**weighting)))
