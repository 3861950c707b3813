from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax.scoring import response_logprobs, score_tokens


@pytest.fixture(scope="module")
def other_params(tiny_params):
    return jax.tree.map(lambda x: x * 1.05 + 0.01, tiny_params)


@pytest.fixture(scope="module")
def logprobs(tiny_model):
    return jax.jit(lambda params, batch: response_logprobs(tiny_model, params, batch))


def by_hand(logits_of, params, batch):
    """Every answer by itself: no padding, the whole [S, V] logits, float64 sums."""
    logp, logz = np.zeros(batch.targets.shape), np.zeros(batch.targets.shape)
    for b, r in np.ndindex(batch.tokens.shape[:2]):
        start, length = int(batch.prompt_lengths[b]), int(batch.response_lengths[b, r])
        row = jnp.zeros((1, 16), jnp.int32).at[0, : start + length].set(batch.tokens[b, r, : start + length])
        logits = np.asarray(logits_of(params, row, jnp.array([start + length])), np.float64)[0]
        for t in range(length):
            z = logits[start + t - 1]
            logz[b, r, t] = np.log(np.exp(z - z.max()).sum()) + z.max()
            logp[b, r, t] = z[int(batch.tokens[b, r, start + t])] - logz[b, r, t]
    return logp, logz


def test_equals_full_logits_row_by_row(tiny_model, tiny_params, pair_batch, logprobs):
    batch = pair_batch(4)
    expected = by_hand(jax.jit(tiny_model.logits), tiny_params, batch)
    for found, value in zip(logprobs(tiny_params, batch), expected, strict=True):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, value, rtol=0, atol=2e-5)


def test_padding_ids_change_nothing(tiny_params, pair_batch, logprobs):
    # Also where padding is a token that answers hold, such as EOS.
    for one, other in zip(
        logprobs(tiny_params, pair_batch(4, pad_id=0)), logprobs(tiny_params, pair_batch(4, pad_id=7)), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_more_room_changes_nothing(tiny_params, pair_batch, logprobs):
    small = pair_batch(4)

    def widen(x, extra):
        return jnp.pad(x, ((0, 0), (0, 0), (0, extra)), constant_values=5)

    wide = replace(small, tokens=widen(small.tokens, 16), targets=widen(small.targets, 3))
    for one, other in zip(logprobs(tiny_params, small), logprobs(tiny_params, wide), strict=True):
        np.testing.assert_allclose(one, other[..., :8], rtol=0, atol=1e-5)
        assert (np.asarray(other[..., 8:]) == 0).all()


def test_given_reference_equals_live_reference(tiny_model, tiny_params, other_params, pair_batch, logprobs):
    batch = pair_batch(4)
    live = jax.jit(lambda *x: score_tokens(tiny_model, *x))(tiny_params, other_params, batch)
    cached = replace(batch, ref_logp=logprobs(other_params, batch)[0])
    given = jax.jit(lambda params, batch: score_tokens(tiny_model, params, None, batch))(tiny_params, cached)
    np.testing.assert_allclose(live.ref_logp, given.ref_logp, rtol=0, atol=1e-5)
    np.testing.assert_allclose(live.logp, given.logp, rtol=0, atol=1e-5)
    assert np.abs(live.logp - live.ref_logp).max() > 0.1  # the two models do differ
