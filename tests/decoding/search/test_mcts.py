"""Tree search against mctx, node for node, against enumeration, and on a transformer."""

import itertools
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax import tabular
from qstar_jax.decoding.objectives import Likelihood, TableReward
from qstar_jax.decoding.policies import Ensemble
from qstar_jax.decoding.responses import Finish
from qstar_jax.decoding.search.action_selection import gumbel_interior, halving_schedule, puct
from qstar_jax.decoding.search.mcts import mcts
from qstar_jax.decoding.search.mcts_options import MctsOptions
from qstar_jax.decoding.search.tree import COMPLETE, UNVISITED
from qstar_jax.decoding.token_tree import TreePolicy
from qstar_jax.demo.equivalence import WithPolicy

TREE = tabular.TokenTree(vocabulary=4, depth=4, eos=3)
ROWS, SIMULATIONS = 12, 40
PUCT = MctsOptions(TREE.depth, (TREE.eos,), SIMULATIONS, TREE.vocabulary)
GUMBEL = replace(PUCT, policy="gumbel", gumbel_scale=0.0)


@pytest.fixture(scope="module")
def tables():
    """log pi of every row's own tree, float64."""
    logits = 1.5 * np.random.default_rng(3).standard_normal((ROWS, *TREE.shape))
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def run(tables, options, root_value=0.0, **more):
    with jax.enable_x64(True):
        prompts, lengths = jnp.zeros((len(tables), 1), jnp.int32), jnp.ones(len(tables), jnp.int32)
        more["root_values"] = jnp.full(len(tables), root_value)
        return jax.device_get(mcts(TreePolicy(TREE), jnp.asarray(tables), prompts, lengths, options, **more))


@pytest.fixture(scope="module", params=[PUCT, GUMBEL], ids=["puct", "gumbel"])
def searched(request, tables):
    return request.param, *run(tables, request.param)


def nodes_by_path(tree, row):
    """{tokens from the root: index of the node}."""
    paths = {0: ()}
    for node in range(1, tree.parents.shape[1]):
        if tree.node_visits[row, node]:
            parent, action = tree.parents[row, node], tree.action_from_parent[row, node]
            paths[node] = (*paths[parent], int(tree.children.tokens[row, parent, action]))
    return {path: node for node, path in paths.items()}


@partial(jax.jit, static_argnums=3)
def mctx_search(tables, values, gumbel, options, rewards):
    import mctx

    values = jnp.broadcast_to(values, tables.shape[:2])
    children = jnp.asarray(np.vstack([TREE.children, np.full(TREE.vocabulary, TREE.shape[0])]))

    def recurrent(_, key, action, state):
        rows = jnp.arange(len(action))
        new, done = children[state, action], state == TREE.shape[0]
        reward = jnp.where(done, 0.0, rewards[rows, jnp.minimum(state, TREE.shape[0] - 1), action])
        end = new == TREE.shape[0]
        prior = jnp.where(end[:, None], 0.0, tables[rows, jnp.minimum(new, TREE.shape[0] - 1)])
        own = jnp.where(end, 0.0, values[rows, jnp.minimum(new, TREE.shape[0] - 1)])
        discount = jnp.where(end, 0.0, 1.0)
        return mctx.RecurrentFnOutput(reward=reward, discount=discount, prior_logits=prior, value=own), new

    state = jnp.zeros(len(tables), children.dtype)
    root = mctx.RootFnOutput(prior_logits=tables[:, 0], value=values[:, 0], embedding=state)
    common = (None, jax.random.key(0), root, recurrent, options.num_simulations)
    if options.policy == "puct":
        numbers = {"pb_c_init": options.pb_c_init, "pb_c_base": options.pb_c_base}
        return mctx.muzero_policy(*common, dirichlet_fraction=0.0, temperature=0.0, **numbers).search_tree
    scaling = {"value_scale": options.value_scale, "maxvisit_init": options.visit_init}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mctx._src.policies.jax.random, "gumbel", lambda *_, **__: gumbel)
        return mctx.gumbel_muzero_policy(
            *common,
            gumbel_scale=1.0,
            max_num_considered_actions=options.considered,
            qtransform=partial(mctx.qtransform_completed_by_mix_value, **scaling),
        ).search_tree


def mctx_trees(tables, options, values=0.0, gumbel=0.0, rewards=None):
    """Trees of mctx on the same tables, an action being a token; with `values` as the nodes' own values.

    Rewards are log pi unless there are others.
    """
    pytest.importorskip("mctx")
    with jax.enable_x64(True):
        rewards = jnp.asarray(tables if rewards is None else rewards)
        gumbel = jnp.zeros((len(tables), TREE.vocabulary)) + gumbel
        return jax.device_get(mctx_search(jnp.asarray(tables), jnp.asarray(values), gumbel, options, rewards))


def assert_same_trees(tree, other):
    """All nodes that are no responses' ends: visits and values, and what is known of their edges."""
    for row in range(ROWS):
        ours = nodes_by_path(tree, row)
        parents, actions = other.parents[row], other.action_from_parent[row]
        paths = {0: ()}
        for node in range(1, len(parents)):
            if other.node_visits[row, node]:
                paths[node] = (*paths[parents[node]], int(actions[node]))
        theirs = {path: node for node, path in paths.items() if path in TREE.states}
        assert ours.keys() == theirs.keys()
        for path, node in ours.items():
            twin = theirs[path]
            assert tree.node_visits[row, node] == other.node_visits[row, twin], path
            np.testing.assert_allclose(tree.node_values[row, node], other.node_values[row, twin], rtol=0, atol=1e-12)
            tokens = tree.children.tokens[row, node]
            np.testing.assert_array_equal(tree.children.visits[row, node], other.children_visits[row, twin, tokens])
            visited = tree.children.visits[row, node] > 0
            np.testing.assert_allclose(
                tree.children.rewards[row, node][visited],
                other.children_rewards[row, twin, tokens][visited],
                rtol=0,
                atol=1e-12,
            )
            leads_to_node = tree.children.index[row, node] >= 0
            np.testing.assert_array_equal(
                tree.children.index[row, node][leads_to_node],
                other.children_index[row, twin, tokens][leads_to_node],
            )


def test_trees_are_those_of_mctx(searched, tables):
    options, _, tree = searched
    other = mctx_trees(tables, options)
    assert_same_trees(tree, other)
    wasted = sum((other.node_visits[row] > 0).sum() - len(nodes_by_path(tree, row)) for row in range(ROWS))
    assert wasted > ROWS  # mctx made nodes behind ends too, so the comparison has left something out
    with pytest.raises(AssertionError):
        assert_same_trees(tree, mctx_trees(tables, options, values=1.0))


@pytest.mark.parametrize("options", [PUCT, GUMBEL], ids=["puct", "gumbel"])
def test_trees_with_rewards_and_values_are_those_of_mctx(options, tables):
    rng = np.random.default_rng(5)
    rewards, values = rng.standard_normal(tables.shape), rng.standard_normal(tables.shape[:2])
    behind = np.pad(values, ((0, 0), (0, 1)))[:, TREE.children]  # 0 behind an end
    with jax.enable_x64(True):
        prompts, lengths = jnp.zeros((ROWS, 1), jnp.int32), jnp.ones(ROWS, jnp.int32)
        params = tuple(map(jnp.asarray, (tables, rewards, np.zeros_like(rewards), behind)))
        more = {"objective": WithPolicy(TableReward(1.0)), "root_values": jnp.asarray(values[:, 0])}
        model = Ensemble((TreePolicy(TREE),) * 4)
        _, tree = jax.device_get(mcts(model, params, prompts, lengths, options, **more))
    assert_same_trees(tree, mctx_trees(tables, options, values, rewards=rewards))
    with pytest.raises(AssertionError):
        assert_same_trees(tree, mctx_trees(tables, options, 0 * values, rewards=rewards))


@pytest.mark.slow
def test_other_numbers_are_those_of_mctx(tables):
    _, tree = run(tables, other := replace(PUCT, pb_c_init=2.0, pb_c_base=5.0))
    assert_same_trees(tree, mctx_trees(tables, other))


@pytest.mark.slow
def test_noise_and_other_numbers_are_those_of_mctx(tables):
    """The draws of noise are not mctx's, so they are read off the tree and put in their place there."""
    options = replace(GUMBEL, gumbel_scale=2.0, considered=2, value_scale=0.5, visit_init=3.0)
    (_, tree), (_, other) = run(tables, options, key=jax.random.key(4)), run(tables, options, key=jax.random.key(5))
    gumbel = np.zeros((ROWS, TREE.vocabulary))
    np.put_along_axis(gumbel, tree.children.tokens[:, 0], tree.root_gumbel, axis=-1)
    assert_same_trees(tree, mctx_trees(tables, options, gumbel=gumbel))
    assert ((tree.children.visits[:, 0] > 0).sum(-1) == 2).all()
    assert (tree.node_visits != other.node_visits).any()
    assert 1 < tree.root_gumbel.std() / (np.pi / np.sqrt(6)) < 3  # noise of twice the usual size


def test_each_number_changes_a_choice(tables):
    """Of the rules alone, at the root and at the first node, since each number would be a program of its own."""
    _, tree = run(tables, PUCT)

    def choices(rule, **numbers):
        with jax.enable_x64(True):
            choose = jax.jit(lambda tree, node, **numbers: rule(tree.at(node), **numbers))
            return np.stack([choose(tree, jnp.full(ROWS, node), **numbers) for node in (0, 1)])

    for rule, numbers, others in [
        (puct, {"pb_c_init": 1.25, "pb_c_base": 19652.0}, {"pb_c_init": 50.0, "pb_c_base": 1e-9}),
        (gumbel_interior, {"value_scale": 0.1, "visit_init": 50.0}, {"value_scale": 9.0, "visit_init": 1e4}),
    ]:
        usual = choices(rule, **numbers)
        for name, value in others.items():
            assert (choices(rule, **(numbers | {name: value})) != usual).any(), name
        np.testing.assert_array_equal(choices(rule, **numbers), usual)


def test_bookkeeping(searched, tables):
    """Each tree is one: sums, depths and counts, by walking every path in plain Python."""
    _, _, tree = searched
    for row in range(ROWS):
        paths = nodes_by_path(tree, row)
        assert tree.node_visits[row, 0] == SIMULATIONS + 1
        for path, node in paths.items():
            states = [TREE.states.index(path[:t]) for t in range(len(path))]
            expected = sum(tables[row, s, token] for s, token in zip(states, path, strict=True))
            np.testing.assert_allclose(tree.prefixes.total[row, node], expected, rtol=0, atol=1e-12)
            np.testing.assert_allclose(tree.prefixes.logp[row, node], expected, rtol=0, atol=1e-12)
            assert tree.prefixes.lengths[row, node] == len(path)
            assert tuple(tree.prefixes.tokens[row, node, : len(path)]) == path
            assert tree.node_visits[row, node] == 1 + tree.children.visits[row, node].sum()
            table = tables[row, TREE.states.index(path)]
            order = np.argsort(-table)
            np.testing.assert_array_equal(tree.children.tokens[row, node], order)
            np.testing.assert_allclose(tree.children.prior_logits[row, node], table[order], rtol=0, atol=1e-12)
        unvisited = sum((tree.children.index[row, node] == UNVISITED).sum() for node in paths.values())
        assert tree.unvisited[row] == unvisited


def responses_of(tree, tables, row):
    """Every response whose end was visited with its score, best first, from the tree's edges and the tables."""
    found = []
    for path, node in nodes_by_path(tree, row).items():
        for token, child in zip(tree.children.tokens[row, node], tree.children.index[row, node], strict=True):
            if child == COMPLETE:
                response = (*path, int(token))
                score = sum(tables[row, TREE.states.index(response[:t]), response[t]] for t in range(len(response)))
                found.append((response, score))
    return sorted(found, key=lambda item: -item[1])


def test_responses_are_all_the_ends_that_were_visited(searched, tables):
    _, found, tree = searched
    for row in range(ROWS):
        expected = responses_of(tree, tables, row)
        count = int((found.finish[row] != Finish.INVALID).sum())
        assert 0 < count == len(expected) < SIMULATIONS
        for n, (response, score) in enumerate(expected):
            assert tuple(found.tokens[row, n, : found.lengths[row, n]]) == response
            assert not found.tokens[row, n, found.lengths[row, n] :].any()
            np.testing.assert_allclose([found.score[row, n], found.logp[row, n]], score, rtol=0, atol=1e-12)
            assert found.finish[row, n] == (Finish.EOS if response[-1] == TREE.eos else Finish.LENGTH)
        assert (found.score[row, count:] == -np.inf).all() and (found.lengths[row, count:] == 0).all()
    assert {Finish.EOS, Finish.LENGTH} <= set(found.finish.ravel().tolist())


def exhaustive(table):
    paths = TREE.paths
    sums = np.where(paths.mask, table[paths.states, paths.tokens], 0).sum(-1)
    best = sums.argmax()
    return tuple(paths.tokens[best][paths.mask[best]].tolist()), sums[best]


@pytest.mark.slow
def test_enough_simulations_find_the_best_response(tables):
    """With all of the tree's edges visited it must; the search of a row is over then, though others go on."""
    tables = np.where(np.arange(ROWS)[:, None, None] % 2, 0.1, 1.0) * tables  # every second row is nearly flat
    tables -= np.log(np.exp(tables).sum(-1, keepdims=True))
    options = replace(PUCT, num_simulations=1000, n_best=1, pb_c_init=100.0)
    (full, tree), (few, _) = run(tables, options), run(tables, replace(PUCT, num_simulations=1))
    wrong = 0
    for row in range(ROWS):
        response, score = exhaustive(tables[row])
        assert tuple(full.tokens[row, 0, : full.lengths[row, 0]]) == response
        np.testing.assert_allclose(full.score[row, 0], score, rtol=0, atol=1e-12)
        wrong += tuple(few.tokens[row, 0, : few.lengths[row, 0]]) != response
    assert wrong  # one simulation is not enough
    done = tree.unvisited == 0
    assert done[1::2].all() and not done.all()
    used = tree.node_visits[:, 0] - 1
    assert (used[done] < 1000).all() and (used[~done] == 1000).all()
    assert ((tree.node_visits > 0).sum(-1)[done] == TREE.shape[0]).all()


def test_rows_do_not_depend_on_each_other(searched, tables):
    options, found, tree = searched
    shuffled, other = run(np.roll(tables, 5, axis=0), options)
    np.testing.assert_array_equal(shuffled.tokens, np.roll(found.tokens, 5, axis=0))
    np.testing.assert_array_equal(other.node_values, np.roll(tree.node_values, 5, axis=0))


def test_most_visited_path(searched):
    _, _, tree = searched
    with jax.enable_x64(True):
        last = jax.jit(lambda tree: tree.most_visited())(tree)
    for row in range(ROWS):
        next_node, path = 0, []
        while next_node >= 0:
            node = next_node
            action = tree.children.visits[row, node].argmax()
            path.append(int(tree.children.tokens[row, node, action]))
            next_node = tree.children.index[row, node, action]
        assert last[row] == node
        prefix = tree.prefixes.tokens[row, node, : tree.prefixes.lengths[row, node]]
        assert prefix.tolist() == path[:-1]  # what leads on from the node is no node


def test_without_a_visited_end_the_path_is_finished_greedily(tables):
    """One simulation makes one node, or finds the empty response."""
    found, _ = run(tables, replace(PUCT, num_simulations=1))
    greedy = 0
    for row in range(ROWS):
        path = [int(tables[row, 0].argmax())]
        while path[-1] != TREE.eos and len(path) < TREE.depth:
            path.append(int(tables[row, TREE.states.index(tuple(path))].argmax()))
        score = sum(tables[row, TREE.states.index(tuple(path[:t])), path[t]] for t in range(len(path)))
        greedy += len(path) > 1
        assert tuple(found.tokens[row, 0, : found.lengths[row, 0]]) == tuple(path)
        np.testing.assert_allclose([found.score[row, 0], found.logp[row, 0]], score, rtol=0, atol=1e-12)
        assert found.finish[row, 0] == (Finish.EOS if path[-1] == TREE.eos else Finish.LENGTH)
    assert greedy > ROWS // 2


def test_the_value_of_the_root_counts(tables):
    (_, tree), (_, other) = run(tables, PUCT), run(tables, PUCT, root_value=-30.0)
    assert (other.raw_values[:, 0] == -30).all() and (tree.raw_values[:, 0] == 0).all()
    assert (tree.node_visits != other.node_visits).any()


def test_fewer_actions_than_tokens(tables):
    """The most likely two: rewards stay those of the whole vocabulary, priors are of the two."""
    found, tree = run(tables, replace(PUCT, num_actions=2))
    order = np.argsort(-tables[:, 0])[:, :2]
    np.testing.assert_array_equal(tree.children.tokens[:, 0], order)
    top = np.take_along_axis(tables[:, 0], order, axis=-1)
    np.testing.assert_allclose(tree.children.rewards[:, 0], top, rtol=0, atol=1e-12)
    np.testing.assert_allclose(np.exp(tree.children.prior_logits[:, 0]).sum(-1), 1.0, rtol=0, atol=1e-12)
    assert not np.allclose(tree.children.prior_logits[:, 0], top)
    assert found.logp.shape == (ROWS, SIMULATIONS)


def test_impossible_tokens_change_nothing(tables):
    """Where only two tokens are possible, four actions grow the trees of two; dead ends are no responses."""
    possible = np.array(tables)
    possible[..., 1:3] = -np.inf
    possible -= np.log(np.exp(possible).sum(-1, keepdims=True))
    for options in (PUCT, GUMBEL):
        (found, tree), (other, twin) = run(possible, options), run(possible, replace(options, num_actions=2))
        np.testing.assert_array_equal(tree.node_visits, twin.node_visits)
        np.testing.assert_array_equal(found.tokens, other.tokens)
        assert ((found.finish > 0).sum(-1) <= 5).all()  # responses of at most 4 tokens, 0 or EOS
        assert (tree.unvisited == 0).any()
        assert not np.isin(found.tokens[found.finish > 0], (1, 2)).any()
    dead = np.array(possible)
    dead[:, TREE.states.index((0,))] = -np.inf
    found, tree = run(dead, PUCT)
    assert np.isfinite(tree.node_values).all()
    assert ((found.finish > 0).sum(-1) == 1).all() and (found.tokens[:, 0, 0] == TREE.eos).all()


def test_a_transformer_is_searched(micro, log_pi):
    """Scores are those of whole passes, so every node sees its own past; the last two rows are finished greedily."""
    model, params = micro
    params = jax.tree.map(lambda x: 0.5 * x, params)  # less sure of itself
    prompts = np.array([[0, 2, 2, 4], [2, 4, 2, 1], [3, 4, 4, 1], [1, 3, 2, 1]])  # the last column is padding
    options = MctsOptions(6, (0,), 12, 3, n_best=8)
    found, tree = jax.device_get(mcts(model, params, jnp.asarray(prompts), jnp.full(4, 3), options))
    ends = (tree.children.index == COMPLETE).sum((1, 2))
    assert ends.tolist() == [3, 3, 0, 0] and tree.prefixes.lengths.max() > 2
    inside = np.arange(6) < found.lengths[..., None]

    def scores(prompt, row):
        return np.where(inside[row], log_pi(model, params, prompt, found.tokens[row]), 0).sum(-1)

    for row, prompt in enumerate(prompts[:, :3].tolist()):
        valid = found.finish[row] > 0
        assert valid.sum() == max(ends[row], 1) and valid[0]
        for ours in (found.score, found.logp):
            np.testing.assert_allclose(ours[row][valid], scores(prompt, row)[valid], rtol=0, atol=2e-5)
        assert np.abs(scores([4, 4, 1], row) - found.score[row])[valid].max() > 1e-2
    for row, finish in ((2, Finish.EOS), (3, Finish.LENGTH)):
        path, node = [], 0
        while tree.children.visits[row, node].any():
            action = tree.children.visits[row, node].argmax()
            path.append(int(tree.children.tokens[row, node, action]))
            node = tree.children.index[row, node, action]
        assert 1 < len(path) < 6
        while len(path) < 6 and path[-1] != 0:
            tries = np.array([[*path, t, *[0] * 5][:6] for t in [0, 1, 2, 3, 4, 0, 0, 0]])  # eight, as above
            path.append(int(log_pi(model, params, prompts[row, :3].tolist(), tries)[:5, len(path)].argmax()))
        assert found.tokens[row, 0, : found.lengths[row, 0]].tolist() == path
        assert found.finish[row, 0] == finish


@pytest.mark.parametrize(("considered", "simulations"), itertools.product([0, 1, 2, 5, 16], [1, 7, 50]))
def test_schedule_is_that_of_mctx(considered, simulations):
    halving = pytest.importorskip("mctx._src.seq_halving")
    expected = halving.get_sequence_of_considered_visits(considered, simulations)
    assert halving_schedule(considered, simulations) == expected


def test_wrong_options_are_refused(tables):
    for change, message in [
        ({"num_simulations": 0}, "num_simulations 0: expected at least 1"),
        ({"considered": 4}, "considered 4 has no effect with policy 'puct'"),
        ({"policy": "gumbel", "pb_c_init": 2.0}, "pb_c_init 2.0 has no effect with policy 'gumbel'"),
        ({"n_best": 41}, "n_best 41: expected 1 to num_simulations 40"),
        ({"eos_ids": (-1,)}, "token ids, from 0 on"),
        ({"pb_c_base": 0.0}, "pb_c_base 0.0 must be above 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            replace(PUCT, **change)
    for options, key in [(PUCT, jax.random.key(0)), (replace(GUMBEL, gumbel_scale=1.0), None)]:
        with pytest.raises(ValueError, match="a key is for policy 'gumbel'"):
            run(tables, options, key=key, objective=Likelihood())
