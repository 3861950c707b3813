"""What a head does to logits reaches everybody who reads them: scoring, the most_likely tokens, searches and trees."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax.decoding.objectives import LogitArithmetic
from qstar_jax.decoding.policies import Ensemble
from qstar_jax.decoding.search.beam import beam_search
from qstar_jax.decoding.search.beam_options import BeamOptions
from qstar_jax.decoding.search.mcts import mcts
from qstar_jax.decoding.search.mcts_options import MctsOptions
from qstar_jax.models import CausalLM
from qstar_jax.models.head import Head
from qstar_jax.models.masks import right_padded
from qstar_jax.scoring import response_alternatives, score_policy

BIAS, SOFTCAP, SCALE = np.linspace(1.0, -1.0, 60, dtype=np.float32), 2.0, 0.5
PROMPT = [1, 9, 30, 4]


@dataclass(frozen=True)
class Shaped(CausalLM):
    """A model whose head has all that heads can have."""

    def head(self, params):
        return Head(super().head(params).table, jnp.asarray(BIAS), SOFTCAP, SCALE)


@pytest.fixture(scope="module")
def shaped(tiny_model):
    return Shaped(tiny_model.model_type, tiny_model.config)


@pytest.fixture(scope="module")
def plain_logits(tiny_model, tiny_params):
    """`plain_logits(ids)`: [S, V] by the formula, in numpy, from the hidden states of a row of at most 16 tokens."""
    hidden_states = jax.jit(lambda *x: tiny_model.hidden_states(tiny_params, *x))
    table = np.asarray(tiny_model.head(tiny_params).table)

    def compute(ids):
        row = jnp.zeros((1, 16), jnp.int32).at[0, : len(ids)].set(jnp.asarray(ids))
        hidden = np.asarray(hidden_states(row, *right_padded(jnp.array([len(ids)]), 16)))[0, : len(ids)]
        return SOFTCAP * np.tanh((SCALE * hidden @ table.T + BIAS) / SOFTCAP)

    return compute


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_two_logits_by_hand():
    head = Head(table=jnp.array([[1.0, 0.0], [0.0, 1.0]]), bias=jnp.array([0.0, -1.0]), scale=2.0)
    np.testing.assert_array_equal(head.logits(jnp.array([1.0, 2.0])), [2.0, 3.0])


def test_a_head_makes_float32_logits_of_any_leading_shape():
    rng = np.random.default_rng(0)
    hidden, table = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((2, 3, 8), (60, 8)))
    head = Head(table, jnp.asarray(BIAS, jnp.bfloat16), SOFTCAP, SCALE)
    product, bias = np.float32(hidden) @ np.float32(table).T, np.float32(head.bias)
    expected = SOFTCAP * np.tanh((SCALE * product + bias) / SOFTCAP)
    for rows, wanted in ((hidden, expected), (hidden[0], expected[0]), (hidden[0, 0], expected[0, 0])):
        logits = head.logits(rows)
        assert logits.dtype == jnp.float32
        np.testing.assert_allclose(logits, wanted, rtol=0, atol=1e-6)


def test_scores_are_of_shaped_logits(shaped, tiny_model, tiny_params, plain_logits, pair_batch, random_examples):
    batch = pair_batch(3)
    scores = jax.jit(lambda *x: score_policy(shaped, *x))(tiny_params, batch)
    ids, top, ref_top = jax.jit(lambda *x: response_alternatives(shaped, *x, count=3))(tiny_params, tiny_params, batch)
    assert np.abs(scores.logp - score_policy(tiny_model, tiny_params, batch).logp).max() > 0.5
    np.testing.assert_array_equal(top, ref_top)  # the same model, by the same head
    for b, example in enumerate(random_examples(3)):
        for r, response in enumerate(example.responses):
            whole = np.concatenate([example.prompt, response.ids])
            logits = plain_logits(whole)[len(example.prompt) - 1 : -1]
            at, expected = (b, r, slice(len(response.ids))), log_softmax(logits)
            np.testing.assert_allclose(
                scores.logp[at], expected[np.arange(len(logits)), response.ids], rtol=0, atol=2e-5
            )
            np.testing.assert_allclose(scores.logz[at], np.log(np.exp(logits).sum(-1)), rtol=0, atol=2e-5)
            most_likely = np.argsort(-expected, axis=-1)[:, :3]
            np.testing.assert_array_equal(ids[at], most_likely)
            np.testing.assert_allclose(top[at], np.take_along_axis(expected, most_likely, -1), rtol=0, atol=2e-5)


def test_logits_prompts_and_paths_are_shaped(shaped, tiny_params, plain_logits):
    ids = [*PROMPT, 17, 5]
    expected = plain_logits(ids)
    np.testing.assert_allclose(shaped.logits(tiny_params, jnp.array([ids]))[0], expected, rtol=0, atol=1e-5)
    first, cache = shaped.prefill(tiny_params, jnp.array([PROMPT]), jnp.array([4]), 1)
    np.testing.assert_allclose(first[0], expected[3], rtol=0, atol=1e-5)
    after, _ = shaped.extend(tiny_params, cache, jnp.array([[17]]), jnp.ones((1, 1, 1), bool), jnp.int32(0))
    np.testing.assert_allclose(after[0, 0], expected[4], rtol=0, atol=1e-5)


@pytest.mark.parametrize("search", ["beams", "tree", "proxy"])
def test_searches_add_up_shaped_logits(search, shaped, tiny_params, plain_logits):
    prompt = (jnp.array([PROMPT]), jnp.array([4]))
    if search == "beams":
        actual = beam_search(shaped, tiny_params, *prompt, BeamOptions(2, 2, ()))
    elif search == "tree":
        actual, _ = mcts(shaped, tiny_params, *prompt, MctsOptions(2, (), num_simulations=4, num_actions=3))
    else:  # base + 1 * (tuned - base): the tuned one
        policies, options = Ensemble((shaped,) * 3), BeamOptions(2, 2, ())
        actual = beam_search(policies, (tiny_params,) * 3, *prompt, options, objective=LogitArithmetic((1.0,)))
    response = np.asarray(actual.tokens[0, 0, : actual.lengths[0, 0]])
    assert len(response) == 2
    expected = log_softmax(plain_logits([*PROMPT, *response]))[3:-1]
    np.testing.assert_allclose(actual.score[0, 0], expected[np.arange(2), response].sum(), rtol=0, atol=2e-5)
