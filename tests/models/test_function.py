"""Models that are given as functions: searched, scored and trained like our own, and in other libraries."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qstar_jax.api import token_batch
from qstar_jax.decoding.search.beam import beam_search
from qstar_jax.decoding.search.beam_options import BeamOptions
from qstar_jax.decoding.search.mcts import mcts
from qstar_jax.decoding.search.mcts_options import MctsOptions
from qstar_jax.losses import make_loss
from qstar_jax.models import FunctionModel
from qstar_jax.scoring import response_alternatives, score_divergence, score_tokens
from qstar_jax.training.objectives import preference_loss_fn
from qstar_jax.training.step import TrainState, make_train_step

LAYOUTS = ("packed", "shared", "plain")


@pytest.fixture(scope="module")
def batches():
    """Pairs of unequal lengths as a batch of each layout, with the same shapes of scores."""
    rng = np.random.default_rng(0)
    ids = lambda low, high: rng.integers(4, 60, rng.integers(low, high))  # noqa: E731
    prompts = [ids(1, 7) for _ in range(5)]
    responses = [(ids(1, 9), ids(1, 9)) for _ in range(5)]
    return {layout: token_batch(prompts, responses, layout=layout) for layout in LAYOUTS}


@pytest.fixture(scope="module")
def ref_params(tiny_params):
    return jax.tree.map(lambda x: 0.9 * x, tiny_params)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_and_gradients_are_those_of_the_model(layout, batches, tiny_model, tiny_params, ref_params):
    batch = batches[layout]
    function = FunctionModel(tiny_model.logits)
    for score in (score_tokens, score_divergence, lambda *a: response_alternatives(*a, count=3)[1:]):
        ours, theirs = (
            jax.tree.leaves(jax.jit(score, static_argnums=0)(model, tiny_params, ref_params, batch))
            for model in (tiny_model, function)
        )
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a[batch.action_mask], b[batch.action_mask], atol=2e-5)
    loss = make_loss("sigmoid", beta=0.3)
    grads = [
        jax.jit(jax.grad(lambda p, m=m: preference_loss_fn(m, loss)(p, ref_params, batch)[0]))(tiny_params)
        for m in (tiny_model, function)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *grads)


def test_layouts_give_the_same_scores(batches, tiny_model, tiny_params, ref_params):
    scored = [
        score_tokens(FunctionModel(tiny_model.logits), tiny_params, ref_params, batches[layout]) for layout in LAYOUTS
    ]
    for other in scored[1:]:
        np.testing.assert_allclose(other.logp, scored[0].logp, atol=2e-5)


def test_searches_are_those_of_the_model(tiny_model, tiny_params):
    prompts = jnp.array([[1, 5, 9, 0, 0], [1, 7, 8, 11, 30]])
    lengths = jnp.array([3, 5])
    function = FunctionModel(tiny_model.logits)
    for search, options in (
        (beam_search, BeamOptions(beams=3, max_new_tokens=5, eos_ids=(2,))),
        (lambda *a: mcts(*a)[0], MctsOptions(num_simulations=12, num_actions=3, max_new_tokens=4, eos_ids=(2,))),
    ):
        ours, theirs = (search(m, tiny_params, prompts, lengths, options) for m in (tiny_model, function))
        np.testing.assert_array_equal(theirs.tokens, ours.tokens)
        np.testing.assert_allclose(theirs.logp, ours.logp, atol=1e-4)


def test_batches_without_texts_are_refused(batches, tiny_model, tiny_params):
    with pytest.raises(ValueError, match="token_batch"):
        score_tokens(FunctionModel(tiny_model.logits), tiny_params, tiny_params, replace(batches["packed"], texts=None))


@pytest.mark.parametrize(("prompts", "responses"), [([[1]], []), ([[]], [([1], [2])]), ([], [])])
def test_batches_without_tokens_are_refused(prompts, responses):
    with pytest.raises(ValueError, match=r"expected responses|has no token"):
        token_batch(prompts, responses)


# Networks of other libraries


def linen():
    """A causal network in Flax Linen: embeddings, a running mean of the past, and a layer."""
    nn = pytest.importorskip("flax.linen")

    class Network(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(20, 16)(tokens)
            past = jnp.cumsum(x, axis=1) / jnp.arange(1, tokens.shape[1] + 1)[:, None]
            return nn.Dense(20)(nn.tanh(nn.Dense(32)(jnp.concatenate([x, past], -1))))

    network = Network()
    return network.apply, network.init(jax.random.key(0), jnp.zeros((1, 3), jnp.int32))


def equinox():
    """The same in Equinox, whose parameters are the network itself."""
    eqx = pytest.importorskip("equinox")
    keys = jax.random.split(jax.random.key(0), 3)

    class Network(eqx.Module):
        embed: eqx.nn.Embedding
        hidden: eqx.nn.Linear
        out: eqx.nn.Linear

        def __call__(self, tokens):
            x = jax.vmap(self.embed)(tokens)
            past = jnp.cumsum(x, axis=0) / jnp.arange(1, len(tokens) + 1)[:, None]
            return jax.vmap(lambda x: self.out(jnp.tanh(self.hidden(x))))(jnp.concatenate([x, past], -1))

    network = Network(
        eqx.nn.Embedding(20, 16, key=keys[0]), eqx.nn.Linear(32, 32, key=keys[1]), eqx.nn.Linear(32, 20, key=keys[2])
    )
    return lambda params, tokens: jax.vmap(params)(tokens), network


@pytest.mark.parametrize("library", [linen, equinox])
def test_networks_of_other_libraries_learn_preferences_and_are_searched(library):
    apply, params = library()
    model, optimizer = FunctionModel(apply), optax.adam(1e-2)
    batch = token_batch([[3, 4], [5], [6, 7, 8]], [([10, 1], [11, 1]), ([10, 12, 1], [13, 1]), ([10, 1], [14, 15, 1])])
    loss_fn = preference_loss_fn(model, make_loss("sigmoid", beta=0.5))
    step = jax.jit(make_train_step(loss_fn, optimizer))
    state = TrainState(jnp.int32(0), params, optimizer.init(params), params)
    losses = []
    for _ in range(30):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    np.testing.assert_allclose(losses[0], np.log(2), atol=1e-6)
    assert losses[-1] < 0.1
    # Its rewards are the log-ratios of the function itself.
    scores = score_tokens(model, state.params, params, batch)
    text = jnp.array([[6, 7, 8, 14, 15, 1]])
    logp, ref_logp = (jax.nn.log_softmax(apply(p, text))[0] for p in (state.params, params))
    expected = [(logp - ref_logp)[t, token] for t, token in ((2, 14), (3, 15), (4, 1))]
    np.testing.assert_allclose(scores.log_ratios()[2, 1, :3], expected, atol=1e-5)
    # The best response to every prompt begins as the chosen ones do.
    options = BeamOptions(beams=4, max_new_tokens=3, eos_ids=(1,))
    best = beam_search(model, state.params, jnp.array([[3, 4, 0], [6, 7, 8]]), jnp.array([2, 3]), options)
    before = beam_search(model, params, jnp.array([[3, 4, 0], [6, 7, 8]]), jnp.array([2, 3]), options)
    rewards = [r.logp[:, 0] for r in (best, before)]
    assert (np.asarray(rewards[0]) != np.asarray(rewards[1])).all() and (best.tokens[:, 0, 0] == 10).all()
