import jax.numpy as jnp
import numpy as np

from qstar_jax.models.masks import PackedMask, right_padded, visible


def test_a_packed_sequence():
    # A prompt, two responses of one token each, another prompt, and padding.
    mask = PackedMask(blocks=jnp.array([[0, 0, 0, 1, -1]]), branches=jnp.array([[0, 1, 2, 0, 0]]))
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]
    np.testing.assert_array_equal(mask.dense()[0], expected)


def test_a_window_of_two_tokens_includes_the_query_itself():
    slots, zeros = jnp.arange(3), jnp.zeros(3, int)
    tokens = (slots, zeros, zeros, slots)  # slot, block, branch, position
    mask = visible(tuple(x[:, None] for x in tokens), tokens, window=2)
    np.testing.assert_array_equal(mask, [[1, 0, 0], [1, 1, 0], [0, 1, 1]])


def test_no_token_attends_to_padding():
    positions, mask = right_padded(jnp.array([2]), 3)
    np.testing.assert_array_equal(positions, [[0, 1, 2]])
    np.testing.assert_array_equal(mask, [[[1, 0, 0], [1, 1, 0], [1, 1, 0]]])
