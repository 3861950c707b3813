from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from qstar_jax.mdp import kl_divergence
from qstar_jax.models.head import Head
from qstar_jax.models.logprobs import reference_kl, token_entropies, token_logprobs, top_logprobs

B, T, D, V = 3, 10, 8, 97
PARTS = {"bias": np.linspace(-2.0, 2.0, V, dtype=np.float32), "softcap": 3.0, "scale": 0.4}
HEADS = {"plain": {}, **{name: {name: part} for name, part in PARTS.items()}, "all": PARTS}


@pytest.fixture(scope="module")
def inputs():
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (B, T, D))
    table = jax.random.normal(keys[1], (V, D))
    return hidden, Head(table), jax.random.randint(keys[2], (B, T), 0, V)


@pytest.fixture(params=HEADS)
def head(request, inputs):
    """The table with one part that heads can have, with none, and with all."""
    return replace(inputs[1], **HEADS[request.param])


def plain_logits(hidden, head):
    """The whole [B, T, V] array, in float32."""
    product = jnp.einsum("btd,vd->btv", hidden.astype(jnp.float32), head.table.astype(jnp.float32))
    logits = head.scale * product + (0.0 if head.bias is None else head.bias)
    return logits if head.softcap is None else head.softcap * jnp.tanh(logits / head.softcap)


def naive(hidden, head, targets):
    logits = plain_logits(hidden, head)
    logp = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    return logp, jax.nn.logsumexp(logits, -1)


def weighted(function, targets, hidden, head):
    """A scalar in which every output has its own weight, so that no gradient can be swapped with another."""
    logp, logz = function(hidden, head, targets)
    weights = jnp.arange(1.0, B * T + 1).reshape(B, T) / (B * T)
    return (logp * weights).sum() + (logz * jnp.cos(weights)).sum()


def test_one_token_by_hand():
    # Logits ln 1 and ln 3: the second token has the probability 3/4.
    hidden, head = jnp.array([[[1.0]]]), Head(jnp.log(jnp.array([[1.0], [3.0]])))
    logp, logz = token_logprobs(hidden, head, jnp.array([[1]]))
    np.testing.assert_allclose([logp[0, 0], logz[0, 0]], [np.log(3 / 4), np.log(4)], rtol=1e-6)


@pytest.mark.parametrize("chunk_size", [1, 3, 5, 10, 128])
def test_equals_log_softmax_of_the_full_logits(inputs, chunk_size):
    # 1, 5, 10 divide the ten positions, 3 does not, and 128 is longer than all of them.
    actual = token_logprobs(*inputs, chunk_size=chunk_size)
    for x, y in zip(actual, naive(*inputs), strict=True):
        assert x.shape == (B, T) and x.dtype == jnp.float32
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunk_size", [3, 5, 128])
def test_gradients_equal_those_of_the_full_logits(inputs, chunk_size):
    hidden, head, targets = inputs
    kernel = partial(token_logprobs, chunk_size=chunk_size)
    actual = jax.grad(partial(weighted, kernel, targets), argnums=(0, 1))(hidden, head)
    expected = jax.grad(partial(weighted, naive, targets), argnums=(0, 1))(hidden, head)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=2e-5), actual, expected)


def test_every_part_of_a_head_is_in_values_and_gradients(inputs, head):
    hidden, _, targets = inputs
    for x, y in zip(token_logprobs(hidden, head, targets, chunk_size=4), naive(hidden, head, targets), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5)
    kernel = partial(token_logprobs, chunk_size=4)
    actual, expected = (jax.grad(partial(weighted, f, targets), argnums=(0, 1))(hidden, head) for f in (kernel, naive))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=2e-5), actual, expected)
    assert (actual[1].bias is None) == (head.bias is None)  # no array for what is not there


@pytest.mark.parametrize("part", PARTS)
def test_every_part_of_a_head_changes_values_and_gradients(inputs, part):
    hidden, plain, targets = inputs
    head = replace(plain, **{part: PARTS[part]})
    loss = jax.value_and_grad(lambda hidden, head: weighted(token_logprobs, targets, hidden, head))
    (value, gradient), (other, other_gradient) = loss(hidden, plain), loss(hidden, head)
    assert abs(value - other) > 0.1 and np.abs(gradient - other_gradient).max() > 0.1


def test_gradients_equal_finite_differences(inputs, head):
    def loss(hidden, head):  # differences are taken on numpy arrays
        return weighted(partial(token_logprobs, chunk_size=4), targets, *jax.tree.map(jnp.asarray, (hidden, head)))

    with jax.enable_x64(True):
        hidden, head = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64) * 0.3, (inputs[0], head))
        targets = inputs[2]
        # The logits are float32 by promise, which bounds what differences can show.
        check_grads(loss, (hidden, head), order=1, modes=["rev"], eps=1e-2, rtol=1e-3)


def test_bfloat16_inputs_accumulate_and_answer_in_float32(inputs, head):
    targets = inputs[2]
    hidden, head = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (inputs[0], head))
    actual = token_logprobs(hidden, head, targets, chunk_size=4)
    # `naive` multiplies the same rounded numbers in float32: nothing more may be lost than the order of a sum.
    for x, y in zip(actual, naive(hidden, head, targets), strict=True):
        assert x.dtype == jnp.float32
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5)


def test_large_logits_do_not_overflow(inputs):
    hidden, head, targets = inputs
    logp, logz = token_logprobs(hidden * 1e3, Head(head.table * 1e3), targets)
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
    hidden, head = jnp.ones((batch, length, width)), Head(jnp.ones((vocabulary, width)), softcap=3.0)
    targets = jnp.zeros((batch, length), jnp.int32)

    def loss(function, hidden, head):
        logp, logz = function(hidden, head, targets)
        return (logp + logz).sum()

    def largest(function):
        return max(array_sizes(jax.make_jaxpr(jax.grad(partial(loss, function), (0, 1)))(hidden, head).jaxpr))

    assert largest(naive) >= batch * length * vocabulary  # the measure finds the array where it exists
    assert largest(partial(token_logprobs, chunk_size=chunk)) == chunk * vocabulary

    def temporary_bytes(function):
        return jax.jit(jax.grad(partial(loss, function), (0, 1))).lower(hidden, head).compile().memory_analysis()

    whole = batch * length * vocabulary * 4
    assert temporary_bytes(naive).temp_size_in_bytes >= whole
    assert temporary_bytes(partial(token_logprobs, chunk_size=chunk)).temp_size_in_bytes < whole


def test_the_most_likely_tokens_are_those_of_each_head(inputs, head):
    hidden, plain, _ = inputs
    ref_hidden, ref_head = jnp.roll(hidden, 1, axis=0), replace(head, table=plain.table[::-1])
    ids, logp, ref_logp = top_logprobs(hidden, head, ref_hidden, ref_head, 4, chunk_size=3)
    policy, reference = (
        np.asarray(jax.nn.log_softmax(plain_logits(*x))) for x in ((hidden, head), (ref_hidden, ref_head))
    )
    expected = np.argsort(-policy, axis=-1, kind="stable")[..., :4]
    np.testing.assert_array_equal(ids, expected)
    for actual, whole in ((logp, policy), (ref_logp, reference)):
        np.testing.assert_allclose(actual, np.take_along_axis(whole, expected, -1), rtol=0, atol=1e-5)


def test_memory_between_the_passes_does_not_grow_with_the_vocabulary():
    """Temporary bytes of value and gradient beyond the gradient of the table itself and one chunk of logits."""

    def excess(vocabulary, chunk_size=16, positions=4096):
        hidden, targets = jnp.ones((2, positions, 8)), jnp.zeros((2, positions), jnp.int32)

        def loss(hidden, head):
            return token_logprobs(hidden, head, targets, chunk_size=chunk_size)[0].sum()

        head = Head(jnp.ones((vocabulary, 8)))
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(hidden, head).compile()
        temporary = compiled.memory_analysis().temp_size_in_bytes
        one_chunk = chunk_size * vocabulary * 4
        return temporary, one_chunk, 2 * positions * vocabulary * 4

    for vocabulary in (1_000, 64_000):
        temporary, one_chunk, whole = excess(vocabulary)
        # A few arrays of one chunk's logits, and of the table's gradient (as large as one of them here).
        assert temporary < 8 * one_chunk + 2**20 < whole / 4


def test_the_divergence_from_a_reference_in_chunks():
    keys = jax.random.split(jax.random.key(0), 4)
    hidden, ref_hidden = (jax.random.normal(key, (2, 5, 8)) for key in keys[:2])
    heads = [Head(jax.random.normal(key, (11, 8))) for key in keys[2:]]
    mask = jnp.ones((2, 5), bool)

    def whole(hidden):
        return kl_divergence(heads[1].logits(ref_hidden), heads[0].logits(hidden), mask)

    def chunked(hidden, chunk_size):
        return reference_kl(hidden, heads[0], ref_hidden, heads[1], chunk_size=chunk_size)

    expected = jax.grad(lambda hidden: (whole(hidden) ** 2).sum())(hidden)
    for chunk_size in (3, 10, 1024):
        np.testing.assert_allclose(chunked(hidden, chunk_size), whole(hidden), rtol=1e-5)
        found = jax.grad(lambda hidden, size: (chunked(hidden, size) ** 2).sum())(hidden, chunk_size)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk_size", [3, 30, 1024])
def test_entropies_in_chunks_are_those_of_whole_logits(chunk_size, inputs, head):
    p = np.asarray(jax.nn.softmax(plain_logits(inputs[0], head)), np.float64)
    expected = -(p * np.log(p)).sum(-1)
    np.testing.assert_allclose(token_entropies(inputs[0], head, chunk_size=chunk_size), expected, rtol=1e-4, atol=1e-5)
