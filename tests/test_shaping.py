"""Values of next states, potential shaping and equivalence of rewards, by hand and on random responses."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax import shaping
from qstar_jax.shaping import shape_rewards, successor_values

# Whole, right-padded, left-padded with a hole, left-padded, empty.
MASKS = jnp.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 1, 1], [0, 0, 0, 0]], bool)
TRUNCATED = jnp.array([True, False, True, False, True])

# Compiled once per shape, which is faster than one by one.
are_equivalent = jax.jit(shaping.are_equivalent, static_argnames="atol")


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def float64(tree):
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), tree)


# Endings.

V = jnp.arange(1.0, 21.0).reshape(5, 4)
FINAL = jnp.array([100.0, 200.0, 300.0, 400.0, 500.0])


def test_successor_values_by_hand():
    ended = [[2, 3, 4, 0], [6, 0, 0, 0], [0, 12, 0, 0], [0, 0, 16, 0], [0, 0, 0, 0]]
    np.testing.assert_array_equal(successor_values(V, MASKS), ended)
    # A row that was not cut does not read its final value.
    cut = [[2, 3, 4, 100], [6, 0, 0, 0], [0, 12, 0, 300], [0, 0, 16, 0], [0, 0, 0, 0]]
    found = successor_values(V, MASKS, truncated=TRUNCATED, final_values=FINAL)
    np.testing.assert_array_equal(found, cut)


def test_successors_of_every_mask_of_five_restated():
    masks = np.array(list(product([False, True], repeat=5)))
    values = np.arange(1.0, 161.0, dtype=np.float32).reshape(32, 5)
    final, cut = -np.arange(1.0, 33.0, dtype=np.float32), np.arange(32) % 2 == 0
    expected = np.zeros_like(values)
    for row, mask in enumerate(masks):
        own = np.flatnonzero(mask)
        expected[row, own] = [*values[row, own[1:]], final[row] * cut[row]][: len(own)]
    found = successor_values(values, masks, truncated=cut, final_values=final)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("given", ["truncated", "final_values"])
def test_half_an_ending_raises(given):
    ends = {"truncated": TRUNCATED, "final_values": FINAL}
    (missing,) = ends.keys() - {given}
    with pytest.raises(ValueError, match=f"{given} is given without {missing}"):
        successor_values(V, MASKS, **{given: ends[given]})


def test_nothing_truncated_is_the_same_as_no_ending_given():
    none = {"truncated": jnp.zeros(5, bool), "final_values": jnp.full(5, jnp.nan)}
    np.testing.assert_array_equal(successor_values(V, MASKS, **none), successor_values(V, MASKS))


# Equivalence of rewards.


def test_shaping_and_equivalence_by_hand():
    # Two responses of two tokens. Phi is 1 at the prompt, 3 and 5 after the two first tokens, and 0 at the end.
    rewards, mask = jnp.array([[1.0, 2.0], [0.0, 4.0]]), jnp.ones((2, 2), bool)
    potentials, ahead = jnp.array([[1.0, 3.0], [1.0, 5.0]]), jnp.array([[3.0, 0.0], [5.0, 0.0]])
    shaped = shape_rewards(rewards, potentials, ahead, mask)
    np.testing.assert_array_equal(shaped, [[1 + 3 - 1, 2 + 0 - 3], [0 + 5 - 1, 4 + 0 - 5]])
    same = are_equivalent(rewards, shaped, mask)
    assert same.equivalent and same.spread == 0
    np.testing.assert_array_equal(same.potentials, potentials)
    # The returns differ by -1 and 0 now, which no potential of the prompt explains.
    other = are_equivalent(rewards, jnp.array([[3.0, -1.0], [4.0, 0.0]]), mask)
    assert not other.equivalent and other.spread == 1


@pytest.fixture
def shaped():
    """Rewards of six responses, and the same after shaping; Phi(s_0) = 1.5 for all, as they share the prompt."""
    mask = jnp.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 1, 1], [0, 1, 0, 0], [1, 1, 1, 0]], bool)
    with jax.enable_x64(True):
        rewards, potentials = float64((normal(0, 6, 4), 5 * normal(1, 6, 4)))
        potentials = jnp.where(mask & (jnp.cumsum(mask, -1) == 1), 1.5, potentials)
        yield rewards, potentials, mask


def shape(rewards, potentials, mask, **ends):
    return shape_rewards(rewards, potentials, successor_values(potentials, mask, **ends), mask)


def test_shaping_is_equivalent_and_the_potential_is_found(shaped):
    rewards, potentials, mask = shaped
    other = shape(*shaped)
    assert not np.allclose(other, jnp.where(mask, rewards, 0))
    found = are_equivalent(rewards, other, mask, atol=1e-12)
    assert found.equivalent and found.spread < 1e-12
    np.testing.assert_allclose(found.potentials, jnp.where(mask, potentials, 0), atol=1e-12)
    rebuilt = shape_rewards(rewards, found.potentials, successor_values(found.potentials, mask), mask)
    np.testing.assert_allclose(rebuilt, other, atol=1e-12)


def test_equivalence_is_symmetric_and_its_potential_changes_sign(shaped):
    rewards, _, mask = shaped
    there, back = are_equivalent(rewards, shape(*shaped), mask), are_equivalent(shape(*shaped), rewards, mask)
    assert there.equivalent and back.equivalent
    np.testing.assert_allclose(there.potentials, -back.potentials, atol=1e-12)
    same = are_equivalent(rewards, rewards, mask, atol=0.0)
    assert same.equivalent and not same.potentials.any()


@pytest.mark.parametrize("token", [(0, 3), (3, 3), (2, 0)])
def test_one_changed_reward_breaks_equivalence(shaped, token):
    rewards, _, mask = shaped
    found = are_equivalent(rewards, shape(*shaped).at[token].add(0.01), mask)
    assert not found.equivalent
    np.testing.assert_allclose(found.spread, 0.01, rtol=1e-9)


def test_atol_is_the_largest_spread_that_passes(shaped):
    rewards, _, mask = shaped
    other = shape(*shaped).at[0, 0].add(0.01)
    assert are_equivalent(rewards, other, mask, atol=0.011).equivalent
    assert not are_equivalent(rewards, other, mask, atol=0.009).equivalent


def test_a_potential_that_is_not_zero_at_the_end_is_no_shaping(shaped):
    rewards, potentials, mask = shaped
    ends = {"truncated": jnp.arange(6) == 2, "final_values": jnp.full(6, 0.5)}
    other = shape(rewards, potentials, mask, **ends)
    assert not are_equivalent(rewards, other, mask).equivalent
    # Where the response was cut it may have any.
    found = are_equivalent(rewards, other, mask, truncated=ends["truncated"])
    assert found.equivalent
    np.testing.assert_allclose(found.potentials, jnp.where(mask, potentials, 0), atol=1e-12)


def test_responses_that_bind_nothing():
    rewards, mask = normal(0, 3, 4), MASKS[:3]
    everything_cut = are_equivalent(rewards, normal(1, 3, 4), mask, truncated=jnp.ones(3, bool))
    assert everything_cut.equivalent and everything_cut.spread == 0
    first = jnp.argmax(mask, -1)
    np.testing.assert_array_equal(everything_cut.potentials[jnp.arange(3), first], 0)
    assert are_equivalent(rewards, normal(1, 3, 4), jnp.zeros((3, 4), bool)).equivalent
    # A single response that ended binds only itself.
    assert are_equivalent(rewards[:1], normal(1, 1, 4), mask[:1]).equivalent
    alone = are_equivalent(rewards, normal(1, 3, 4), mask, truncated=jnp.array([True, False, True]))
    assert alone.equivalent


def test_an_empty_response_binds_nothing(shaped):
    rewards, potentials, mask = shaped
    mask = mask.at[1].set(False)
    found = are_equivalent(rewards, shape(rewards, potentials, mask), mask, atol=1e-12)
    assert found.equivalent
    np.testing.assert_allclose(found.potentials, jnp.where(mask, potentials, 0), atol=1e-12)


def test_responses_that_bind_nothing_do_not_lend_the_others_a_spread():
    rewards, other = jnp.zeros((4, 1)), jnp.full((4, 1), 1000.1)
    mask = jnp.array([[True], [True], [True], [False]])
    assert are_equivalent(rewards[:3], other[:3], mask[:3]).spread == 0
    assert are_equivalent(rewards, other, mask).spread == 0


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_broken_rewards_are_equivalent_to_nothing(bad):
    rewards, mask = normal(0, 3, 4), MASKS[:3]
    assert not are_equivalent(rewards, rewards.at[0, 0].set(bad), mask).equivalent


def test_verdicts_are_of_each_prompt():
    rewards, mask = jnp.zeros((2, 2, 1)), jnp.ones((2, 2, 1), bool)
    found = are_equivalent(rewards, jnp.array([[[1.0], [1.0]], [[1.0], [2.0]]]), mask)
    np.testing.assert_array_equal(found.equivalent, [True, False])
    np.testing.assert_array_equal(found.spread, [0.0, 1.0])
    np.testing.assert_array_equal(found.potentials[0], [[-1.0], [-1.0]])
