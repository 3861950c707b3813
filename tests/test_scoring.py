from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax.config import ComputeOptions
from qstar_jax.data.batches import make_batch
from qstar_jax.data.packing import Shapes
from qstar_jax.scoring import score_policy, score_tokens


@pytest.fixture(scope="module")
def other_params(tiny_params):
    return jax.tree.map(lambda x: x * 1.05 + 0.01, tiny_params)


@pytest.fixture(scope="module")
def score(tiny_model):
    return jax.jit(lambda params, batch: score_policy(tiny_model, params, batch))


def by_hand(logits_of, params, examples):
    """Every response by itself after its prompt: no padding, the whole [S, V] logits, float64 sums."""
    for example in examples:
        for response in example.responses:
            row = jnp.zeros((1, 16), jnp.int32)
            ids = np.concatenate([example.prompt, response.ids])
            logits = logits_of(params, row.at[0, : len(ids)].set(ids), jnp.array([len(ids)]))[0]
            z = np.asarray(logits, np.float64)[len(example.prompt) - 1 : len(ids) - 1]
            logz = np.log(np.exp(z).sum(-1))
            yield np.take_along_axis(z, response.ids[:, None], -1)[:, 0] - logz, logz


LAYOUTS = ["packed", "shared", "plain"]


@pytest.mark.parametrize("attention", ["dense", "blockwise"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_equals_full_logits_response_by_response(
    layout, attention, tiny_model, tiny_params, pair_batch, random_examples
):
    model = replace(tiny_model, compute=ComputeOptions(attention=attention))
    batch = pair_batch(5, layout=layout, fill_to=6, responses=3)
    scores = jax.jit(lambda *x: score_policy(model, *x))(tiny_params, batch)
    np.testing.assert_array_equal(scores.mask, batch.action_mask)
    scores = scores.logp, scores.logz
    assert all(x.dtype == jnp.float32 and x.shape[:2] == (6, 3) for x in scores)
    expected = by_hand(jax.jit(tiny_model.logits), tiny_params, random_examples(5, responses=3))
    for n, values in enumerate(expected):
        for found, value in zip(scores, values, strict=True):
            np.testing.assert_allclose(found[n // 3, n % 3, : len(value)], value, rtol=0, atol=2e-5)
            assert not np.asarray(found[n // 3, n % 3, len(value) :]).any()
    assert not any(np.asarray(x[5:]).any() for x in scores)


def test_layouts_take_as_many_slots_as_they_say(pair_batch, random_examples):
    examples = random_examples(5)
    tokens = sum(len(r.ids) for e in examples for r in e.responses)
    prompts = sum(len(e.prompt) - 1 for e in examples)
    for layout, copies in (("packed", 1), ("shared", 1), ("plain", 2)):
        assert (pair_batch(5, layout=layout).blocks >= 0).sum() == tokens + copies * prompts
    rows = {layout: len(pair_batch(5, layout=layout).tokens) for layout in LAYOUTS}
    assert rows["packed"] < rows["shared"] == 5 and rows["plain"] == 10


@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_ids_change_nothing(layout, tiny_params, pair_batch, score):
    batch = pair_batch(4, layout=layout)
    padding = batch.blocks < 0
    assert padding.any() and not batch.tokens[padding].any()
    # Also where padding is a token that responses contain, such as EOS.
    padded = replace(batch, tokens=jnp.where(padding, 7, batch.tokens))
    one, other = (score(tiny_params, each) for each in (batch, padded))
    np.testing.assert_array_equal(one.logp, other.logp)
    np.testing.assert_array_equal(one.logz, other.logz)


def test_the_other_response_and_the_neighbors_change_nothing(tiny_params, random_examples, score):
    examples = random_examples(4)
    shapes = Shapes.of(examples, batch_size=4, row_length=64, multiple=4)

    def scores(examples):
        return score(tiny_params, jax.tree.map(jnp.asarray, make_batch(examples, shapes))).logp

    before = scores(examples)
    chosen, rejected = examples[1].responses
    other = replace(examples[1], responses=(chosen, replace(rejected, ids=rejected.ids[::-1] % 7 + 3)))
    neighbor = replace(examples[2], prompt=examples[2].prompt[::-1] % 5 + 3)
    after = scores([examples[0], other, neighbor, examples[3]])
    np.testing.assert_array_equal(before[1, 0], after[1, 0])
    np.testing.assert_array_equal(before[jnp.array([0, 3])], after[jnp.array([0, 3])])
    assert (before[1, 1] != after[1, 1]).any() and (before[2] != after[2]).any()


def test_more_room_changes_nothing(tiny_params, pair_batch, score):
    small, wide = pair_batch(4), pair_batch(4, row_length=96)
    assert small.tokens.shape != wide.tokens.shape
    one, other = score(tiny_params, small), score(tiny_params, wide)
    np.testing.assert_allclose(one.logp, other.logp, rtol=0, atol=1e-5)
    np.testing.assert_allclose(one.logz, other.logz, rtol=0, atol=1e-5)


def test_given_reference_equals_live_reference(tiny_model, tiny_params, other_params, pair_batch, score):
    batch = pair_batch(4)
    live = jax.jit(lambda *x: score_tokens(tiny_model, *x))(tiny_params, other_params, batch)
    cached = replace(batch, ref_logp=score(other_params, batch).logp)
    given = jax.jit(lambda params, batch: score_tokens(tiny_model, params, None, batch))(tiny_params, cached)
    np.testing.assert_allclose(live.ref_logp, given.ref_logp, rtol=0, atol=1e-5)
    np.testing.assert_allclose(live.logp, given.logp, rtol=0, atol=1e-5)
    assert np.abs(live.logp - live.ref_logp).max() > 0.1  # the two models do differ
