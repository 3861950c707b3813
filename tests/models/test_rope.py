"""Rotary positions: frequencies and factors beside those of transformers, rotations beside complex numbers."""

import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax.models.rope import Linear, Llama3, LongRope, Rope, Yarn, identity_rotation, rotate, rotation
from qstar_jax.models.rope_keys import scaling_keys

HEAD_DIM, CONTEXT = 16, 32
FACTORS = {"short_factor": (1.0, 1.1, 1.3, 1.6), "long_factor": (1.5, 2.0, 4.0, 8.0)}
SCALINGS = {
    "linear": Linear(4.0),
    "llama3": Llama3(8.0, 1.0, 4.0, CONTEXT),
    "yarn": Yarn(4.0, CONTEXT),
    "yarn, not truncated": Yarn(4.0, CONTEXT, truncate=False),
    "yarn, other bounds": Yarn(8.0, CONTEXT, beta_fast=4.0, beta_slow=0.5),
    "yarn, other factor": Yarn(4.0, CONTEXT, attention_factor=0.9),
    "yarn, two scales": Yarn(4.0, CONTEXT, mscale=0.7, mscale_all_dim=1.2),
    "longrope": LongRope(**FACTORS, original_max_position_embeddings=CONTEXT, factor=4.0),
    "longrope, other factor": LongRope(
        **FACTORS, original_max_position_embeddings=CONTEXT, factor=4.0, attention_factor=1.2
    ),
}


def test_frequencies_and_a_quarter_turn_by_hand():
    np.testing.assert_allclose(Rope(theta=100.0).frequencies(head_dim=4), [1.0, 0.1])
    x, quarter = jnp.array([1.0, 0.0]).reshape(1, 1, 1, 2), (jnp.zeros((1, 1, 1)), jnp.ones((1, 1, 1)))
    np.testing.assert_array_equal(rotate(x, quarter).ravel(), [0.0, 1.0])


@pytest.mark.parity
@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_are_those_of_transformers(name, fraction, long):
    pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = SCALINGS[name]
    if isinstance(scaling, LongRope) and fraction == 1:
        pytest.skip("its lists are made for half of the dimensions")
    keys = {**scaling_keys(scaling), "rope_theta": 500.0, "partial_rotary_factor": fraction}
    config = LlamaConfig(
        hidden_size=4 * HEAD_DIM, num_attention_heads=4, max_position_embeddings=4 * CONTEXT, rope_parameters=keys
    )
    actual = Rope(500.0, fraction, scaling).frequencies(HEAD_DIM, long)
    length = CONTEXT + 1 if long else CONTEXT
    expected, factor = ROPE_INIT_FUNCTIONS[keys["rope_type"]](config, "cpu", seq_len=length)
    np.testing.assert_allclose(actual, expected.numpy(), rtol=1e-6)
    assert scaling.attention_scale == pytest.approx(factor, rel=1e-12)
    plain = Rope(500.0, fraction).frequencies(HEAD_DIM)
    assert not np.allclose(actual, plain)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_pairs_turn_like_complex_numbers(fraction):
    x = np.random.default_rng(0).normal(size=(2, 5, 3, HEAD_DIM)).astype(np.float32)
    positions, rope = np.arange(10).reshape(2, 5), Rope(100.0, fraction, Yarn(4.0, 8))
    actual = rotate(jnp.asarray(x), rotation(rope, HEAD_DIM, jnp.asarray(positions)))
    half = int(HEAD_DIM * fraction) // 2
    turns = np.exp(1j * positions[..., None, None] * rope.frequencies(HEAD_DIM)) * rope.scaling.attention_scale
    turned = (x[..., :half] + 1j * x[..., half : 2 * half]) * turns
    np.testing.assert_allclose(actual[..., :half], turned.real, atol=1e-5)
    np.testing.assert_allclose(actual[..., half : 2 * half], turned.imag, atol=1e-5)
    np.testing.assert_array_equal(actual[..., 2 * half :], x[..., 2 * half :])


def test_the_identity_rotation_changes_nothing():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 3, HEAD_DIM)), jnp.float32)
    some = rotation(Rope(100.0), HEAD_DIM, jnp.broadcast_to(jnp.arange(5), (2, 5)))
    np.testing.assert_array_equal(rotate(x, identity_rotation(some)), x)
