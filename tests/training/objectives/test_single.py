"""Losses of single responses and of rankings, from files to runs."""

import json
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qstar_jax import losses
from qstar_jax.config import LossOptions, PlanConfig, ReferenceOptions
from qstar_jax.data.batches import make_batch
from qstar_jax.data.mismatches import with_mismatches
from qstar_jax.data.packing import Shapes, plan_batch
from qstar_jax.errors import InputError
from qstar_jax.plan.options import examples_of
from qstar_jax.scoring import score_tokens
from qstar_jax.training.metrics import mean_metrics
from qstar_jax.training.objectives import single_loss_fn, single_objective
from qstar_jax.training.plan import make_plan
from qstar_jax.training.step import TrainState, make_train_step

OUTCOMES = {
    "labels": lambda rng: rng.random() < 0.5,
    "rewards": lambda rng: np.float32(rng.normal()),
    "reference_rewards": lambda rng: rng.normal(size=3).astype(np.float32),
}


@pytest.fixture(scope="module")
def batch_of(random_examples):
    """`batch_of(loss)`: six examples, and two that only fill up, with what the loss reads."""

    def make(loss):
        rng = np.random.default_rng(0)
        examples = random_examples(6, responses=1)
        for example in examples:
            for name in loss.arrays & OUTCOMES.keys():
                example.outcome[name] = np.asarray(OUTCOMES[name](rng))
        if "baseline" in loss.arrays:
            examples = with_mismatches(examples, 64, "data")
        return make_batch(examples, Shapes.of(examples, batch_size=8), fill_to=8)

    return make


@pytest.mark.parametrize("name", ["kto", "implicit_prm", "a_star", "qrpo", ["kto", "implicit_prm"]])
def test_the_mean_over_single_responses(name, batch_of, tiny_model, tiny_params):
    loss = losses.make_loss(name, beta=0.7)
    batch, reference = batch_of(loss), jax.tree.map(lambda x: x * 1.05, tiny_params)
    value, metrics = jax.jit(single_loss_fn(tiny_model, loss))(tiny_params, reference, batch)
    # The same by hand: of each example's own response, its sum of log-ratios.
    scores = score_tokens(tiny_model, tiny_params, reference, batch)
    sums = np.asarray(scores.log_ratios().sum(-1))[:6]
    outcome = {array: value[:6] for array, value in batch.outcome.items()}
    if "baseline" in loss.arrays:
        outcome["baseline"] = jnp.float32(max(sums[:, 1].mean(), 0))
    values = 0
    for term in loss.terms:
        taken = {array: outcome[array] for array in losses.catalog.needed_arrays(term) if array in outcome}
        values += losses.LOSSES[term](scores.log_ratios()[:6, 0], scores.mask[:6, 0], **taken, beta=0.7)[0]
    np.testing.assert_allclose(value, values.mean(), rtol=1e-5)
    means = mean_metrics([jax.device_get(metrics)])
    assert means["loss"] == pytest.approx(float(value), rel=1e-5)
    rewards = 0.7 * sums[:, 0]
    if "labels" in outcome:
        labels = outcome["labels"]
        assert means["rewards/chosen"] == pytest.approx(rewards[labels].mean(), rel=1e-4)
        assert means["rewards/rejected"] == pytest.approx(rewards[~labels].mean(), rel=1e-4)
        threshold = 0.7 * float(outcome.get("baseline", 0.0))
        assert means["rewards/accuracies"] == pytest.approx(((rewards > threshold) == labels).mean())
    else:
        assert means["rewards/completion"] == pytest.approx(rewards.mean(), rel=1e-4)
        assert means["returns"] == pytest.approx(outcome["rewards"].mean(), rel=1e-5)
    assert means.get("kl") == (pytest.approx(float(outcome["baseline"])) if "baseline" in outcome else None)


@pytest.mark.slow
def test_no_gradient_reaches_the_mismatched_responses(batch_of, tiny_model, tiny_params):
    loss = losses.make_loss("kto")
    batch = batch_of(loss)
    grad = jax.grad(lambda params: single_loss_fn(tiny_model, loss)(params, tiny_params, batch)[0])(tiny_params)
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(grad)) > 0
    # At the reference the baseline is 0 whatever the mismatched responses are.
    slots = np.asarray(batch.branches) == 2
    other = np.where(slots, 3, batch.tokens)
    changed = replace(batch, tokens=other)
    again = jax.grad(lambda params: single_loss_fn(tiny_model, loss)(params, tiny_params, changed)[0])(tiny_params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-7), grad, again)


@pytest.mark.slow
def test_micro_batches_share_their_baseline(random_examples, tiny_model, tiny_params):
    """1 x 8 = 2 x 4 = 4 x 2, although the baselines of the micro-batches differ."""
    objective = single_objective(losses.make_loss("kto", beta=0.7))
    examples = random_examples(8, responses=1)
    for index, example in enumerate(examples):
        example.outcome["labels"] = np.asarray(index % 3 == 0)
    examples = with_mismatches(examples, 64, "data")
    reference = jax.tree.map(lambda x: x * 1.05, tiny_params)
    optimizer = optax.sgd(1.0)

    def step(accumulate, prepare):
        parts = [examples[i::accumulate] for i in range(accumulate)]
        shapes = Shapes.of(examples, batch_size=8 // accumulate)
        size = tuple(np.max([plan_batch(part, shapes).size for part in parts], axis=0))
        batches = [make_batch(part, shapes, at_least=size) for part in parts]
        batch = batches[0] if accumulate == 1 else jax.tree.map(lambda *x: jnp.stack(x), *batches)
        train_step = make_train_step(objective.loss_fn(tiny_model), optimizer, accumulate=accumulate, prepare=prepare)
        state = TrainState(jnp.int32(0), tiny_params, optimizer.init(tiny_params), reference)
        state, metrics = jax.jit(train_step)(state, batch)
        return state.params, mean_metrics([jax.device_get(metrics)])

    whole, expected = step(1, None)
    assert expected["kl"] > 0
    for accumulate in (2, 4):
        params, metrics = step(accumulate, objective.prepare(tiny_model))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), whole, params)
        for name in ("loss", "kl", "rewards/accuracies", "grad_norm"):
            assert metrics[name] == pytest.approx(expected[name], rel=1e-4)
    assert step(4, None)[1]["loss"] != pytest.approx(expected["loss"], rel=1e-4)


def test_what_the_objectives_say_of_themselves():
    kto, prm, a_star = (single_objective(losses.make_loss(name)) for name in ("kto", "implicit_prm", "a_star"))
    assert (kto.kind, prm.kind, a_star.kind) == ("labels", "labels", "returns")
    assert (
        kto.mismatches and kto.couples_examples and kto.prepare and not prm.mismatches and not a_star.couples_examples
    )
    assert kto.loss_at_reference == 0.5 and prm.loss_at_reference == pytest.approx(math.log(2))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def text(rng, low=3, high=9):
    return " ".join(f"w{i}" for i in rng.integers(0, 40, rng.integers(low, high)))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files of labels, returns (four responses to a prompt) and rankings of three or four responses."""
    folder, rng = tmp_path_factory.mktemp("singles"), np.random.default_rng(0)
    prompts = [text(rng) for _ in range(6)]
    single = [{"prompt": p, "completion": text(rng), "label": i % 2 == 0} for i in range(4) for p in prompts]
    returns = [{"prompt": row["prompt"], "completion": row["completion"], "reward": rng.normal()} for row in single]
    rankings = [
        {"prompt": p, "completions": [{"response": text(rng), "score": s} for s in range(3 + i % 2)]}
        for i, p in enumerate(prompts * 3)
    ]
    return {
        "labels": write(folder / "labels.jsonl", single),
        "returns": write(folder / "returns.jsonl", returns),
        "rankings": write(folder / "rankings.jsonl", rankings),
    }


@pytest.mark.thin("kto-labels-cached", "qrpo-rankings-live", "plackett_luce-rankings-cached", "a_star-returns-cached")
@pytest.mark.parametrize(
    ("name", "file", "reference"),
    [
        ("kto", "labels", "cached"),
        ("kto", "labels", "live"),
        ("implicit_prm", "labels", "live"),
        ("a_star", "returns", "cached"),
        ("qrpo", "returns", "live"),
        ("qrpo", "rankings", "live"),
        ("plackett_luce", "rankings", "live"),
        ("plackett_luce", "rankings", "cached"),
    ],
)
def test_a_file_of_each_kind_trains(name, file, reference, files, make_config, tiny_train, tmp_path, metric_lines):
    config = make_config(
        tmp_path / "run",
        data={"train": files[file], "eval": files[file]},
        loss=LossOptions(name=name),
        reference=ReferenceOptions(mode=reference, cache=str(tmp_path / "cache")),
        train={"steps": 12, "accumulate": 2 if (name, reference) == ("kto", "cached") else 1, "reference_samples": 4},
    )
    summary = tiny_train(config)
    responses = {"labels": "desirable", "returns": "all", "rankings": "the best" if name == "plackett_luce" else "all"}
    assert summary["verdict"].startswith(f"rewards of {responses[file]} responses ")
    assert summary["eval_rewards/reference_expected"] < 0
    assert math.isfinite(summary["loss"]) and math.isfinite(summary["eval_loss"])
    first, *_, last = (line for line in metric_lines(tmp_path / "run") if "eval_loss" in line)
    assert last["eval_loss"] < first["eval_loss"]


@pytest.mark.slow
def test_options_of_the_command_line_reach_the_loss(files, make_config, tiny_train, tmp_path):
    def loss(out, **options):
        config = make_config(
            tmp_path / out, data={"train": files["returns"]}, loss=LossOptions(name="a_star", **options)
        )
        return tiny_train(config)["loss"]

    assert loss("a") != pytest.approx(loss("b", value_beta=3.0), rel=1e-3)


def test_rewards_do_not_go_with_labels_or_pairs(make_config, tmp_path, files):
    for names in (["a_star", "kto"], ["qrpo", "sigmoid"]):
        with pytest.raises(InputError, match="read rewards of single responses"):
            make_plan(make_config(tmp_path, loss=LossOptions(name=names)))


@pytest.mark.parametrize("name", ["kto", "implicit_prm", "a_star"])
def test_steps_can_be_planned(name, tiny_model, tiny_params):
    examples = examples_of(PlanConfig(model="m", out="o", loss=LossOptions(name=name), prompt_length=5))
    batch = make_batch(examples, Shapes.of(examples, batch_size=len(examples)))
    loss, _ = jax.eval_shape(single_loss_fn(tiny_model, losses.make_loss(name)), tiny_params, tiny_params, batch)
    assert loss.shape == ()
