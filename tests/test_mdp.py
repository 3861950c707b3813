"""The token MDP by hand, and against restatements in numpy."""

from dataclasses import dataclass, replace
from functools import cache
from itertools import permutations, product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax import mdp, shaping
from qstar_jax.mdp import TokenScores

LOGP = jnp.array([[-1.0, -2.5, -0.5], [-3.0, -0.25, -4.0]])
REF = jnp.array([[-1.5, -2.0, -0.5], [-1.0, -1.25, -2.0]])
LOGZ = jnp.array([[2.0, 0.5, -1.0], [3.0, 1.0, 0.0]])
MASK = jnp.array([[True, True, True], [True, True, False]])
SCORES = TokenScores(LOGP, REF, LOGZ, MASK)

# Whole, right-padded, left-padded with a hole, left-padded, empty.
MASKS = jnp.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 1, 1], [0, 0, 0, 0]], bool)
TRUNCATED = jnp.array([True, False, True, False, True])
# Compiled once per shape, which is faster than one by one.
preference_log_prob = jax.jit(mdp.preference_log_prob)
preference_and_gradient = jax.jit(jax.value_and_grad(mdp.preference_log_prob))
from_logits = jax.jit(TokenScores.from_logits)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


POLICY_LOGITS, REF_LOGITS = 2 * normal(10, 5, 4, 6), 2 * normal(11, 5, 4, 6)
STEP_IDS = jnp.array([[0, 0, 1, 2], [1, 1, 0, 0], [5, -1, 2, 2], [-7, 3, 0, 1], [0, 1, 2, 3]])


def assert_same(found, expected, **tolerance):
    check = np.testing.assert_allclose if tolerance else np.testing.assert_array_equal
    jax.tree.map(lambda a, b: check(a, b, **tolerance), found, expected)


# Readings of log-probabilities.


def test_rewards_by_hand():
    # beta * (logp - ref): 0.1 * [0.5, -0.5, 0], 0.1 * [-2, 1, masked]
    np.testing.assert_allclose(SCORES.rewards(0.1), [[0.05, -0.05, 0.0], [-0.2, 0.1, 0.0]], rtol=0, atol=1e-7)
    np.testing.assert_array_equal(SCORES.log_ratios(), [[0.5, -0.5, 0.0], [-2.0, 1.0, 0.0]])
    np.testing.assert_allclose(SCORES.returns(0.1), [0.0, -0.1], rtol=0, atol=1e-7)


def test_values_q_values_and_advantages_by_hand():
    np.testing.assert_allclose(SCORES.v(2.0), [[4.0, 1.0, -2.0], [6.0, 2.0, 0.0]])
    np.testing.assert_allclose(SCORES.q(2.0), [[2.0, -4.0, -3.0], [0.0, 1.5, 0.0]])
    np.testing.assert_allclose(SCORES.advantages(2.0), [[-2.0, -5.0, -1.0], [-6.0, -0.5, 0.0]])


def test_implicit_rewards_of_tables_and_numbers():
    table = jnp.log(jnp.array([[0.5, 0.5], [0.8, 0.2]]))
    found = mdp.implicit_rewards(table, jnp.log(jnp.array([0.5, 0.5])), beta=2.0)
    np.testing.assert_allclose(found, [[0, 0], [2 * np.log(1.6), 2 * np.log(0.4)]], atol=1e-6)
    assert mdp.implicit_rewards(-1.0, -3.0, beta=0.5) == 1.0


def test_what_was_not_scored_is_named():
    alone = replace(SCORES, ref_logp=None, logz=None)
    for read in (alone.log_ratios, lambda: alone.rewards(0.1), lambda: alone.returns(0.1)):
        with pytest.raises(ValueError, match="no ref_logp; score with a reference model"):
            read()
    for read in (alone.v, alone.q):
        with pytest.raises(ValueError, match=r"no logz; score with `scoring.score_tokens`"):
            read(0.1)
    np.testing.assert_array_equal(alone.advantages(0.1), SCORES.advantages(0.1))


def test_logits_without_a_reference():
    scores = from_logits(POLICY_LOGITS, None, jnp.zeros((5, 4), int), MASKS)
    assert scores.ref_logp is None and scores.logp.shape == scores.logz.shape == (5, 4)


def test_scores_from_logits_by_hand():
    # The policy has probabilities 3/4 and 1/4 and log-normalizer 2 in both states, the reference 1/2 and 1/2.
    logits = 2 + jnp.log(jnp.array([[0.75, 0.25], [0.75, 0.25]]))
    scores = from_logits(logits, jnp.zeros((2, 2)), jnp.array([0, 1]), jnp.array([True, True]))
    np.testing.assert_allclose(scores.logp, np.log([0.75, 0.25]), rtol=1e-5)
    np.testing.assert_allclose(scores.ref_logp, np.log([0.5, 0.5]), rtol=1e-6)
    np.testing.assert_allclose(scores.logz, [2, 2], rtol=1e-6)


def test_scores_from_logits_restated_in_numpy():
    tokens = jnp.where(MASKS, jnp.arange(20).reshape(5, 4) % 6, -100)
    chosen = np.where(MASKS, tokens, 0)

    def read(x):
        logz = np.log(np.exp(x).sum(-1))
        return np.take_along_axis(x, chosen[..., None], -1)[..., 0] - logz, logz

    (logp, logz), (ref_logp, _) = (read(np.asarray(x, np.float64)) for x in (POLICY_LOGITS, REF_LOGITS))
    scores = from_logits(POLICY_LOGITS, REF_LOGITS, tokens, MASKS)
    for found, expected in ((scores.logp, logp), (scores.logz, logz), (scores.ref_logp, ref_logp)):
        np.testing.assert_allclose(found, np.where(MASKS, expected, 0.0), atol=1e-5)


def test_scores_from_logits_of_excluded_tokens_and_huge_logits():
    logits = jnp.array([[1e4, 0.0, -jnp.inf], [0.0, 0.0, -jnp.inf]])
    chosen = jnp.array([0, 1])

    def total(logits):
        scores = from_logits(logits, logits[::-1], chosen, jnp.ones(2, bool))
        return scores.logp.sum() + scores.ref_logp.sum()

    scores = from_logits(logits, logits[::-1], chosen, jnp.ones(2, bool))
    np.testing.assert_allclose(scores.logp, [0.0, -np.log(2)], rtol=1e-6)
    np.testing.assert_allclose(scores.ref_logp, [-np.log(2), -1e4], rtol=1e-6)
    grad = jax.jit(jax.grad(total))(logits)
    assert np.isfinite(grad).all() and not grad[:, 2].any()


def test_q_minus_v_is_the_advantage_and_q_is_beta_times_the_logit():
    logits, chosen, everywhere = normal(0, 2, 3, 7) * 3, jnp.array([[0, 6, 2], [3, 3, 1]]), jnp.ones((2, 3), bool)
    scores = from_logits(logits, logits, chosen, everywhere)
    q, v = scores.q(0.3), scores.v(0.3)
    np.testing.assert_allclose(q - v, scores.advantages(0.3), atol=1e-6)
    np.testing.assert_allclose(q, 0.3 * jnp.take_along_axis(logits, chosen[..., None], -1)[..., 0], atol=1e-6)


def test_rewards_and_advantages_do_not_know_the_potential_of_the_logits():
    logits, ref, chosen = normal(0, 2, 3, 7), normal(1, 2, 3, 7), jnp.zeros((2, 3), int)
    shift = jnp.arange(6.0).reshape(2, 3)
    everywhere = jnp.ones((2, 3), bool)
    scores = from_logits(logits, ref, chosen, everywhere)
    shifted = from_logits(logits + shift[..., None], ref - shift[..., None], chosen, everywhere)
    np.testing.assert_allclose(shifted.logp, scores.logp, atol=1e-5)
    np.testing.assert_allclose(shifted.ref_logp, scores.ref_logp, atol=1e-5)
    np.testing.assert_allclose(shifted.logz, scores.logz + shift, atol=1e-5)


def test_the_kl_convention_takes_the_reference_out_of_q_and_advantage():
    reference = jnp.where(MASK, 0.3 * REF, 0.0)
    np.testing.assert_allclose(SCORES.advantages(0.3) - reference, SCORES.rewards(0.3), atol=1e-6)
    np.testing.assert_allclose(SCORES.q(0.3) - reference, SCORES.rewards(0.3) + SCORES.v(0.3), atol=1e-6)


# All responses of three tokens over a vocabulary of three, solved by backward induction in numpy.


@dataclass(frozen=True)
class Solved:
    r: np.ndarray
    ref: np.ndarray
    q: np.ndarray
    v: np.ndarray
    after: np.ndarray
    logp: np.ndarray
    mask: np.ndarray
    beta: float = 0.7

    def scores(self):
        return TokenScores(self.logp, self.ref, self.v / self.beta, self.mask)


@cache
def solve():
    rng, beta = np.random.default_rng(0), Solved.beta
    tree = {}

    def value(state):
        if len(state) == 3:
            return 0.0
        r, ref = rng.normal(size=3), np.log(rng.dirichlet(np.ones(3)))
        q = r + beta * ref + [value((*state, a)) for a in range(3)]
        v = beta * np.log(np.exp(q / beta).sum())
        tree[state] = r, ref, q, v
        return v

    value(())
    paths = list(product(range(3), repeat=3))
    r, ref, q = (np.array([[tree[p[:t]][i][p[t]] for t in range(3)] for p in paths]) for i in range(3))
    v = np.array([[tree[p[:t]][3] for t in range(3)] for p in paths])
    after = np.concatenate([v[:, 1:], np.zeros((27, 1))], 1)
    return Solved(r, ref, q, v, after, (q - v) / beta, np.ones((27, 3), bool))


@pytest.fixture
def solved():
    with jax.enable_x64(True):
        yield solve()


def test_optimal_values_are_read_off_the_optimal_policy(solved):
    s, close = solved, {"rtol": 0, "atol": 1e-12}
    scores = s.scores()
    assert_same(scores.v(s.beta), s.v, **close)
    assert_same(scores.q(s.beta), s.q, **close)
    assert_same(shaping.successor_values(s.v, s.mask), s.after, **close)
    assert_same(scores.rewards(s.beta) + scores.v(s.beta), s.r + s.after, **close)  # Q of the KL convention
    assert_same(scores.rewards(s.beta), s.r + s.after - s.v, **close)
    assert_same(shaping.shape_rewards(s.r, s.v, s.after, s.mask), s.r + s.after - s.v, **close)
    assert_same(scores.q(s.beta) - (s.r + s.beta * s.ref + s.after), 0 * s.q, **close)  # Eq. 7
    sums = np.cumsum(s.r, -1) + s.after - s.v[:, :1]
    assert_same(np.cumsum(scores.rewards(s.beta), -1), sums, **close)
    assert_same(scores.returns(s.beta), sums[:, -1], **close)


def test_implicit_rewards_of_the_optimum_are_equivalent_to_the_reward(solved):
    s = solved
    found = shaping.are_equivalent(s.r, s.scores().rewards(s.beta), s.mask, atol=1e-12)
    assert found.equivalent
    np.testing.assert_allclose(found.potentials, s.v, atol=1e-12)
    ranking = jnp.array([4, 20, 13])
    total = (s.r + s.after - s.v).sum(-1)
    np.testing.assert_allclose(
        preference_log_prob(s.r.sum(-1)[ranking]), mdp.preference_log_prob(total[ranking]), rtol=1e-12
    )


def test_a_truncated_response_obeys_bellman_only_with_the_value_of_its_last_state(solved):
    s = solved
    r, q, v, ref, mask = (x[:, :2] for x in (s.r, s.q, s.v, s.ref, s.mask))
    truncated = shaping.successor_values(v, mask, truncated=np.ones(27, bool), final_values=s.v[:, 2])
    np.testing.assert_allclose(q - (r + s.beta * ref + truncated), 0, atol=1e-12)
    residual = q - (r + s.beta * ref + shaping.successor_values(v, mask))
    np.testing.assert_allclose(residual, np.stack([0 * s.v[:, 2], s.v[:, 2]], -1), atol=1e-12)


# Preferences.


def test_bradley_terry_by_hand():
    # log sigma(0), log sigma(2) = -0.126928, log sigma(-2) = -2.126928
    found = preference_log_prob(jnp.array([[1.0, 1.0], [3.0, 1.0], [-1.0, 1.0]]))
    np.testing.assert_allclose(found, [-np.log(2), -0.126928, -2.126928], rtol=1e-5)


def plackett_luce(returns):
    """Product of softmaxes over what is left."""
    u = np.asarray(returns, np.float64)
    return sum(np.log(np.exp(u[k]) / np.exp(u[k:]).sum()) for k in range(len(u)))


def test_plackett_luce_by_brute_force():
    returns = 2 * normal(0, 4)
    orders = np.array(list(permutations(range(4))))
    found = preference_log_prob(returns[orders])
    np.testing.assert_allclose(found, [plackett_luce(returns[order]) for order in orders], rtol=1e-5)
    np.testing.assert_allclose(np.exp(found).sum(), 1, rtol=1e-6)


def test_absent_places_are_as_if_they_were_not_there():
    returns = 2 * normal(0, 4)
    present = np.array(list(product([False, True], repeat=4)))
    found = preference_log_prob(jnp.broadcast_to(returns, (16, 4)), present)
    expected = [plackett_luce(returns[row]) for row in present]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_rankings_of_fewer_than_two_are_certain():
    for returns, present in (
        ([3.0], None),
        ([jnp.nan, -1e30, jnp.inf], [False, True, False]),
        ([jnp.nan, -1e30, jnp.inf], [False, False, False]),
    ):
        value, grad = preference_and_gradient(jnp.array(returns), present and jnp.array(present))
        assert value == 0 and not grad.any()


def test_preferences_do_not_know_a_common_shift():
    returns = normal(0, 4)
    (value, grad), (shifted, _) = preference_and_gradient(returns), preference_and_gradient(returns + 100)
    np.testing.assert_allclose(shifted, value, rtol=1e-4)
    np.testing.assert_allclose(grad.sum(), 0, atol=1e-6)


@pytest.mark.parametrize("present", [(True, True, True), (True, True, False), (False, True, True), (True, False, True)])
@pytest.mark.parametrize("size", [1e4, 1e30])
def test_huge_returns_have_finite_preferences_and_gradients(size, present):
    for signs in product([-1.0, 0.0, 1.0], repeat=3):
        value, grad = preference_and_gradient(size * jnp.array(signs), jnp.array(present))
        left = np.compress(present, signs)
        # In the limit each place costs the distance to the best that is left.
        expected = -sum((left[k:].max() - left[k]) for k in range(len(left)))
        np.testing.assert_allclose(value / size, expected, rtol=1e-5, atol=1e-3)
        assert np.isfinite(grad).all() and not grad[~np.array(present)].any()


# Divergences.


def test_divergences_by_hand():
    # KL((3/4, 1/4) || (1/2, 1/2)) = 0.130812, KL((1/2, 1/2) || (3/4, 1/4)) = 0.143841
    logits, ref, mask = jnp.log(jnp.array([[0.75, 0.25]])), jnp.zeros((1, 2)), jnp.array([True])
    np.testing.assert_allclose(mdp.kl_divergence(logits, ref, mask), [0.130812], rtol=1e-5)
    np.testing.assert_allclose(mdp.kl_divergence(ref, logits, mask), [0.143841], rtol=1e-5)


def softmax(x):
    e = np.exp(np.asarray(x, np.float64) - np.max(x, -1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def divergence(p, q):
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(p > 0, p * (np.log(p) - np.log(q)), 0).sum(-1)


def test_divergences_restated_in_float64():
    pi, ref = softmax(POLICY_LOGITS), softmax(REF_LOGITS)
    to = mdp.kl_divergence(POLICY_LOGITS, REF_LOGITS, MASKS)
    back = mdp.kl_divergence(REF_LOGITS, POLICY_LOGITS, MASKS)
    np.testing.assert_allclose(to, np.where(MASKS, divergence(pi, ref), 0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(back, np.where(MASKS, divergence(ref, pi), 0), rtol=1e-5, atol=1e-6)
    assert (np.abs(to - back)[MASKS] > 1e-3).all()


def test_expected_rewards_of_the_reference_by_brute_force():
    pi, ref = softmax(POLICY_LOGITS), softmax(REF_LOGITS)
    expected = np.where(MASKS, (ref * 0.3 * (np.log(pi) - np.log(ref))).sum(-1), 0)
    found = -0.3 * mdp.kl_divergence(REF_LOGITS, POLICY_LOGITS, MASKS)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert (found[MASKS] < 0).all()


@pytest.mark.parametrize("backwards", [False, True])
def test_at_the_reference_divergence_and_gradient_are_zero(backwards):
    ref = REF_LOGITS.at[..., 0].set(-jnp.inf)
    shifted = ref + 3.0  # the same distribution

    def divergence(logits):
        return mdp.kl_divergence(*((ref, logits) if backwards else (logits, ref)), MASKS)

    np.testing.assert_array_equal(divergence(ref), 0)
    np.testing.assert_allclose(divergence(shifted), 0, atol=1e-6)
    grad = jax.jit(jax.grad(lambda x: divergence(x).sum()))(ref)
    np.testing.assert_allclose(grad, 0, atol=1e-6)


@pytest.mark.parametrize("where", ["both", "first"])
def test_tokens_that_are_ruled_out_add_nothing(where):
    # KL(p || q): tokens with p = 0 have no part in it, whatever q says of them.
    p, q = (x.at[..., 5].set(-jnp.inf) for x in (POLICY_LOGITS, REF_LOGITS))
    q = q if where == "both" else REF_LOGITS
    expected = np.where(MASKS, divergence(softmax(p), softmax(q)), 0)
    np.testing.assert_allclose(mdp.kl_divergence(p, q, MASKS), expected, rtol=1e-5, atol=1e-6)
    gradient = jax.jit(jax.grad(lambda p, q: mdp.kl_divergence(p, q, MASKS).sum(), argnums=(0, 1)))
    grads = gradient(p, q)
    assert np.isfinite(grads).all() and not grads[0][..., 5].any()
    # A very low logit stands for the same.
    assert_same(grads, gradient(jnp.maximum(p, -1e4), jnp.maximum(q, -1e4)), rtol=1e-4, atol=1e-6)


def test_divergence_is_infinite_where_the_other_rules_out_what_is_said():
    logits, ref, mask = jnp.array([[0.0, -20.0]]), jnp.array([[0.0, -jnp.inf]]), jnp.array([True])
    assert mdp.kl_divergence(logits, ref, mask)[0] == jnp.inf


def test_divergence_is_no_nan_where_a_probability_underflows():
    logits, ref = jnp.array([[0.0, -200.0]]), jnp.array([[0.0, -jnp.inf]])
    assert not jnp.isnan(mdp.kl_divergence(logits, ref, jnp.array([True])))[0]


def test_divergences_are_at_least_zero_near_the_reference():
    ref = normal(0, 500, 100)
    assert (mdp.kl_divergence(ref + 1e-4 * normal(1, 500, 100), ref, jnp.ones(500, bool)) >= 0).all()


def test_entropies_by_hand():
    logits = jnp.array([[0.0, 0.0, 0.0, 0.0], [jnp.log(3.0), 0.0, -jnp.inf, -jnp.inf], [jnp.nan] * 4])
    found = mdp.entropy(logits, jnp.array([True, True, False]))
    np.testing.assert_allclose(found, [np.log(4), 0.75 * np.log(4 / 3) + 0.25 * np.log(4), 0.0], rtol=1e-6)


# Steps.


def test_step_rewards_by_hand():
    rewards = jnp.array([[1.0, 2.0, 4.0, 8.0, 16.0, 32.0]])
    mask = jnp.array([[True, True, False, True, True, True]])
    ids = jnp.array([[0, 0, 0, 2, 3, -1]])
    np.testing.assert_array_equal(mdp.step_rewards(rewards, mask, ids, num_steps=3), [[3.0, 0.0, 8.0]])
    np.testing.assert_array_equal(mdp.step_rewards(rewards, mask, ids, num_steps=5), [[3.0, 0.0, 8.0, 16.0, 0.0]])
    assert mdp.step_rewards(rewards, mask, ids, num_steps=0).shape == (1, 0)


def test_steps_are_told_by_their_ids_in_any_order():
    rewards, ids = jnp.array([1.0, 2.0, 4.0, 8.0]), jnp.array([2, 0, 2, 1])
    np.testing.assert_array_equal(mdp.step_rewards(rewards, jnp.ones(4, bool), ids, num_steps=3), [2.0, 8.0, 5.0])


def test_steps_sum_to_the_return():
    rewards = normal(0, 5, 4)
    steps = mdp.step_rewards(rewards, MASKS, STEP_IDS % 4, num_steps=4)
    np.testing.assert_allclose(steps.sum(-1), jnp.where(MASKS, rewards, 0).sum(-1), rtol=1e-5, atol=1e-6)


def test_a_broken_token_breaks_its_own_step_only():
    steps = mdp.step_rewards(jnp.array([1.0, jnp.nan]), jnp.ones(2, bool), jnp.array([0, 1]), num_steps=3)
    np.testing.assert_array_equal(steps, [1.0, jnp.nan, 0.0])


def test_ids_under_the_mask_do_not_matter():
    wild = jnp.where(MASKS, STEP_IDS, np.iinfo(np.int32).min)
    rewards = normal(0, 5, 4)
    np.testing.assert_array_equal(
        mdp.step_rewards(rewards, MASKS, wild, num_steps=3), mdp.step_rewards(rewards, MASKS, STEP_IDS, num_steps=3)
    )


def test_prefix_values_by_hand():
    rewards, mask = jnp.array([1.0, 2.0, jnp.nan, 8.0]), jnp.array([True, True, False, True])
    np.testing.assert_array_equal(mdp.prefix_values(rewards, mask), [1.0, 3.0, 0.0, 11.0])


def test_the_value_at_the_end_of_a_step_is_the_sum_of_the_steps():
    rewards, ids = normal(0, 12), jnp.array([0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 4, 4])
    steps = mdp.step_rewards(rewards, jnp.ones(12, bool), ids, num_steps=5)
    ends = jnp.flatnonzero(jnp.diff(ids, append=5))
    values = mdp.prefix_values(rewards, jnp.ones(12, bool))[ends]
    np.testing.assert_allclose(values, jnp.cumsum(steps), rtol=1e-5, atol=1e-6)
