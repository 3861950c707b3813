import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax.models import cache
from qstar_jax.models.cache import LayerCache

ROWS, TOKENS, HEADS, GROUPS, PROMPT, POOL, WIDTH = 2, 3, 4, 2, 5, 10, 8


def test_a_prompt_and_one_generated_token_by_hand():
    # The scores 0 and ln 3 give the weights 1/4 and 3/4 on the values 0 and 4.
    one = jnp.ones((1, 1, 1, 1))
    layer = LayerCache.from_prompt(0 * one, 0 * one, slots=2).write(np.log(3) * one, 4 * one, jnp.int32(0))
    out = layer.attend(one, jnp.array([[[True]]]), jnp.array([[[True, False]]]), jnp.int32(1), scale=1.0)
    np.testing.assert_allclose(out.ravel(), [3.0], atol=1e-6)


@pytest.mark.parametrize(("part", "parts"), [(2, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("used", [3, 5, 6, 10])
@pytest.mark.parametrize(("scale", "softcap"), [(WIDTH**-0.5, None), (0.7, 1.5)])
def test_decoding_attends_to_prompt_and_own_path_and_reads_no_part_of_the_pool_that_is_empty(
    monkeypatch, part, parts, used, scale, softcap
):
    monkeypatch.setattr(cache, "MIN_CHUNK", part)
    rng = np.random.default_rng(used)
    q = rng.normal(size=(ROWS, TOKENS, HEADS, WIDTH)).astype(np.float32)
    keys, values = rng.normal(size=(2, ROWS, GROUPS, PROMPT + POOL, WIDTH)).astype(np.float32)
    size = next(s for s in -(-POOL * np.arange(1, parts + 1) // parts) if s >= used)
    values[:, :, PROMPT + size :] = np.nan  # a mask would let them through
    prompt_mask = np.broadcast_to(np.arange(PROMPT) < np.array([5, 3])[:, None, None], (ROWS, 1, PROMPT))
    if softcap is not None:  # windows begin elsewhere for each token; one token sees nothing of its prompt
        prompt_mask = prompt_mask & (np.arange(PROMPT) >= np.array([2, 0, 5])[:, None])
    path = (rng.random((ROWS, TOKENS, POOL)) < 0.5) & (np.arange(POOL) < used)
    path[..., used - TOKENS : used] |= np.eye(TOKENS, dtype=bool)  # a token always sees itself
    cut = (keys[:, :, :PROMPT], values[:, :, :PROMPT], keys[:, :, PROMPT:], values[:, :, PROMPT:])
    actual = LayerCache(*map(jnp.asarray, cut)).attend(
        *map(jnp.asarray, (q, prompt_mask, path)), jnp.int32(used), scale=scale, softcap=softcap
    )
    for b, k, h in np.ndindex(ROWS, TOKENS, HEADS):
        seen = np.concatenate([prompt_mask[b, k % prompt_mask.shape[1]], path[b, k]])
        group = h // (HEADS // GROUPS)
        scores = scale * keys[b, group, seen] @ q[b, k, h]
        scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max())
        expected = weights @ values[b, group, seen] / weights.sum()
        np.testing.assert_allclose(actual[b, k, h], expected, rtol=1e-5, atol=1e-5)
