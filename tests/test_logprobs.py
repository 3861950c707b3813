from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from qstar_jax.logprobs import token_logprobs, token_statistics

B, T, D, V = 3, 10, 8, 97


@pytest.fixture(scope="module")
def inputs():
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (B, T, D))
    table = jax.random.normal(keys[1], (V, D))
    return hidden, table, jax.random.randint(keys[2], (B, T), 0, V)


def naive(hidden, table, targets):
    """The whole [B, T, V] array, in float32."""
    logits = jnp.einsum("btd,vd->btv", hidden.astype(jnp.float32), table.astype(jnp.float32))
    logp = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    return logp, jax.nn.logsumexp(logits, -1)


def weighted(function, targets, hidden, table):
    """A scalar in which every output has its own weight, so that no gradient can be swapped with another."""
    logp, logz = function(hidden, table, targets)
    weights = jnp.arange(1.0, B * T + 1).reshape(B, T) / (B * T)
    return (logp * weights).sum() + (logz * jnp.cos(weights)).sum()


@pytest.mark.parametrize("chunk_size", [1, 3, 5, 10, 128])
def test_equals_log_softmax_of_the_full_logits(inputs, chunk_size):
    # 1, 5, 10 divide the ten positions, 3 does not, and 128 is longer than all of them.
    hidden, table, targets = inputs
    found = token_logprobs(hidden, table, targets, chunk_size=chunk_size)
    for x, y in zip(found, naive(*inputs), strict=True):
        assert x.shape == (B, T) and x.dtype == jnp.float32
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunk_size", [3, 5, 128])
def test_gradients_equal_those_of_the_full_logits(inputs, chunk_size):
    hidden, table, targets = inputs
    kernel = partial(token_logprobs, chunk_size=chunk_size)
    found = jax.grad(partial(weighted, kernel, targets), argnums=(0, 1))(hidden, table)
    expected = jax.grad(partial(weighted, naive, targets), argnums=(0, 1))(hidden, table)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-5)


def test_gradients_equal_finite_differences(inputs):
    hidden, table, targets = inputs

    def loss(hidden, table):  # differences are taken on numpy arrays
        return weighted(partial(token_logprobs, chunk_size=4), targets, jnp.asarray(hidden), jnp.asarray(table))

    with jax.enable_x64(True):
        hidden, table = (jnp.asarray(np.asarray(x), jnp.float64) * 0.3 for x in inputs[:2])
        # The logits are float32 by promise, which bounds what differences can show.
        check_grads(loss, (hidden, table), order=1, modes=["rev"], eps=1e-2, rtol=1e-3)


def test_bfloat16_inputs_accumulate_and_answer_in_float32(inputs):
    hidden, table, targets = inputs
    hidden, table = hidden.astype(jnp.bfloat16), table.astype(jnp.bfloat16)
    found = token_logprobs(hidden, table, targets, chunk_size=4)
    # `naive` multiplies the same rounded numbers in float32: nothing more may be lost than the order of a sum.
    for x, y in zip(found, naive(hidden, table, targets), strict=True):
        assert x.dtype == jnp.float32
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5)


def test_large_logits_do_not_overflow(inputs):
    hidden, table, targets = inputs
    logp, logz = token_logprobs(hidden * 1e3, table * 1e3, targets)
    assert np.isfinite(logp).all() and np.isfinite(logz).all() and (np.asarray(logp) <= 0).all()


def array_sizes(jaxpr) -> set[int]:
    """Sizes of all arrays of a program, those of its inner programs too."""
    sizes = set()
    for equation in jaxpr.eqns:
        sizes |= {int(np.prod(v.aval.shape)) for v in equation.outvars if hasattr(v.aval, "shape")}
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    sizes |= array_sizes(inner)
    return sizes


def test_no_array_of_the_forward_and_backward_pass_has_all_logits():
    batch, length, width, vocabulary, chunk = 2, 64, 4, 1000, 8
    hidden, table = jnp.ones((batch, length, width)), jnp.ones((vocabulary, width))
    targets = jnp.zeros((batch, length), jnp.int32)

    def loss(function, hidden, table):
        logp, logz = function(hidden, table, targets)
        return (logp + logz).sum()

    def largest(function):
        return max(array_sizes(jax.make_jaxpr(jax.grad(partial(loss, function), (0, 1)))(hidden, table).jaxpr))

    assert largest(naive) >= batch * length * vocabulary  # the measure finds the array where it exists
    assert largest(partial(token_logprobs, chunk_size=chunk)) == batch * chunk * vocabulary

    def temporary_bytes(function):
        return jax.jit(jax.grad(partial(loss, function), (0, 1))).lower(hidden, table).compile().memory_analysis()

    whole = batch * length * vocabulary * 4
    assert temporary_bytes(naive).temp_size_in_bytes >= whole
    assert temporary_bytes(partial(token_logprobs, chunk_size=chunk)).temp_size_in_bytes < whole


def wide(vocabulary, positions=96):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(2, positions, 8)), jnp.float32)
    unembedding = jnp.asarray(rng.normal(size=(vocabulary, 8)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, vocabulary, (2, positions)))
    return hidden, unembedding, targets


def plainly(hidden, unembedding, targets, bias=None, softcap=None):
    logits = jnp.einsum("btd,vd->btv", hidden, unembedding) + (0.0 if bias is None else bias)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    logz = jax.nn.logsumexp(logits, -1)
    return jnp.take_along_axis(logits, targets[..., None], -1)[..., 0] - logz, logz, logits


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_values_and_gradients_with_softcap_and_bias(softcap, with_bias):
    hidden, unembedding, targets = wide(50, positions=21)
    bias = jnp.linspace(-2.0, 2.0, 50) if with_bias else None
    weights = jax.random.normal(jax.random.key(0), (2, 2, 21))

    def total(function, hidden, unembedding, bias):
        logp, logz = function(hidden, unembedding, bias)[:2]
        return (weights[0] * logp + weights[1] * logz).sum()

    def ours(hidden, unembedding, bias):
        return token_logprobs(hidden, unembedding, targets, bias=bias, softcap=softcap, chunk_size=8)

    def expected(hidden, unembedding, bias):
        return plainly(hidden, unembedding, targets, bias, softcap)

    for x, y in zip(ours(hidden, unembedding, bias), expected(hidden, unembedding, bias)[:2], strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
    arguments = (0, 1, 2) if with_bias else (0, 1)
    gradients = [
        jax.grad(lambda *x, f=f: total(f, *x), argnums=arguments)(hidden, unembedding, bias) for f in (ours, expected)
    ]
    for x, y in zip(*gradients, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_statistics_equal_those_of_whole_logits(softcap):
    hidden, unembedding, targets = wide(50, positions=21)
    found = token_statistics(hidden, unembedding, softcap=softcap, chunk_size=8)
    logits = plainly(hidden, unembedding, targets, softcap=softcap)[2]
    p = np.asarray(jax.nn.softmax(logits), np.float64)
    np.testing.assert_allclose(found.entropy, -(p * np.log(p)).sum(-1), rtol=1e-4)
    np.testing.assert_allclose(found.mean_logit, logits.mean(-1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.log_sum_sq, np.log((p**2).sum(-1)), rtol=1e-4)
    grad = jax.grad(lambda h: token_statistics(h, unembedding).entropy.sum())(hidden)
    assert not np.asarray(grad).any()


def test_memory_between_the_passes_does_not_grow_with_the_vocabulary():
    """Temporary bytes of value and gradient beyond the gradient of the unembedding itself and one chunk of logits."""

    def excess(vocabulary, chunk_size=8, positions=4096):
        arrays = wide(vocabulary, positions)

        def loss(hidden, unembedding):
            return token_logprobs(hidden, unembedding, arrays[2], chunk_size=chunk_size)[0].sum()

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*arrays[:2]).compile()
        temporary = compiled.memory_analysis().temp_size_in_bytes
        one_chunk = 2 * chunk_size * vocabulary * 4
        return temporary, one_chunk, 2 * positions * vocabulary * 4

    for vocabulary in (1_000, 64_000):
        temporary, one_chunk, whole = excess(vocabulary)
        # A few arrays of one chunk's logits, and of the unembedding's gradient (as large as one of them here).
        assert temporary < 8 * one_chunk + 2**20 < whole / 4
