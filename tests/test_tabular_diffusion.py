"""Appendix B in the tabular world: three denoising steps on a grid of one dimension; in float64.

A trajectory is x_3 x_2 x_1 x_0. The noise x_3 is drawn by the environment; the others are actions, and a state is the
last of them and its step, so trajectories meet.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax import diffusion, shaping, tabular
from qstar_jax.tabular import TokenTree

STEPS, BETA = 3, 0.5
EXACT = {"rtol": 0, "atol": 1e-8}


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def chain(cells, environment=(0,)):
    return TokenTree(cells, STEPS + 1, environment=environment, markov=True)


def schedule():
    return diffusion.linear_schedule(STEPS, first=0.3, last=0.6, variance="beta")


@partial(jax.jit, static_argnums=0)
def reference(tree, span):
    """(grid, log pi_ref): noise, and steps of a diffusion model with a linear network, each normalized on the grid."""
    grid, steps = jnp.linspace(-span, span, tree.vocabulary), schedule()
    rows = [-(grid[None] ** 2) / 2]
    for t in range(STEPS, 0, -1):
        x_t, times = grid[:, None], jnp.full(grid.shape, t)
        mean = diffusion.step_mean(steps, 0.4 * x_t - 0.1, x_t, times)
        rows.append(-((grid - mean) ** 2) / (2 * steps.variance[t]))
    return grid, jax.nn.log_softmax(jnp.concatenate(rows))


def random_rewards(tree, seed=0):
    """A dense reward of every step; the environment earns nothing."""
    return jnp.where(tree.acts[:, None], jax.random.normal(jax.random.key(seed), tree.shape), 0.0)


@partial(jax.jit, static_argnums=0)
def solve(tree, rewards, ref_logp):
    return tabular.soft_value_iteration(tree, rewards, ref_logp, beta=BETA)


@partial(jax.jit, static_argnums=0)
def rewards_of_q(tree, q, ref_logp):
    """The only reward of which q is optimal: Q - V(s') with V(x_0) = 0, less beta log pi_ref at actions."""
    acts = tree.acts[:, None]
    values = jnp.where(tree.acts, BETA * jax.nn.logsumexp(q / BETA, -1), (jnp.exp(ref_logp) * q).sum(-1))
    return q - jnp.where(acts, BETA * ref_logp, 0.0) - jnp.append(values, 0.0)[tree.children]


def test_the_chain_by_hand():
    tree = TokenTree(2, 3, markov=True)
    assert tree.states == ((), (0,), (1,), (None, 0), (None, 1))
    assert tree.children.tolist() == [[1, 2], [3, 4], [3, 4], [5, 5], [5, 5]]
    assert tree.paths.states.tolist()[2:4] == [[0, 1, 4], [0, 1, 4]]
    assert len(tree.paths.tokens) == 8 and tree.paths.mask.all()
    ends = TokenTree(3, 3, eos=1, markov=True)
    assert sorted(map(tuple, ends.paths.tokens[ends.paths.mask.sum(-1) < 3].tolist())) == [
        (0, 1, 0),
        (1, 0, 0),
        (2, 1, 0),
    ]
    with pytest.raises(ValueError, match="too many to list"):
        _ = chain(60).paths
    with pytest.raises(ValueError, match="too large"):
        chain(1000)


def test_lemma_2_reward_and_q_determine_each_other():
    tree = chain(4)
    _, ref_logp = reference(tree, 2.0)
    rewards = random_rewards(tree)
    solution = solve(tree, rewards, ref_logp)
    np.testing.assert_allclose(rewards_of_q(tree, solution.q, ref_logp), rewards, **EXACT)
    # Any table is the optimal Q of one reward.
    q = jax.random.normal(jax.random.key(1), tree.shape)
    np.testing.assert_allclose(solve(tree, rewards_of_q(tree, q, ref_logp), ref_logp).q, q, **EXACT)


def test_the_optimum_is_that_of_whole_trajectories():
    """Given the noise, pi* is pi_ref exp(return / beta) over trajectories, and V*(x_T) its log-normalizer."""
    tree = chain(4)
    _, ref_logp = reference(tree, 2.0)
    rewards = random_rewards(tree)
    solution = solve(tree, rewards, ref_logp)
    steps = jnp.where(tree.acts[:, None], ref_logp, 0.0)
    by_noise = (-1, tree.vocabulary**STEPS)  # lexical order: the noise is the first token
    weights = (tabular.path_sums(tree, steps) + tabular.path_sums(tree, rewards) / BETA).reshape(by_noise)
    found = tabular.path_sums(tree, jnp.where(tree.acts[:, None], solution.log_policy, 0.0)).reshape(by_noise)
    np.testing.assert_allclose(found, jax.nn.log_softmax(weights), **EXACT)
    np.testing.assert_allclose(solution.v[tree.children[0]], BETA * jax.nn.logsumexp(weights, -1), **EXACT)


def test_values_of_densities_in_closed_form():
    """On a fine grid, sums are integrals: V(x_t) = beta log E_ref exp(x_0 / beta), of a Gaussian x_0."""
    tree, steps = chain(161), schedule()
    grid, ref_logp = reference(tree, 14.0)
    rewards = jnp.zeros(tree.shape).at[tree.levels[-1]].set(grid)
    values = solve(tree, rewards, ref_logp).v
    near = np.abs(np.asarray(grid)) <= 1  # the grid ends, the line does not
    factor, constant, variance = 1.0, 0.0, 0.0
    for t in range(1, STEPS + 1):
        # x_0 given x_t: the composition of linear steps.
        scale, left = np.sqrt(1 - float(steps.beta[t])), np.sqrt(1 - float(steps.alpha_bar[t]))
        a = (1 - 0.4 * float(steps.beta[t]) / left) / scale
        b = 0.1 * float(steps.beta[t]) / (left * scale)
        constant, variance = constant + factor * b, variance + factor**2 * float(steps.variance[t])
        factor *= a
        expected = factor * grid + constant + variance / (2 * BETA)
        np.testing.assert_allclose(values[tree.levels[STEPS + 1 - t]][near], expected[near], **EXACT)


def test_shaping_changes_neither_policy_nor_preferences():
    tree = chain(4)
    _, ref_logp = reference(tree, 2.0)
    rewards, acts = random_rewards(tree), tree.acts[:, None]
    potential = jax.random.normal(jax.random.key(2), tree.shape[:1])
    ahead = jnp.append(potential, 0.0)[tree.children]
    other = jnp.where(acts, rewards + ahead - potential[:, None], 0.0)
    policies = [jnp.where(acts, solve(tree, r, ref_logp).log_policy, 0.0) for r in (rewards, other)]
    np.testing.assert_allclose(*policies, **EXACT)
    labels = [labels_given_noise(tree, r) for r in (rewards, other)]
    np.testing.assert_allclose(*labels, **EXACT)
    assert jnp.abs(other - rewards).max() > 0.1
    # Trajectories from different noise are told apart by the potential of their noise.
    across = [tabular.preference_table(tabular.path_sums(tree, r)) for r in (rewards, other)]
    assert jnp.abs(across[1] - across[0]).max() > 0.1


def labels_given_noise(tree, rewards):
    """Bradley-Terry labels of pairs of trajectories that begin with the same noise."""
    noise = tree.paths.tokens[:, 0]
    return jnp.where(noise[:, None] == noise, tabular.preference_table(tabular.path_sums(tree, rewards)), 0.0)


def test_dpo_recovers_the_advantage_of_every_step(fit_exactly):
    """From labels of whole trajectories that share their noise; rewards themselves are known up to a potential."""
    tree = chain(3)
    _, ref_logp = reference(tree, 2.0)
    rewards, acts = random_rewards(tree), tree.acts[:, None]
    solution = solve(tree, rewards, ref_logp)
    learned = fit_exactly(tree, labels_given_noise(tree, rewards), ref_logp, BETA)
    advantages = BETA * (solution.log_policy - ref_logp)
    np.testing.assert_allclose(jnp.where(acts, learned - advantages, 0.0), 0, **EXACT)
    shape = (tree.vocabulary, -1, tree.depth)  # by noise: a prompt of its own
    mask = jnp.asarray(tree.paths.actions).reshape(shape)
    pair = (tabular.on_paths(tree, x).reshape(shape) for x in (rewards, learned))
    found = shaping.are_equivalent(*pair, mask, atol=1e-8)
    values = jnp.where(mask, solution.v[tree.paths.states].reshape(shape), 0.0)
    assert found.equivalent.all()
    np.testing.assert_allclose(found.potentials, values, **EXACT)


def test_pairs_of_different_noise_need_the_value_of_the_noise(fit_exactly):
    """Their returns differ by V(x_T) too, which no denoising step can say; a policy that chooses the noise can."""
    tree, free = chain(3), chain(3, environment=())
    _, ref_logp = reference(tree, 2.0)
    rewards = random_rewards(tree)
    labels = tabular.preference_table(tabular.path_sums(tree, rewards))
    for one, exact in ((tree, False), (free, True)):
        learned = fit_exactly(one, labels, ref_logp, BETA)
        advantages = BETA * (solve(one, rewards, ref_logp).log_policy - ref_logp)
        error = jnp.abs(jnp.where(one.acts[:, None], learned - advantages, 0.0)).max()
        assert error < 1e-8 if exact else error > 0.05
