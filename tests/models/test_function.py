"""Models that are given as functions: searched, scored and trained like our own, and in other libraries."""

import inspect
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qstar_jax.api import token_batch
from qstar_jax.decoding.arguments import token_id_tuple
from qstar_jax.decoding.best_of_n import best_of_n
from qstar_jax.decoding.objectives import Likelihood
from qstar_jax.decoding.sampler import sample
from qstar_jax.decoding.sampling import SampleOptions
from qstar_jax.decoding.search.beam import beam_search
from qstar_jax.decoding.search.beam_options import BeamOptions
from qstar_jax.decoding.search.chunks import ChunkOptions, chunk_beam_search
from qstar_jax.decoding.search.exact import exact_search
from qstar_jax.decoding.search.mcts import mcts
from qstar_jax.decoding.search.mcts_options import MctsOptions
from qstar_jax.errors import InputError
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


# What cannot be meant


TABLE = jnp.eye(16)
PAIR = token_batch([[2, 3]], [([5], [6])])


def lookup(params, tokens):
    """Logits of the next token from the last one alone."""
    return params[tokens]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: FunctionModel(TABLE), r"expected a function \(params, tokens\) -> logits"),
        (
            lambda: FunctionModel(TABLE, lookup),
            r"got a \w+, a function: expected a function .* parameters are not part",
        ),
        (lambda: FunctionModel(lambda params, tokens: params[tokens[:, 0]]), r"returned \[2, 16\] for tokens"),
        (lambda: FunctionModel(lambda params, tokens: None), r"returned a NoneType .* expected \[2, \d+, V\]"),
        (lambda: lookup, "wrap a function .* in FunctionModel"),
        (lambda: {"w": TABLE}, "the model comes first, its parameters second"),
    ],
)
def test_what_is_no_model_is_refused(model, message):
    with pytest.raises(InputError, match=message):
        inspect.unwrap(score_tokens)(model(), TABLE, TABLE, PAIR)
    if "returned" in message:
        message = r"for tokens \[1, 2\]"
    with pytest.raises(InputError, match=message):
        beam_search(model(), TABLE, [[2, 3]], [2], BeamOptions(2, 3, (1,)))


def test_a_function_that_fails_says_how_it_was_called():
    model = FunctionModel(lambda tokens, params: params["table"][tokens])
    with pytest.raises(TypeError) as caught:
        score_tokens(model, {"table": TABLE}, None, replace(PAIR, ref_logp=np.zeros(PAIR.index.shape, np.float32)))
    [note] = caught.value.__notes__
    assert note.startswith("FunctionModel called its function as function(params, tokens): params are a dict, tokens ")


@pytest.mark.parametrize("prompt", [[2, 3], [2, 99]])
def test_tokens_that_no_model_has_score_nan(prompt, tiny_model, tiny_params):
    batch = token_batch([prompt, [4]], [([99, 5], [6, 7]), ([8], [9])], layout="plain")
    for model, params in ((FunctionModel(lookup), TABLE), (tiny_model, tiny_params)):
        found = np.asarray(score_tokens(model, params, params, batch).logp)
        unknown = np.isnan(found)
        assert unknown[0, 0, 0] and unknown[0, 1, 0] == (99 in prompt)
        assert np.isfinite(found[1]).all()


@pytest.mark.parametrize(
    ("prompts", "responses", "message"),
    [
        ([[2, 3]], [([-1], [5])], r"responses\[0\]\[0\] holds -1: expected a list of token ids"),
        ([[2.5, 3]], [([4], [5])], r"prompts\[0\] is \[2.5, 3\]: expected a list of token ids"),
        ([[2]], [([4], [])], r"responses\[0\]\[1\] has no token"),
        (["hi"], [("a", "b")], r"responses\[0\]\[0\] is 'a': expected a list of token ids"),
        ([[2], [3]], [[4, 5], [6, 7]], r"responses\[0\]\[0\] is 4: expected a list of token ids"),
        ([[2], [3]], [4, 5], r"responses\[0\] is 4: expected the token ids of each response"),
        ([[2], [3]], [([4], [5]), ([6],)], "1 responses to prompt 1, and 2 to prompt 0"),
        ([[[2], [3, 4]]], [([4], [5])], r"prompts\[0\] is \[\[2\], \[3, 4\]\]"),
    ],
)
def test_what_is_no_list_of_token_ids_is_refused(prompts, responses, message):
    with pytest.raises(InputError, match=message):
        token_batch(prompts, responses)


@pytest.mark.parametrize(
    ("prompts", "lengths", "eos_ids", "message"),
    [
        ([[2, 3]], [3], (1,), r"prompt_lengths\[0\] is 3: expected 1 to 2"),
        ([[2, 3], [4, 5]], [1, 0], (1,), r"prompt_lengths\[1\] is 0: expected 1 to 2"),
        ([[2, 3]], [2, 2], (1,), r"prompt_lengths \[2\]: expected one length for each of 1 prompts"),
        ([2, 3], [2], (1,), r"prompts \[2\]: expected token ids \[B, P\], .*; put the prompt into a list"),
        ([[2, 3], [4]], [2, 1], (1,), "prompts: rows of different lengths"),
        ([[2.0, 3.0]], [2], (1,), r"prompts \[1, 2\] are float"),
        ([[2, -3]], [2], (1,), "the token id -3"),
        ([[2, 3]], [2], (99,), r"eos_ids \(99,\): 99 is none of the 16 tokens"),
    ],
)
def test_prompts_that_cannot_be_searched_are_refused(prompts, lengths, eos_ids, message):
    model, keys = FunctionModel(lookup), jax.random.split(jax.random.key(0), len(prompts))
    drawing, objective = SampleOptions(3, eos_ids, num_samples=2), Likelihood()
    for search in (
        lambda *given: beam_search(*given, BeamOptions(2, 3, eos_ids)),
        lambda *given: mcts(*given, MctsOptions(3, eos_ids, 2, 2)),
        lambda *given: sample(*given, keys, drawing),
        lambda *given: best_of_n(*given, keys, drawing, objective=objective),
        lambda *given: chunk_beam_search(*given, keys, ChunkOptions(3, eos_ids, 2, 2, 2), objective=objective),
    ):
        with pytest.raises(InputError, match=message):
            search(model, TABLE, prompts, lengths)


@pytest.mark.parametrize(
    ("keys", "options", "message"),
    [
        (
            jax.random.key(0),
            SampleOptions(3, (1,)),
            r"keys are of shape \[\]: expected one for each prompt, .*key\(0\), 2",
        ),
        (jax.random.split(jax.random.key(0), 3), SampleOptions(3, (1,)), r"keys are of shape \[3\]: expected one"),
        (jnp.zeros((2, 2), jnp.uint32), SampleOptions(3, (1,)), r"keys are uint32 \[2, 2\]: expected one"),
        (SampleOptions(3, (1,)), jax.random.key(0), r"options are a \w+: expected SampleOptions"),
        (SampleOptions(3, (1,)), SampleOptions(3, (1,)), "keys are a SampleOptions: expected one"),
        (jax.random.key(0), BeamOptions(2, 3, (1,)), "options are a BeamOptions: expected SampleOptions"),
    ],
)
def test_keys_and_options_are_checked_by_name(keys, options, message):
    for search in (sample, partial(best_of_n, objective=Likelihood())):
        with pytest.raises(InputError, match=message):
            search(FunctionModel(lookup), TABLE, [[2, 3], [4, 5]], [2, 1], keys, options)


@pytest.mark.parametrize(
    ("prompt", "eos_ids", "message"),
    [
        ([2.5], (1,), r"prompt \[1\], float64: expected the token ids of one prompt"),
        ([[2, 3]], (1,), r"prompt \[1, 2\], int64: expected the token ids of one prompt"),
        ([], (1,), r"prompt \[0\], float64: expected"),
        ([2, -3], (1,), r"prompt \[2\], int64: expected"),
        ([2, 3], (99,), r"eos_ids \(99,\): 99 is none of the 16 tokens"),
    ],
)
def test_a_prompt_that_cannot_be_searched_exactly_is_refused(prompt, eos_ids, message):
    with pytest.raises(InputError, match=message):
        inspect.unwrap(exact_search)(FunctionModel(lookup), TABLE, prompt, max_new_tokens=2, eos_ids=eos_ids)


def test_lists_are_arrays():
    search = partial(beam_search, FunctionModel(lookup), TABLE)
    ours, theirs = (
        search([[2, 3, -1], [4, 5, 6]], [2, 3], BeamOptions(2, 3, [1])),
        search(jnp.array([[2, 3, 0], [4, 5, 6]]), jnp.array([2, 3]), BeamOptions(2, 3, (1,))),
    )
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    keys = jax.random.split(jax.random.key(0), 2)
    drawn = [
        sample(FunctionModel(lookup), TABLE, prompts, lengths, keys, SampleOptions(3, (1,)))
        for prompts, lengths in (
            ([[2, 3, -1], [4, 5, 6]], [2, 3]),
            (jnp.array([[2, 3, 0], [4, 5, 6]]), jnp.array([2, 3])),
        )
    ]
    np.testing.assert_array_equal(drawn[0].tokens, drawn[1].tokens)
    with pytest.raises(InputError, match="eos_ids 1: expected token ids"):
        inspect.unwrap(token_id_tuple)("eos_ids", 1)
