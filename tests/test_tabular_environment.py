"""Dialogues in the tabular world: an environment answers, at chance nodes; in float64.

Dialogues have five tokens: an action, a reply, an action, a reply, an action.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax import tabular
from qstar_jax.tabular import TokenTree

TREE = TokenTree(2, 5, environment=(1, 3))
UNAWARE = replace(TREE, environment=())  # takes replies for actions
BETA = 0.5
EXACT = {"rtol": 0, "atol": 1e-10}


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def random_world(seed, *, deterministic=False):
    """(rewards, log pi_ref of the model at every token, the same with the environment's law at its replies)."""
    keys = jax.random.split(jax.random.key(seed), 3)
    rewards = jax.random.normal(keys[0], TREE.shape)
    model = jax.nn.log_softmax(jax.random.normal(keys[1], TREE.shape))
    noise = jax.random.normal(keys[2], TREE.shape)
    law = jax.nn.log_softmax(noise)
    if deterministic:
        law = jnp.where(noise == noise.max(-1, keepdims=True), 0.0, -jnp.inf)
    return rewards, model, jnp.where(TREE.acts[:, None], model, law)


def occurring(law):
    """How often the environment's replies let each dialogue occur. Shape [N]."""
    return jnp.exp(tabular.path_sums(TREE, jnp.where(TREE.acts[:, None], 0.0, law)))


def labels_of(rewards, law):
    """Bradley-Terry labels of true returns, for pairs of dialogues that occur."""
    weights = occurring(law)
    return tabular.preference_table(tabular.path_sums(TREE, rewards)) * weights[:, None] * weights


def solve(tree, rewards, ref_logp):
    solution = tabular.soft_value_iteration(tree, rewards, ref_logp, beta=BETA)
    return solution, BETA * (solution.log_policy - ref_logp)


def actions_that_occur(law):
    """Which entries of a table are actions that some dialogue contains. Shape [S, V]."""
    paths, seen = TREE.paths, np.zeros(TREE.shape, bool)
    on = paths.actions & np.asarray(occurring(law) > 0)[:, None]
    seen[paths.states[on], paths.tokens[on]] = True
    return seen


def largest(difference, law):
    return np.abs(np.asarray(difference))[actions_that_occur(law)].max()


def test_a_dialogue_by_hand():
    """Two actions that cost nothing; after the second, 1 with probability 1/4, else 0."""
    tree = TokenTree(2, 2, environment=(1,))
    assert tree.acts.tolist() == [True, False, False]
    assert tree.paths.actions.tolist() == [[True, False]] * 4
    rewards = jnp.zeros(tree.shape).at[2, 1].set(1.0)
    law = jnp.log(jnp.array([[0.5, 0.5], [0.5, 0.5], [0.75, 0.25]]))
    solution = tabular.soft_value_iteration(tree, rewards, law, beta=1.0)
    np.testing.assert_allclose(solution.v, [np.log((1 + np.exp(0.25)) / 2), 0.0, 0.25], **EXACT)
    np.testing.assert_allclose(solution.log_policy[0], jax.nn.log_softmax(jnp.array([0.0, 0.25])), **EXACT)
    np.testing.assert_allclose(solution.log_policy[1:], law[1:], **EXACT)


def test_an_environment_has_places_among_the_tokens():
    with pytest.raises(ValueError, match=r"environment \(5,\): positions lie between 0 and 4"):
        TokenTree(2, 5, environment=(5,))


def test_no_policy_of_the_actions_does_better():
    """Eq. 2 over dialogues: V*(s_0) is the best expected return less beta times the divergence, replies being given."""
    for seed in range(10):
        rewards, _, law = random_world(seed)
        solution, _ = solve(TREE, rewards, law)

        def objective(log_policy, rewards=rewards, law=law):
            probability = jnp.exp(tabular.path_sums(TREE, log_policy))
            return (probability * tabular.path_sums(TREE, rewards - BETA * (log_policy - law))).sum()

        noise = 0.1 * jax.random.normal(jax.random.key(seed), TREE.shape)
        other = jnp.where(TREE.acts[:, None], jax.nn.log_softmax(solution.log_policy + noise), law)
        np.testing.assert_allclose(objective(solution.log_policy), solution.v[0], **EXACT)
        assert objective(other) < solution.v[0]


@pytest.mark.parametrize("deterministic", [True, False])
def test_rewards_of_actions_telescope_up_to_luck(deterministic):
    """sum_A beta log(pi* / pi_ref) = sum r - V(s_0) - sum_env [r + V(s') - E(r + V(s'))], on every dialogue."""
    for seed in range(10):
        rewards, _, law = random_world(seed, deterministic=deterministic)
        solution, advantages = solve(TREE, rewards, law)
        acts, occurs = TREE.acts[:, None], occurring(law) > 0
        implicit = tabular.path_sums(TREE, jnp.where(acts, advantages, 0.0))
        luck = tabular.path_sums(TREE, jnp.where(acts, 0.0, solution.q - solution.v[:, None]))
        returns = tabular.path_sums(TREE, rewards)
        np.testing.assert_allclose(implicit, returns - solution.v[0] - luck, **EXACT)
        # Theorem 1 holds exactly if replies are certain, and in expectation over replies if they are not.
        if deterministic:
            np.testing.assert_allclose(luck[occurs], 0.0, **EXACT)
        else:
            assert jnp.abs(luck).min() > 1e-3
        expected_luck = (jnp.exp(law) * (solution.q - solution.v[:, None])).sum(-1)
        np.testing.assert_allclose(expected_luck[~TREE.acts], 0.0, **EXACT)


def test_dpo_on_dialogues_recovers_the_advantages_of_actions_and_not_if_it_trains_on_replies(fit_exactly):
    """Replies are certain, but the reference does not know that: what DPO gives to a reply it takes from actions."""
    for seed in range(3):
        rewards, model, law = random_world(seed, deterministic=True)
        labels = labels_of(rewards, law)
        _, truth = solve(TREE, rewards, law)
        masked, unmasked = (fit_exactly(tree, labels, model, BETA) for tree in (TREE, UNAWARE))
        assert largest(masked - truth, law) < 1e-10
        assert largest(unmasked - truth, law) > 0.1
        # The bias, exactly: the actions are optimal for what rewards leave when replies have taken their part.
        remaining = jnp.where(TREE.acts[:, None], rewards, rewards - unmasked)
        _, biased = solve(TREE, remaining, law)
        assert largest(unmasked - biased, law) < 1e-10


def test_training_on_random_replies_learns_a_world_in_which_one_chooses_them(fit_exactly):
    """The reference knows the law of replies. The bias is soft maximum minus mean: values of what one cannot choose."""
    for seed in range(3):
        rewards, _, law = random_world(seed)
        solution, truth = solve(TREE, rewards, law)
        unmasked = fit_exactly(UNAWARE, labels_of(rewards, law), law, BETA)
        hopeful, expected = solve(UNAWARE, rewards, law)
        np.testing.assert_allclose(unmasked, expected, **EXACT)
        assert largest(unmasked - truth, law) > 0.1
        assert (hopeful.v > solution.v - 1e-12).all() and hopeful.v[0] > solution.v[0] + 0.1


def test_luck_biases_actions_in_proportion_and_trained_replies_by_its_square(fit_exactly):
    """Labels of single dialogues contain luck; values depend on replies by `spread`, and on nothing else they say.

    A learner that masks replies cannot tell luck from merit. One that trains on them, with a reference that knows
    their law, has a bias of its own, hope, of the second order in luck.
    """
    keys = jax.random.split(jax.random.key(0), 4)
    position = np.array([len(state) for state in TREE.states])
    rewards, model, chance = (jax.random.normal(key, (TREE.depth, 2))[position] for key in keys[:3])
    law = jax.nn.log_softmax(jnp.where(TREE.acts[:, None], model, chance))
    luck = jax.random.normal(keys[3], TREE.shape)

    def bias(tree, spread):
        r = jnp.where(TREE.acts[:, None], rewards, spread * luck)
        _, truth = solve(TREE, r, law)
        return largest(fit_exactly(tree, labels_of(r, law), law, BETA) - truth, law)

    masked, unmasked = ([bias(tree, spread) for spread in (0.0, 0.1, 0.2)] for tree in (TREE, UNAWARE))
    assert masked[0] < 1e-10 and unmasked[0] < 1e-10
    assert masked[1] > 0.1 and masked[2] / masked[1] == pytest.approx(2, rel=0.1)
    assert unmasked[1] > 1e-3 and unmasked[2] / unmasked[1] == pytest.approx(4, rel=0.1)
