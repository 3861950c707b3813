"""Environment tokens are no actions, in any loss, metric or score; what comes after them still depends on them.

The model is a function, whose logits are replaced wherever no action is predicted.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax import losses
from qstar_jax.data.batches import make_batch
from qstar_jax.data.packing import Shapes
from qstar_jax.models import FunctionModel
from qstar_jax.scoring import response_alternatives, score_divergence, score_policy, score_tokens
from qstar_jax.training.objectives import preference, preference_loss_fn, sft_loss_fn, single_loss_fn

VOCABULARY, WIDTH = 60, 8
LABELS, RETURNS = ("kto", "implicit_prm"), ("a_star", "qrpo")
PAIRS = [name for name in losses.LOSSES if name not in (*LABELS, *RETURNS)]
GARBAGE = [np.nan, np.inf, -1e30]


@pytest.fixture(scope="module")
def params():
    keys = jax.random.split(jax.random.key(0), 4)
    policy, reference = (
        {
            "embedding": jax.random.normal(keys[i], (VOCABULARY, WIDTH)),
            "head": jax.random.normal(keys[i + 2], (WIDTH, VOCABULARY)),
        }
        for i in (0, 1)
    )
    return policy, reference


def examples_of(random_dialogues, outcome=()):
    """Pairs of dialogues (where single responses are judged, the second is for their baseline)."""
    examples = random_dialogues(6, seed=3)
    rng = np.random.default_rng(0)
    values = {"labels": [0, 1, 1, 0, 1, 0], "rewards": rng.normal(size=6), "reference_rewards": rng.normal(size=(6, 3))}
    values["labels"] = np.array(values["labels"], bool)
    dtypes = {"labels": bool, "rewards": np.float32, "reference_rewards": np.float32}
    return [
        replace(e, outcome={name: np.asarray(values[name][i], dtypes[name]) for name in outcome})
        for i, e in enumerate(examples)
    ]


def other_words(examples):
    """The same dialogues, in which the environment says something else."""

    def change(response):
        ids = np.where(response.action_mask, response.ids, response.ids % 50 + 5).astype(np.int32)
        return replace(response, ids=ids)

    return [replace(e, responses=tuple(map(change, e.responses))) for e in examples]


def predicts_an_action(examples, shape):
    """Of each token of each text (a prompt with a response): whether the next one is an action."""
    predicts = np.zeros(shape, bool)
    texts = [(e.prompt, r) for e in examples for r in e.responses]
    for row, (prompt, response) in zip(predicts, texts, strict=True):
        row[len(prompt) - 1 + np.flatnonzero(response.action_mask)] = True
    return predicts


def disturbed(batch, garbage):
    """A batch with garbage in all that is said of tokens which are no actions."""
    mask = np.asarray(batch.action_mask)
    return replace(
        batch,
        ref_logp=None if batch.ref_logp is None else np.where(mask, batch.ref_logp, np.float32(garbage)),
        guide_rewards=np.where(mask, batch.guide_rewards, np.float32(garbage)),
        turns=np.where(mask, batch.turns, 7 if garbage > 0 else -1).astype(np.int32),
    )


def batch_of(examples, cached):
    rng, shapes = np.random.default_rng(1), Shapes.of(examples, batch_size=len(examples), row_length=64, texts=True)
    values = [[rng.normal(size=len(r.ids)).astype(np.float32) for r in e.responses] for e in examples]
    return make_batch(examples, shapes, ref_logps=values if cached else None, guide_rewards=values)


def compiled(make_results, examples, batch):
    """`run(params, reference, garbage, batch)` with this garbage in place of logits that predict no action."""
    predicts = predicts_an_action(examples, batch.texts.slots.shape)[..., None]

    @jax.jit
    def run(params, reference, garbage, batch):
        def apply(params, tokens):
            # Each token sees all before it, the environment's too.
            states = jnp.cumsum(params["embedding"][tokens], axis=1) / 4
            return jnp.where(predicts, jnp.tanh(states) @ params["head"], garbage)

        return make_results(FunctionModel(apply), params, reference, batch)

    return run


def check(make_results, examples, params, *, cached=False):
    batch = batch_of(examples, cached)
    run = compiled(make_results, examples, batch)
    expected = run(*params, 0.0, batch)
    jax.tree.map(lambda x: np.testing.assert_array_equal(np.isfinite(x), True), expected)
    for garbage in GARBAGE:
        found = run(*params, garbage, disturbed(batch, garbage))
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    return expected, run(*params, 0.0, batch_of(other_words(examples), cached))


def results_of(loss_fns, gradients=True):
    """Loss and metrics of each of several objectives, and the gradients of them all, or of some."""

    def make_results(model, params, reference, batch):
        results = {}
        for name, make in loss_fns.items():
            if gradients is True or name in gradients:
                results[name] = jax.value_and_grad(make(model), has_aux=True)(params, reference, batch)
        # The others share one pass through the model.
        with pytest.MonkeyPatch.context() as patch:
            for score in (score_policy, score_tokens, score_divergence):
                patch.setattr(preference, score.__name__, cached_call(score))
            for name in loss_fns.keys() - results.keys():
                results[name] = loss_fns[name](model)(params, reference, batch)
        return results

    return make_results


def cached_call(function):
    """The function, which is called once, whatever its arguments."""
    results = []

    def call(*arguments):
        if not results:
            results.append(function(*arguments))
        return results[0]

    return call


def assert_attention_sees(expected, changed):
    for name in expected:
        losses_of = [float(jax.tree.leaves(results[name])[0]) for results in (expected, changed)]
        assert abs(losses_of[0] - losses_of[1]) > 1e-6, name


@pytest.mark.parametrize("cached", [False, True], ids=["live", "cached"])
def test_no_loss_of_pairs_nor_its_metrics_read_the_environment(cached, params, random_dialogues):
    names = [name for name in PAIRS if not (cached and "kl" in losses.make_loss(name).arrays)]
    names = names if not cached else ["sigmoid", "dmpo", "aot"]
    weigh = losses.token_weights.exponential  # read by the loss that weighs tokens
    loss_fns = {
        name: lambda model, name=name: preference_loss_fn(model, losses.make_loss(name), weigh) for name in names
    }
    for name in ("sigmoid", "dmpo"):  # weighted by lengths, which are those of actions
        loss = losses.make_loss(name, ld_alpha=0.5)
        loss_fns[f"{name}, ld_alpha"] = lambda model, loss=loss: preference_loss_fn(model, loss)
    some = ["dmpo"]  # compiled in seconds; see test_every_loss for gradients of the others
    expected, changed = check(results_of(loss_fns, some), examples_of(random_dialogues), params, cached=cached)
    assert_attention_sees(expected, changed)


@pytest.mark.parametrize(("names", "outcome"), [(LABELS, ["labels"]), (RETURNS, ["rewards", "reference_rewards"])])
def test_no_loss_of_single_responses_reads_the_environment(names, outcome, params, random_dialogues):
    loss_fns = {name: lambda model, name=name: single_loss_fn(model, losses.make_loss(name)) for name in names}
    expected, changed = check(results_of(loss_fns), examples_of(random_dialogues, outcome), params)
    assert_attention_sees(expected, changed)


def test_rankings_and_fine_tuning_do_not_read_the_environment(params, random_dialogues):
    ranking = {"ranking": lambda model: preference_loss_fn(model, losses.make_loss("plackett_luce"))}
    expected, changed = check(results_of(ranking), random_dialogues(4, seed=3, responses=3), params)
    assert_attention_sees(expected, changed)
    expected, changed = check(results_of({"sft": sft_loss_fn}), random_dialogues(4, seed=3, responses=1), params)
    assert_attention_sees(expected, changed)


def test_no_score_reads_the_environment(params, random_dialogues):
    def make_results(model, params, reference, batch):
        scores = score_tokens(model, params, reference, batch)
        both, kl = score_divergence(model, params, reference, batch)
        ranked = response_alternatives(model, params, reference, batch, 3)
        return {
            "scores": [scores.logp, scores.ref_logp, scores.logz, both.logp, both.ref_logp, both.logz, kl],
            "values": (scores.rewards(0.5), scores.returns(0.5), scores.q(0.5), scores.v(0.5), scores.advantages(0.5)),
            "alternatives": [jnp.where(batch.action_mask[..., None], x, 0) for x in ranked],
        }

    examples = examples_of(random_dialogues)
    expected, changed = check(make_results, examples, params)
    assert np.abs(expected["values"][1] - changed["values"][1]).max() > 1e-3
    mask = np.asarray(batch_of(examples, False).action_mask)
    for values in (*expected["scores"], *expected["values"]):
        assert values.shape != mask.shape or not np.asarray(values)[~mask].any()
