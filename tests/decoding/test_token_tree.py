"""Tables as policies: every path of the pool must lead to the state that its tokens name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax import tabular
from qstar_jax.decoding.policies import Ensemble, Policy
from qstar_jax.decoding.token_tree import TreePolicy

TREE = tabular.TokenTree(vocabulary=3, depth=3, eos=2)
S, V = TREE.shape


def state_of(tokens):
    """Number of the state behind some tokens by TREE's own list, or None behind an end."""
    return TREE.states.index(tuple(tokens)) if tuple(tokens) in TREE.states else None


def row_of(table, tokens):
    state = state_of(tokens)
    return np.zeros(V) if state is None else table[state]


@pytest.fixture(scope="module")
def tables():
    return np.random.default_rng(0).standard_normal((2, S, V))


def test_prompts_walk_down_the_tree(tables):
    prompts = jnp.array([[9, 5, 5], [9, 1, 0]])  # the first token and what lies behind the end mean nothing
    with jax.enable_x64(True):
        logits, _ = TreePolicy(TREE).prefill(jnp.asarray(tables), prompts, jnp.array([1, 3]), 1)
        assert logits.dtype == jnp.float64
    np.testing.assert_array_equal(logits[0], tables[0, 0])
    np.testing.assert_array_equal(logits[1], row_of(tables[1], (1, 0)))
    assert not np.array_equal(logits[1], row_of(tables[1], (0, 1)))


def test_paths_lead_to_their_states(tables):
    """Two tokens at a time; a path is found by its mask alone, and paths share their first tokens."""
    policy = TreePolicy(TREE)
    with jax.enable_x64(True):
        params = jnp.asarray(tables)
        _, memory = policy.prefill(params, jnp.array([[0], [0]]), jnp.array([1, 1]), 4)

        def extend(memory, tokens, paths, slot):
            path = np.zeros((2, 2, 4), bool)
            for k, slots in enumerate(paths):
                path[:, k, slots] = True
            return policy.extend(params, memory, jnp.array(tokens), jnp.array(path), jnp.int32(slot))

        first, memory = extend(memory, [[0, 1], [1, 2]], [[0], [1]], 0)
        second, after = extend(memory, [[1, 1], [0, 1]], [[0, 2], [1, 3]], 2)
        moved = memory.reorder(jnp.array([[1, 0, 2, 3]] * 2))
        swapped, _ = extend(moved, [[1, 1], [0, 1]], [[0, 2], [1, 3]], 2)
    for b, (one, two) in enumerate([((0,), (1,)), ((1,), (2,))]):
        np.testing.assert_array_equal(first[b, 0], row_of(tables[b], one))
        np.testing.assert_array_equal(first[b, 1], row_of(tables[b], two))
    np.testing.assert_array_equal(second[0, 0], row_of(tables[0], (0, 1)))
    np.testing.assert_array_equal(second[0, 1], row_of(tables[0], (1, 1)))
    np.testing.assert_array_equal(second[1, 0], row_of(tables[1], (1, 0)))
    np.testing.assert_array_equal(second[1, 1], np.zeros(V))  # behind EOS
    np.testing.assert_array_equal(swapped[0, 0], row_of(tables[0], (1, 1)))
    assert after.states[0].tolist() == [state_of((0,)), state_of((1,)), state_of((0, 1)), state_of((1, 1))]


def test_one_table_for_all_rows_and_ensembles(tables):
    policy = Ensemble((TreePolicy(TREE),) * 2)
    assert isinstance(policy, Policy) and hash(policy) == hash(Ensemble((TreePolicy(TREE),) * 2))
    one, other = (jnp.asarray(x, jnp.float32) for x in tables)
    (first, second), _ = policy.prefill((one, other), jnp.array([[0, 1], [0, 0]]), jnp.array([2, 2]), 1)
    np.testing.assert_array_equal(first, one[np.array([state_of((1,)), state_of((0,))])])
    np.testing.assert_array_equal(second, other[np.array([state_of((1,)), state_of((0,))])])


def test_tables_of_another_tree_are_refused(tables):
    with pytest.raises(ValueError, match=r"\(2, 3, 3\) does not fit this tree; expected \(7, 3\)"):
        TreePolicy(TREE).prefill(jnp.asarray(tables[:, :3]), jnp.array([[0]] * 2), jnp.array([1, 1]), 1)
