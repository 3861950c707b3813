"""The paper's theory, on random token MDPs, in float64."""

import doctest
import itertools
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from qstar_jax import losses, mdp, shaping, tabular
from qstar_jax.mdp import TokenScores
from qstar_jax.tabular import TokenTree

# A hundred MDPs of each tree, 200 in all; in the second some responses end early, with EOS.
TREES = [TokenTree(3, 3), TokenTree(4, 3, eos=2)]
EACH = 100
EXACT = {"rtol": 0, "atol": 1e-10}


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=TREES, ids=lambda tree: f"V{tree.vocabulary}T{tree.depth}eos{tree.eos}")
def tree(request):
    return request.param


def random_mdps(tree, count=EACH, seed=0):
    """(rewards, ref_logp [count, S, V], beta [count]) of random dense rewards and references."""
    keys = jax.random.split(jax.random.key(seed), 3)
    shape = (count, *tree.shape)
    rewards = jax.random.normal(keys[0], shape)
    ref_logp = jax.nn.log_softmax(1.5 * jax.random.normal(keys[1], shape))
    return rewards, ref_logp, jax.random.uniform(keys[2], (count,), minval=0.1, maxval=2.0)


def for_each_mdp(tree, function, *more):
    """Maps `function(rewards, ref_logp, beta, *more)` over the random MDPs of a tree, as one program."""
    return jax.jit(jax.vmap(function))(*random_mdps(tree), *more)


def solve(tree, rewards, ref_logp, beta):
    return tabular.soft_value_iteration(tree, rewards, ref_logp, beta=beta)


def rewards_of_q(tree, q, ref_logp, *, beta):
    """The only reward whose optimal Q-function is `q`: r = Q - beta * log pi_ref - V(s') (Lemma 1, inverted)."""
    values = jnp.append(beta * jax.nn.logsumexp(q / beta, axis=-1), 0.0)
    return q - beta * ref_logp - values[tree.children]


def states_on_paths(tree, values):
    """Reads a table over states [S] along every response, where each token is chosen; 0 after the end. Shape [N, T]."""
    paths = tree.paths
    return jnp.where(paths.mask, values[paths.states], 0.0)


def ranking_table(returns, *, size):
    """Exact Plackett-Luce labels: every ordered choice of `size` responses, and the probability of its order."""
    rankings = np.array(list(itertools.permutations(range(len(returns)), size)), np.int32).reshape(-1, size)
    return rankings, jnp.exp(mdp.preference_log_prob(returns[rankings]))


def scores_on_paths(tree, solution, ref_logp, beta):
    """The scores of every response under a language model whose logits are Q* / beta."""
    logz = states_on_paths(tree, solution.v / beta)
    logp, ref_logp = (tabular.on_paths(tree, x) for x in (solution.log_policy, ref_logp))
    return TokenScores(logp, ref_logp, logz, jnp.asarray(tree.paths.mask))


# The tree


def test_a_tree_by_hand():
    tree = TokenTree(vocabulary=2, depth=2, eos=1)
    assert tree.states == ((), (0,)) and tree.shape == (2, 2)
    assert tree.children.tolist() == [[1, 2], [2, 2]]  # 2 is terminal
    assert tree.paths.tokens.tolist() == [[0, 0], [0, 1], [1, 0]]
    assert tree.paths.states.tolist() == [[0, 1], [0, 1], [0, 0]]
    assert tree.paths.mask.tolist() == [[True, True], [True, True], [True, False]]


def test_every_response_is_listed_once(tree):
    tokens = range(tree.vocabulary)
    expected = set()
    for word in itertools.product(tokens, repeat=tree.depth):
        cut = word.index(tree.eos) + 1 if tree.eos in word else tree.depth
        expected.add(word[:cut])
    listed = [tuple(t[m].tolist()) for t, m in zip(tree.paths.tokens, tree.paths.mask, strict=True)]
    assert len(listed) == len(set(listed)) and set(listed) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 3), "at least 1"),
        ((3, 0), "at least 1"),
        ((3, 3, 3), "eos 3 is no token"),
        ((10, 7), "too large"),
    ],
)
def test_impossible_trees_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        TokenTree(*arguments)


def test_examples_of_the_docstring():
    result = doctest.testmod(tabular)
    assert result.failed == 0 and result.attempted > 0


# Eq. 5 to 7, and that they solve Eq. 2


def test_the_solution_is_the_enumerated_optimum(tree):
    """pi* is pi_ref exp(return / beta) over whole responses, V* of the prompt its log-normaliser."""

    def enumerated(rewards, ref_logp, beta):
        solution = solve(tree, rewards, ref_logp, beta)
        weights = tabular.path_sums(tree, ref_logp) + tabular.path_sums(tree, rewards) / beta
        return (
            tabular.path_sums(tree, solution.log_policy),
            jax.nn.log_softmax(weights),
            solution.v[0],
            beta * jax.nn.logsumexp(weights),
        )

    logp, expected, value, expected_value = for_each_mdp(tree, enumerated)
    np.testing.assert_allclose(logp, expected, **EXACT)
    np.testing.assert_allclose(value, expected_value, **EXACT)


def test_no_other_policy_does_better(tree):
    """Eq. 2: expected reward less beta times the divergence from the reference is V*(s_0) at pi* and less elsewhere."""

    def objective(log_policy, rewards, ref_logp, beta):
        probability = jnp.exp(tabular.path_sums(tree, log_policy))
        gain = tabular.path_sums(tree, rewards) - beta * tabular.path_sums(tree, log_policy - ref_logp)
        return (probability * gain).sum()

    def compare(rewards, ref_logp, beta, noise):
        solution = solve(tree, rewards, ref_logp, beta)
        other = jax.nn.log_softmax(solution.log_policy + 0.1 * noise)
        return (
            objective(solution.log_policy, rewards, ref_logp, beta),
            objective(other, rewards, ref_logp, beta),
            solution.v[0],
        )

    best, other, value = for_each_mdp(tree, compare, jax.random.normal(jax.random.key(9), (EACH, *tree.shape)))
    np.testing.assert_allclose(best, value, **EXACT)
    assert (other < best).all()


def eq_7_residual(scores, q, rewards, beta):
    """Q(s, a) - [r(s, a) + beta log pi_ref(a | s) + V(s')] at every response token."""
    next_values = shaping.successor_values(scores.v(beta), scores.mask)
    return q - (rewards + beta * scores.ref_logp + next_values)


def test_endogenous_rewards_are_those_of_the_problem_that_the_logits_solve(tree):
    """Logits Q*/beta give back r + beta log pi_ref, and other logits of pi* the same up to potential shaping."""

    def recovered(rewards, ref_logp, beta, shift):
        solution = solve(tree, rewards, ref_logp, beta)
        found = []
        for logits in (solution.q / beta, solution.q / beta + shift[:, None]):
            states, tokens, mask = tree.paths.states, tree.paths.tokens, tree.paths.mask
            scores = TokenScores.from_logits(logits[states], None, tokens, mask)
            next_values = shaping.successor_values(scores.v(beta), mask)
            found.append(mdp.endogenous_rewards(scores.q(beta), next_values, mask))
        expected = tabular.on_paths(tree, rewards + beta * ref_logp)
        shaped = shaping.are_equivalent(*found, tree.paths.mask, atol=1e-10)
        return found[0] - expected, shaped.equivalent, jnp.abs(found[1] - found[0]).max()

    shifts = jax.random.normal(jax.random.key(7), (EACH, tree.shape[0]))
    difference, equivalent, moved = for_each_mdp(tree, recovered, shifts)
    np.testing.assert_allclose(difference, 0, **EXACT)
    assert equivalent.all() and (moved > 1e-3).all()


def test_prefix_values_are_the_reference_s_exponential_average_of_the_return(tree):
    """With rewards paid at the end, implicit rewards summed over a prefix are V*(s) - V*(s_0) (Eq. 10)."""

    def compare(rewards, ref_logp, beta):
        outcome = jnp.where(tree.children == tree.shape[0], rewards, 0.0)
        solution = solve(tree, outcome, ref_logp, beta)
        implicit = tabular.on_paths(tree, mdp.implicit_rewards(solution.log_policy, ref_logp, beta=beta))
        found = mdp.prefix_values(implicit, tree.paths.mask)
        # The average over all completions of the prefix, by enumeration of whole responses.
        returns, logp = tabular.path_sums(tree, outcome), tabular.path_sums(tree, ref_logp)
        logp_so_far = jnp.cumsum(tabular.on_paths(tree, ref_logp), axis=-1)
        paths = tree.paths.states * tree.vocabulary + tree.paths.tokens
        same = (paths[:, None, :] == paths[None]) & tree.paths.mask[:, None] & tree.paths.mask[None]
        weights = logp[None, :, None] - logp_so_far[:, None] + returns[None, :, None] / beta
        value = beta * jax.nn.logsumexp(jnp.where(same, weights, -jnp.inf), axis=1)
        expected = value - beta * jax.nn.logsumexp(logp + returns / beta)
        return jnp.where(tree.paths.mask, found - expected, 0.0)

    np.testing.assert_allclose(for_each_mdp(tree, compare), 0, **EXACT)


def test_equations_5_to_7_hold_on_every_path(tree):
    def residuals(rewards, ref_logp, beta):
        solution = solve(tree, rewards, ref_logp, beta)
        scores = scores_on_paths(tree, solution, ref_logp, beta)
        q, v = scores.q(beta), scores.v(beta)
        eq_5 = scores.advantages(beta) - (q - v)
        eq_6 = beta * jax.nn.logsumexp(solution.q / beta, -1) - solution.v
        eq_7 = eq_7_residual(scores, q, tabular.on_paths(tree, rewards), beta)
        same = q - tabular.on_paths(tree, solution.q)
        return eq_5, eq_6, eq_7, same

    for residual in for_each_mdp(tree, residuals):
        np.testing.assert_allclose(residual, 0, **EXACT)


def test_a_wrong_q_leaves_a_residual(tree):
    def residual(rewards, ref_logp, beta):
        solution = solve(tree, rewards, ref_logp, beta)
        scores = scores_on_paths(tree, solution, ref_logp, beta)
        q = scores.q(beta).at[0, 0].add(0.5)
        return eq_7_residual(scores, q, tabular.on_paths(tree, rewards), beta)[0, 0]

    np.testing.assert_allclose(for_each_mdp(tree, residual), 0.5, **EXACT)


# Eq. 10 and its sum


def test_implicit_rewards_are_optimal_advantages_and_telescope(tree):
    def check(rewards, ref_logp, beta):
        solution = solve(tree, rewards, ref_logp, beta)
        scores = scores_on_paths(tree, solution, ref_logp, beta)
        v, r, implicit = scores.v(beta), tabular.on_paths(tree, rewards), scores.rewards(beta)
        next_values = shaping.successor_values(v, scores.mask)
        eq_10 = implicit - shaping.shape_rewards(r, v, next_values, scores.mask)
        total = r.sum(-1) - (solution.v[0] + scores.returns(beta))
        # The running sum is the reward so far and the value ahead, less the value of the prompt.
        so_far = jnp.cumsum(r, -1) + next_values - solution.v[0]
        prefix = jnp.where(scores.mask, jnp.cumsum(implicit, -1) - so_far, 0.0)
        # The KL convention takes beta log pi_ref out of Q, and so out of the advantage.
        converted = implicit - (scores.advantages(beta) - beta * scores.ref_logp)
        return eq_10, total, prefix, converted

    for residual in for_each_mdp(tree, check):
        np.testing.assert_allclose(residual, 0, **EXACT)


def test_a_truncated_response_keeps_the_value_of_its_last_state(tree):
    """Responses truncated after two tokens: identities hold with V of the last state, and fail without it."""

    def check(rewards, ref_logp, beta):
        solution = solve(tree, rewards, ref_logp, beta)
        truncated = jnp.asarray(tree.paths.mask.sum(-1) > 2)
        mask = jnp.asarray(tree.paths.mask & (np.arange(tree.depth) < 2))
        scores = replace(scores_on_paths(tree, solution, ref_logp, beta), mask=mask)
        v, r, implicit = scores.v(beta), tabular.on_paths(tree, rewards), scores.rewards(beta)
        last_values = solution.v[tree.paths.states[:, 2]]
        next_values = shaping.successor_values(v, mask, truncated=truncated, final_values=last_values)
        eq_10 = implicit - shaping.shape_rewards(r, v, next_values, mask)
        earned = jnp.where(mask, r, 0.0).sum(-1) + jnp.where(truncated, last_values, 0.0)
        total = earned - (solution.v[0] + scores.returns(beta))
        as_if_ended = implicit - shaping.shape_rewards(r, v, shaping.successor_values(v, mask), mask)
        return eq_10, total, jnp.abs(as_if_ended).max()

    eq_10, total, as_if_ended = for_each_mdp(tree, check)
    np.testing.assert_allclose(eq_10, 0, **EXACT)
    np.testing.assert_allclose(total, 0, **EXACT)
    assert (as_if_ended > 1e-3).all()


# Lemma 1


def test_reward_to_q_to_reward(tree):
    def there_and_back(rewards, ref_logp, beta):
        return rewards_of_q(tree, solve(tree, rewards, ref_logp, beta).q, ref_logp, beta=beta)

    np.testing.assert_allclose(for_each_mdp(tree, there_and_back), random_mdps(tree)[0], **EXACT)


def test_any_table_is_the_optimal_q_of_one_reward(tree):
    def back_and_there(q, ref_logp, beta):  # what stands for rewards elsewhere is an arbitrary Q here
        return solve(tree, rewards_of_q(tree, q, ref_logp, beta=beta), ref_logp, beta).q

    np.testing.assert_allclose(for_each_mdp(tree, back_and_there), random_mdps(tree)[0], **EXACT)


# Definition 1 and Theorem 1


def shaped(tree, rewards, potential):
    ahead = jnp.append(potential, 0.0)  # 0 in terminal states
    return rewards + ahead[tree.children] - potential[:, None]


def potentials(tree):
    return jax.random.normal(jax.random.key(5), (EACH, tree.shape[0]))


def test_shaping_changes_neither_policy_nor_preferences(tree):
    def check(rewards, ref_logp, beta, potential):
        other = shaped(tree, rewards, potential)
        policies = [solve(tree, r, ref_logp, beta).log_policy for r in (rewards, other)]
        labels = [tabular.preference_table(tabular.path_sums(tree, r)) for r in (rewards, other)]
        rankings = [ranking_table(tabular.path_sums(tree, r)[:5], size=3)[1] for r in (rewards, other)]
        changed = jnp.abs(other - rewards).max()
        return policies, labels, rankings, changed

    *pairs, changed = for_each_mdp(tree, check, potentials(tree))
    for before, after in pairs:
        np.testing.assert_allclose(before, after, **EXACT)
    assert (changed > 0.1).all()


def test_equivalence_finds_the_potential(tree):
    def check(rewards, ref_logp, beta, potential):
        mask = jnp.asarray(tree.paths.mask)
        r, other = (tabular.on_paths(tree, x) for x in (rewards, shaped(tree, rewards, potential)))
        found = shaping.are_equivalent(r, other, mask, atol=1e-10)
        broken = shaping.are_equivalent(r, other.at[0, 0].add(1e-6), mask, atol=1e-10)
        direct, residual = tabular.best_potential(tree, shaped(tree, rewards, potential) - rewards)
        expected = states_on_paths(tree, potential)
        return found.equivalent, broken.equivalent, found.potentials - expected, direct - potential, residual

    same, broken, by_paths, by_table, residual = for_each_mdp(tree, check, potentials(tree))
    assert same.all() and not broken.any()
    for difference in (by_paths, by_table, residual):
        np.testing.assert_allclose(difference, 0, **EXACT)


def test_log_ratios_of_the_optimal_policy_reproduce_every_preference(tree):
    """Theorem 1, with Eq. 8 in place of Eq. 1; the library's DPO loss reads the labels' entropy off them."""

    def check(rewards, ref_logp, beta):
        solution = solve(tree, rewards, ref_logp, beta)
        returns = tabular.path_sums(tree, rewards)
        implicit = beta * tabular.path_sums(tree, solution.log_policy - ref_logp)
        labels = tabular.preference_table(returns)
        _, true = ranking_table(returns[:5], size=3)
        _, recovered = ranking_table(implicit[:5], size=3)
        loss = tabular.population_dpo_loss(tree, solution.log_policy, labels, ref_logp, beta=beta)
        pairs = ~np.eye(len(returns), dtype=bool)
        entropy = jnp.where(pairs, -labels * jnp.log(labels), 0.0).sum() / (pairs.sum() / 2)
        equivalent = shaping.are_equivalent(
            tabular.on_paths(tree, rewards),
            beta * tabular.on_paths(tree, solution.log_policy - ref_logp),
            jnp.asarray(tree.paths.mask),
            atol=1e-10,
        )
        return labels - tabular.preference_table(implicit), true - recovered, loss - entropy, equivalent.equivalent

    *differences, equivalent = for_each_mdp(tree, check)
    for difference in differences:
        np.testing.assert_allclose(difference, 0, **EXACT)
    assert equivalent.all()


def test_a_shift_of_the_logits_is_a_potential(tree):
    """z + c(s) is the same policy; the reward that its Q stands for moves by Phi = -beta c."""

    def check(rewards, ref_logp, beta, shift):
        q = solve(tree, rewards, ref_logp, beta).q
        moved = rewards_of_q(tree, q + beta * shift[:, None], ref_logp, beta=beta)
        policies = [jax.nn.log_softmax(x / beta) for x in (q, q + beta * shift[:, None])]
        return moved - shaped(tree, rewards, -beta * shift), policies[0] - policies[1]

    for difference in for_each_mdp(tree, check, potentials(tree)):
        np.testing.assert_allclose(difference, 0, **EXACT)


def test_eq_16_on_every_state(tree):
    def check(rewards, ref_logp, beta):
        policy = solve(tree, rewards, ref_logp, beta).log_policy
        mask = jnp.ones(tree.shape[0], bool)
        expected = (jnp.exp(ref_logp) * beta * (policy - ref_logp)).sum(-1)
        return -beta * mdp.kl_divergence(ref_logp, policy, mask), expected

    found, expected = for_each_mdp(tree, check)
    np.testing.assert_allclose(found, expected, **EXACT)
    assert (found < 0).all()


# Exact labels


def test_rankings_of_the_same_responses_sum_to_one():
    returns = jnp.array([0.3, -1.2, 2.0, 0.1, -0.4])
    rankings, probabilities = ranking_table(returns, size=3)
    assert rankings.shape == (60, 3)
    sets = {}
    for ranking, probability in zip(rankings, probabilities, strict=True):
        sets[frozenset(ranking.tolist())] = sets.get(frozenset(ranking.tolist()), 0.0) + float(probability)
    assert len(sets) == 10
    np.testing.assert_allclose(list(sets.values()), 1.0, **EXACT)


def test_rankings_of_two_are_bradley_terry():
    returns = jnp.array([0.3, -1.2, 2.0, 0.1])
    rankings, probabilities = ranking_table(returns, size=2)
    table = tabular.preference_table(returns)
    np.testing.assert_allclose(probabilities, table[rankings[:, 0], rankings[:, 1]], **EXACT)
    np.testing.assert_allclose(table + table.T, 1.0, **EXACT)


# DPO as inverse soft Q-learning


STEPS = 120


@pytest.fixture(scope="module", params=[EACH // 5, pytest.param(EACH, marks=pytest.mark.slow)])
def fits(request):
    """MDPs of each tree, and their DPO policies from labels of whole responses, at beta 0.5."""
    with jax.enable_x64(True):
        return {tree: _fit(tree, request.param) for tree in TREES}


def _fit(tree, count, beta=0.5):
    rewards, ref_logp, _ = random_mdps(tree, count)

    def fit(problem):
        rewards, ref_logp = problem
        labels = tabular.preference_table(tabular.path_sums(tree, rewards))
        fit = tabular.fit_dpo(tree, labels, ref_logp, beta=beta, steps=STEPS)
        learned = beta * (jax.nn.log_softmax(fit.logits) - ref_logp)
        _, residual = jax.vmap(lambda r: tabular.best_potential(tree, r - rewards))(learned)
        solution = tabular.soft_value_iteration(tree, rewards, ref_logp, beta=beta)
        advantage = beta * (solution.log_policy - ref_logp)
        return fit.losses, learned, residual, advantage

    # One after the other: under vmap every line search would last as long as the longest.
    return rewards, *jax.jit(lambda *problems: jax.lax.map(fit, problems))(rewards, ref_logp)


def test_dpo_recovers_a_dense_reward_up_to_shaping(tree, fits):
    rewards, _, _, residual, _ = fits[tree]
    spread = jnp.ptp(rewards.reshape(len(rewards), -1), axis=-1)
    assert (jnp.abs(residual[:, -1]).max((-1, -2)) < 1e-3 * spread).all()
    # What it started from was far away.
    assert (jnp.abs(residual[:, 0]).max((-1, -2)) > 0.1 * spread).all()


def test_the_bellman_residual_falls_with_the_loss(tree, fits):
    """Least squares over potentials is the Bellman residual of the learned Q at its best values V."""
    _, losses_, _, residual, _ = fits[tree]
    size = jnp.sqrt((residual**2).mean((-1, -2)))
    for early, late in itertools.pairwise((0, 5, 15, 40, STEPS)):
        assert (losses_[:, late] <= losses_[:, early] + 1e-12).all()
        assert (size[:, late] < size[:, early] + 1e-12).mean() > 0.95
    assert (size[:, -1] < 1e-3 * size[:, 0]).all()


def test_labels_of_whole_responses_put_the_credit_on_the_right_tokens(tree, fits):
    _, _, learned, _, advantage = fits[tree]
    np.testing.assert_allclose(learned[:, -1], advantage, atol=1e-4)


def test_one_wrong_token_is_found():
    """A reward of -2 for a single token somewhere, labels of whole responses: that token has the lowest advantage."""
    tree = TokenTree(3, 4)
    wrong = np.array([(0, 1), (2, 0), (7, 2), (30, 1)])
    ref_logp = jnp.full(tree.shape, -jnp.log(3.0))

    def lowest(at):
        rewards = jnp.zeros(tree.shape).at[at[0], at[1]].set(-2.0)
        labels = tabular.preference_table(tabular.path_sums(tree, rewards))
        fit = tabular.fit_dpo(tree, labels, ref_logp, beta=0.5, steps=STEPS)
        return (jax.nn.log_softmax(fit.logits[-1]) - ref_logp).argmin()

    found = jax.jit(lambda wrong: jax.lax.map(lowest, wrong))(wrong)
    np.testing.assert_array_equal(np.unravel_index(found, tree.shape), wrong.T)


def test_the_population_loss_is_the_mean_of_the_librarys_loss_over_pairs():
    tree = TokenTree(2, 3, eos=1)
    rewards, ref_logp, _ = (x[0] for x in random_mdps(tree))
    logits = jax.random.normal(jax.random.key(3), tree.shape)
    labels = tabular.preference_table(tabular.path_sums(tree, rewards))
    ratios, mask = tabular.on_paths(tree, jax.nn.log_softmax(logits) - ref_logp), tree.paths.mask
    pairs = np.array(list(itertools.permutations(range(len(mask)), 2)))
    loss, _ = losses.sigmoid(ratios[pairs], jnp.asarray(mask[pairs]), beta=0.3)
    expected = (labels[pairs[:, 0], pairs[:, 1]] * loss).sum() / (len(pairs) / 2)
    found = tabular.population_dpo_loss(tree, logits, labels, ref_logp, beta=0.3)
    np.testing.assert_allclose(found, expected, **EXACT)


TRANSFORMED = {
    "soft_value_iteration": lambda tree, r, ref: solve(tree, r, ref, 0.7).v,
    "rewards_of_q": lambda tree, r, ref: rewards_of_q(tree, r, ref, beta=0.7),
    "on_paths": lambda tree, r, ref: tabular.on_paths(tree, r),
    "states_on_paths": lambda tree, r, ref: states_on_paths(tree, r[:, 0]),
    "path_sums": lambda tree, r, ref: tabular.path_sums(tree, r),
    "preference_table": lambda tree, r, ref: tabular.preference_table(r[0]),
    "ranking_table": lambda tree, r, ref: ranking_table(r[0], size=2)[1],
    "population_dpo_loss": lambda tree, r, ref: tabular.population_dpo_loss(
        tree, r, tabular.preference_table(tabular.path_sums(tree, ref)), ref, beta=0.7
    ),
    "best_potential": lambda tree, r, ref: tabular.best_potential(tree, r)[0],
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_functions_can_be_compiled_mapped_and_differentiated(name):
    tree = TokenTree(2, 2)
    rewards, ref_logp, _ = random_mdps(tree, count=3)
    function = jax.jit(partial(TRANSFORMED[name], tree))
    mapped = jax.jit(jax.vmap(function))(rewards, ref_logp)
    np.testing.assert_allclose(mapped[1], function(rewards[1], ref_logp[1]), **EXACT)
    check_grads(lambda r: function(r, ref_logp[0]), (rewards[0],), order=1, modes="rev")


def test_everything_is_differentiable():
    """The gradient of V*(s_0) with respect to a reward is how often the optimal policy earns it."""
    tree = TokenTree(3, 3, eos=0)
    rewards, ref_logp, _ = (x[0] for x in random_mdps(tree))

    @jax.jit
    @jax.grad
    def gradient(rewards):
        return solve(tree, rewards, ref_logp, 0.7).v[0]

    @jax.jit
    def path_probabilities(rewards):
        return jnp.exp(tabular.path_sums(tree, solve(tree, rewards, ref_logp, 0.7).log_policy))

    visits, probability = np.zeros(tree.shape), path_probabilities(rewards)
    for n, (tokens, mask) in enumerate(zip(tree.paths.tokens, tree.paths.mask, strict=True)):
        for t in range(mask.sum()):
            visits[tree.paths.states[n, t], tokens[t]] += probability[n]
    np.testing.assert_allclose(gradient(rewards), visits, **EXACT)
