"""Policy gradients against enumeration of every response of a small tree, in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax import losses, tabular
from qstar_jax.tabular import TokenTree

EXACT = {"rtol": 0, "atol": 1e-10}
TREE = TokenTree(3, 3, eos=1)
MASK = jnp.asarray(TREE.paths.mask)
KEYS = jax.random.split(jax.random.key(0), 5)


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def logits():
    return jax.random.normal(KEYS[0], TREE.shape)


@pytest.fixture
def rewards():
    return jax.random.normal(KEYS[1], TREE.shape)


@pytest.fixture
def ref_logp():
    return jax.nn.log_softmax(1.5 * jax.random.normal(KEYS[2], TREE.shape))


def exact_gradient(tree, logits, rewards):
    """Policy gradient theorem: visits of s times pi(a | s) (Q(s, a) - V(s)), from the leaves up, in plain numpy."""
    policy, rewards = np.exp(np.asarray(jax.nn.log_softmax(logits))), np.asarray(rewards)
    values, q = np.zeros(len(policy) + 1), np.zeros_like(policy)
    for state in reversed(range(len(policy))):
        q[state] = rewards[state] + values[tree.children[state]]
        values[state] = policy[state] @ q[state]
    visits = np.zeros(len(policy) + 1)
    visits[0] = 1
    for state, token in itertools.product(range(len(policy)), range(tree.vocabulary)):
        visits[tree.children[state, token]] += visits[state] * policy[state, token]
    return visits[:-1, None] * policy * (q - values[:-1, None])


def expected_gradient(logits, token_loss):
    """Gradient of `token_loss(logp [N, T])`, weighted by how often the policy samples each response."""
    probability = jnp.exp(tabular.path_sums(TREE, jax.nn.log_softmax(logits)))

    def loss(logits):
        return (probability[:, None] * token_loss(tabular.on_paths(TREE, jax.nn.log_softmax(logits)))).sum()

    return -jax.jit(jax.grad(loss))(logits)


# The gradient


@pytest.mark.parametrize("credit", ["to go", "whole", "baseline"])
def test_reinforce_is_the_exact_policy_gradient(credit, logits, rewards):
    on_paths = tabular.on_paths(TREE, rewards)
    weights = {
        "to go": losses.returns_to_go(on_paths, MASK),
        "whole": jnp.broadcast_to(on_paths.sum(-1, keepdims=True), MASK.shape),
        "baseline": losses.returns_to_go(on_paths, MASK) - jnp.array([0.7, -2.0, 5.0]),
    }[credit]
    found = expected_gradient(logits, lambda logp: losses.reinforce(logp, weights, MASK))
    np.testing.assert_allclose(found, exact_gradient(TREE, logits, rewards), **EXACT)


def test_the_surrogate_of_the_sampling_policy_has_the_gradient_of_reinforce(logits, rewards):
    advantages = losses.returns_to_go(tabular.on_paths(TREE, rewards), MASK)
    old = tabular.on_paths(TREE, jax.nn.log_softmax(logits))
    found = expected_gradient(logits, lambda logp: losses.clipped_surrogate(logp, old, advantages, MASK)[0])
    np.testing.assert_allclose(found, exact_gradient(TREE, logits, rewards), **EXACT)


def test_a_penalty_in_the_reward_gives_the_gradient_of_the_regularized_problem(logits, rewards, ref_logp):
    """Eq. 2, and that its optimum is where this gradient vanishes."""
    beta = 0.6

    def objective(logits):
        logp = jax.nn.log_softmax(logits)
        gain = tabular.path_sums(TREE, rewards) - beta * tabular.path_sums(TREE, logp - ref_logp)
        return (jnp.exp(tabular.path_sums(TREE, logp)) * gain).sum()

    def found(logits):
        logp, ref = (tabular.on_paths(TREE, table) for table in (jax.nn.log_softmax(logits), ref_logp))
        penalized = tabular.on_paths(TREE, rewards) - beta * losses.kl_penalty(logp, ref, MASK)
        weights = losses.returns_to_go(penalized, MASK)
        return expected_gradient(logits, lambda logp: losses.reinforce(logp, weights, MASK))

    np.testing.assert_allclose(found(logits), jax.jit(jax.grad(objective))(logits), **EXACT)
    optimum = tabular.soft_value_iteration(TREE, rewards, ref_logp, beta=beta).log_policy
    np.testing.assert_allclose(found(optimum), 0, **EXACT)
    assert np.abs(found(logits)).max() > 0.01


@pytest.mark.parametrize("advantages", ["response", "token"])
def test_baselines_of_the_other_samples_are_unbiased(advantages, logits, rewards):
    """Every group of three samples of a smaller tree, by its probability."""
    tree = TokenTree(2, 2, eos=1)
    logits, rewards = logits[:2, :2], rewards[:2, :2]
    groups = np.array(list(itertools.product(range(len(tree.paths.mask)), repeat=3)))  # [M, 3]
    mask = jnp.asarray(tree.paths.mask)[groups]
    probability = jnp.exp(tabular.path_sums(tree, jax.nn.log_softmax(logits)))[groups].prod(-1)
    on_groups = tabular.on_paths(tree, rewards)[groups]
    if advantages == "response":
        weights = jnp.broadcast_to(losses.leave_one_out(on_groups.sum(-1))[..., None], mask.shape)
    else:
        weights = losses.token_advantages(on_groups, mask)

    def loss(logits):
        logp = tabular.on_paths(tree, jax.nn.log_softmax(logits))[groups]
        return (probability * losses.reinforce(logp, weights, mask).sum(-1).mean(-1)).sum()

    np.testing.assert_allclose(-jax.grad(loss)(logits), exact_gradient(tree, logits, rewards), **EXACT)
    np.testing.assert_allclose(probability.sum(), 1, **EXACT)


def test_a_baseline_that_reads_the_sample_itself_is_biased(logits, rewards):
    """The mean of the whole group shrinks the gradient by 1 - 1/G: the test above can tell."""
    tree = TokenTree(2, 2, eos=1)
    logits, rewards = logits[:2, :2], rewards[:2, :2]
    groups = np.array(list(itertools.product(range(len(tree.paths.mask)), repeat=3)))
    probability = jnp.exp(tabular.path_sums(tree, jax.nn.log_softmax(logits)))[groups].prod(-1)
    returns = tabular.path_sums(tree, rewards)[groups]
    weights = (returns - returns.mean(-1, keepdims=True))[..., None]

    def loss(logits):
        logp = tabular.on_paths(tree, jax.nn.log_softmax(logits))[groups]
        return -(probability * (weights * logp).sum(-1).mean(-1)).sum()

    expected = exact_gradient(tree, logits, rewards)
    np.testing.assert_allclose(-jax.grad(loss)(logits), expected * 2 / 3, **EXACT)
    assert np.abs(expected).max() > 0.01


# Rewards


def reward_of_responses(tree, returns):
    """The reward of a whole response as a table: all of it on its last token. Shape [S, V]."""
    paths = tree.paths
    last = paths.mask.sum(-1) - 1
    rows = np.arange(len(last))
    return jnp.zeros(tree.shape).at[paths.states[rows, last], paths.tokens[rows, last]].set(returns)


def table_of(tree, values):
    """The table [S, V] whose entries along the responses are `values` [N, T]."""
    paths = tree.paths
    table = jnp.zeros(tree.shape).at[paths.states[paths.mask], paths.tokens[paths.mask]].set(values[paths.mask])
    np.testing.assert_allclose(tabular.on_paths(tree, table), values, **EXACT)  # shared prefixes agree
    return table


@pytest.mark.parametrize("token_weight, sequence_weight", [(1.0, 0.0), (0.3, 0.7), (0.05, 1.0), (0.0, 1.0)])
def test_token_rewards_of_dpo_have_the_optimal_policy_of_the_sequence_reward(token_weight, sequence_weight, ref_logp):
    """RTO's reward, unclipped, of a DPO model that is optimal for R: the optimum is that of (b1 + b3) R."""
    beta, dpo_beta = 0.4, 0.9
    returns = jax.random.normal(KEYS[3], (len(MASK),))
    sequence = reward_of_responses(TREE, returns)
    dpo = tabular.soft_value_iteration(TREE, sequence, ref_logp, beta=dpo_beta).log_policy
    token_rewards = dpo_beta * tabular.on_paths(TREE, dpo - ref_logp)
    composed = losses.rto_rewards(
        token_rewards, returns, MASK, token_weight=token_weight, sequence_weight=sequence_weight
    )
    found = tabular.soft_value_iteration(TREE, table_of(TREE, composed), ref_logp, beta=beta)
    scale = token_weight + sequence_weight
    expected = tabular.soft_value_iteration(TREE, scale * sequence, ref_logp, beta=beta)
    np.testing.assert_allclose(found.log_policy, expected.log_policy, **EXACT)
    assert (token_weight == 0) == np.allclose(found.v, expected.v)  # the rewards themselves differ


@pytest.mark.parametrize("token_weight", [0.5, 1.0])
def test_token_rewards_of_dpo_have_the_expected_gradient_of_the_sequence_reward(token_weight, logits, ref_logp):
    """At any policy, where b1 + b3 = 1: the returns differ by V*(s_0) only, the returns to go by V*(s_t)."""
    returns = jax.random.normal(KEYS[3], (len(MASK),))
    sequence = reward_of_responses(TREE, returns)
    dpo = tabular.soft_value_iteration(TREE, sequence, ref_logp, beta=0.9).log_policy
    token_rewards = 0.9 * tabular.on_paths(TREE, dpo - ref_logp)
    composed = losses.rto_rewards(
        token_rewards, returns, MASK, token_weight=token_weight, sequence_weight=1 - token_weight
    )
    weights = losses.returns_to_go(composed, MASK)
    found = expected_gradient(logits, lambda logp: losses.reinforce(logp, weights, MASK))
    np.testing.assert_allclose(found, exact_gradient(TREE, logits, sequence), **EXACT)
    assert np.abs(weights - losses.returns_to_go(tabular.on_paths(TREE, sequence), MASK)).max() > 0.1


def test_token_rewards_of_dpo_change_the_variance_of_the_gradient():
    """Against the score less its mean: all responses of 200 trees, at a uniform reference, which the policy is."""
    tree, betas = TokenTree(3, 4, eos=None), jnp.array([0.1, 0.3, 1.0, 3.0])
    ref_logp, mask = jnp.full(tree.shape, -np.log(3)), jnp.asarray(tree.paths.mask)

    @jax.jit
    def to_go(returns):
        sequence = reward_of_responses(tree, returns)

        def of(beta):
            dpo = tabular.soft_value_iteration(tree, sequence, ref_logp, beta=beta).log_policy
            return losses.returns_to_go(beta * tabular.on_paths(tree, dpo - ref_logp), mask)

        score = jnp.broadcast_to((returns - returns.mean())[:, None], mask.shape)
        return jnp.concatenate([jax.vmap(of)(betas), score[None]]), sequence

    variances = np.zeros(5)
    for returns in jax.random.normal(KEYS[4], (200, len(mask))):
        weights, sequence = to_go(returns)
        # |gradient of log pi(a | s)|^2 is (1 - pi(a | s))^2 + sum over other tokens b of pi(b | s)^2: 2/3 here.
        squares = 2 / 3 * np.square(weights).sum(-1).mean(-1)
        variances += squares - np.square(exact_gradient(tree, ref_logp, sequence)).sum()
    np.testing.assert_allclose(variances[:4] / variances[4], [3.5, 2.2, 1.10, 0.91], rtol=0.02)


def test_rto_rewards_by_hand():
    token_rewards = jnp.array([[1.0, -3.0, 9.0, 0.5], [2.0, 7.0, 8.0, 9.0], [5.0, 5.0, 5.0, 5.0]])
    mask = jnp.array([[True, True, False, True], [True, False, False, False], [False] * 4])
    scores = jnp.array([10.0, 20.0, 30.0])
    options = {"token_weight": 0.5, "token_clip": 0.8, "sequence_weight": 2.0}
    found = losses.rto_rewards(token_rewards, scores, mask, **options)
    np.testing.assert_allclose(found, [[0.5, -0.8, 0, 20.25], [40.8, 0, 0, 0], [0, 0, 0, 0]], **EXACT)


def test_returns_and_advantages_by_hand():
    rewards = jnp.array([[1.0, 2.0, 9.0, 4.0], [3.0, 9.0, 9.0, 9.0], [0.0, 0.0, 0.0, 6.0]])
    mask = jnp.array([[True, True, False, True], [True, False, False, False], [True, True, True, True]])
    np.testing.assert_allclose(losses.returns_to_go(rewards, mask), [[7, 6, 0, 4], [3, 0, 0, 0], [6, 6, 6, 6]])
    np.testing.assert_allclose(losses.leave_one_out(jnp.array([7.0, 3.0, 6.0])), [2.5, -3.5, 1.0])
    # The second sample has ended after its first token and counts with 3; the first has 4 to go at the third position.
    expected = [[7 - 4.5, 6 - 4.5, 0, 4 - 4.5], [3 - 6.5, 0, 0, 0], [6 - 5, 6 - 4.5, 6 - 3.5, 6 - 3.5]]
    np.testing.assert_allclose(losses.token_advantages(rewards, mask), expected)


def test_advantages_of_a_reward_at_the_end_are_those_of_responses():
    mask = jnp.arange(5) < jnp.array([2, 5, 1, 4])[:, None]
    scores = jax.random.normal(KEYS[3], (4,))
    rewards = losses.rto_rewards(jnp.zeros(mask.shape), scores, mask)
    expected = jnp.where(mask, losses.leave_one_out(scores)[:, None], 0)
    np.testing.assert_allclose(losses.token_advantages(rewards, mask), expected, **EXACT)


def test_one_sample_has_no_others():
    with pytest.raises(ValueError, match="needs at least 2"):
        losses.leave_one_out(jnp.ones((3, 1)))
    with pytest.raises(ValueError, match="needs at least 2"):
        losses.token_advantages(jnp.ones((3, 1, 2)), jnp.ones((3, 1, 2), bool))


# The penalty


def test_estimates_and_gradients_of_the_divergence(logits, ref_logp):
    """Over all tokens of one state: k1 and k3 are the divergence on average; what the gradients are on average."""
    state, mask = slice(0, 1), jnp.ones((3,), bool)
    logits, reference = logits[state][0], ref_logp[state][0]
    policy = jax.nn.softmax(logits)

    def divergence(logits):
        return (jax.nn.softmax(logits) * (jax.nn.log_softmax(logits) - reference)).sum()

    def reverse(logits):
        return (jnp.exp(reference) * (reference - jax.nn.log_softmax(logits))).sum()

    def mean(estimator, logits):
        return (policy * losses.kl_penalty(jax.nn.log_softmax(logits), reference, mask, estimator=estimator)).sum()

    for estimator in ("k1", "k3"):
        np.testing.assert_allclose(mean(estimator, logits), divergence(logits), **EXACT)
    assert abs(mean("k2", logits) - divergence(logits)) > 1e-3
    for estimator, expected in (("k1", lambda _: 0.0), ("k2", divergence), ("k3", reverse)):
        gradient = jax.grad(lambda x, estimator=estimator: mean(estimator, x))(logits)
        np.testing.assert_allclose(gradient, jax.grad(expected)(logits), **EXACT, err_msg=estimator)
    with pytest.raises(ValueError, match="expected k1, k2 or k3"):
        mean("k4", logits)


# The surrogate


def random_tokens(seed=4):
    keys = jax.random.split(jax.random.key(seed), 4)
    old = -jax.random.exponential(keys[0], (3, 4, 6))
    logp = jnp.minimum(old + 0.4 * jax.random.normal(keys[1], old.shape), 0)
    mask = jax.random.bernoulli(keys[3], 0.8, old.shape)
    return logp, old, jax.random.normal(keys[2], old.shape), mask


@pytest.mark.parametrize("clip_low, clip_high", [(0.2, 0.2), (0.1, 0.4)])
def test_the_surrogate_is_that_of_a_loop_over_tokens(clip_low, clip_high):
    logp, old, advantages, mask = random_tokens()
    options = {"clip_low": clip_low, "clip_high": clip_high}
    found, clipped = losses.clipped_surrogate(logp, old, advantages, mask, **options)
    gradient = jax.grad(lambda x: losses.clipped_surrogate(x, old, advantages, mask, **options)[0].sum())(logp)
    for place in np.ndindex(*mask.shape):
        ratio = np.exp(float(logp[place]) - float(old[place]))
        gain = float(advantages[place])
        bounded = min(max(ratio, 1 - clip_low), 1 + clip_high)
        expected = -min(ratio * gain, bounded * gain) if mask[place] else 0.0
        stopped = bool(mask[place]) and bounded * gain < ratio * gain
        np.testing.assert_allclose(found[place], expected, **EXACT)
        assert bool(clipped[place]) == stopped
        slope = -ratio * gain if mask[place] and not stopped else 0.0
        np.testing.assert_allclose(gradient[place], slope, **EXACT)
    assert 0 < clipped.sum() < mask.sum()


@pytest.mark.parametrize("name", ["reinforce", "clipped_surrogate", "kl_penalty", "returns_to_go", "rto_rewards"])
def test_what_is_masked_changes_neither_results_nor_gradients(name):
    logp, old, advantages, mask = random_tokens()
    functions = {
        "reinforce": lambda x: losses.reinforce(x, jnp.where(mask, advantages, jnp.nan), mask),
        "clipped_surrogate": lambda x: losses.clipped_surrogate(x, jnp.where(mask, old, -jnp.inf), advantages, mask)[0],
        "kl_penalty": lambda x: losses.kl_penalty(x, jnp.where(mask, old, -jnp.inf), mask, estimator="k3"),
        "returns_to_go": lambda x: losses.returns_to_go(x, mask),
        "rto_rewards": lambda x: losses.rto_rewards(x, jnp.ones(mask.shape[:-1]), mask),
    }
    function, dirty = functions[name], jnp.where(mask, logp, jnp.nan)
    np.testing.assert_array_equal(function(dirty), function(logp))
    assert not np.any(np.where(mask, 0, function(dirty)))
    gradient = jax.grad(lambda x: function(x).sum())(dirty)
    assert np.isfinite(gradient).all() and not np.any(np.where(mask, 0, gradient))
    assert np.any(gradient) == (name in ("reinforce", "clipped_surrogate", "kl_penalty"))


# Next to TRL


@pytest.fixture(scope="module")
def trl_grpo():
    """TRL's GRPO loss on given log-probabilities, without a model: `(logp, old, ref, advantages, mask, beta)`."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("trl")
    from collections import defaultdict
    from types import SimpleNamespace

    from trl.trainer.grpo_trainer import GRPOTrainer

    def run(logp, old, ref, advantages, mask, beta, low, high):
        logp, old, ref, advantages = (torch.tensor(np.asarray(x)) for x in (logp, old, ref, advantages))
        mask = torch.tensor(np.asarray(mask)).long()
        logp.requires_grad_()

        class Stand(SimpleNamespace):
            def __getattr__(self, name):  # every feature that is not under test is off
                return None

        trainer = Stand(
            model=SimpleNamespace(training=True),
            args=Stand(use_bias_correction_kl=False, delta=None),
            accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1),
            _metrics=defaultdict(lambda: defaultdict(list)),
            _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logp, torch.zeros_like(logp), None),
            loss_type="bnpo",
            importance_sampling_level="token",
            top_entropy_quantile=1.0,
            epsilon_low=low,
            epsilon_high=high,
            beta=beta,
            current_gradient_accumulation_steps=1,
            use_vllm=False,
            aux_loss_enabled=False,
        )
        inputs = {
            "prompt_ids": torch.zeros(len(mask), 1, dtype=torch.long),
            "prompt_mask": torch.ones(len(mask), 1, dtype=torch.long),
            "completion_ids": torch.zeros_like(mask),
            "completion_mask": mask,
            "advantages": advantages,
            "old_per_token_logps": old,
            "ref_per_token_logps": ref,
        }
        loss = GRPOTrainer._compute_loss(trainer, None, inputs)
        loss.backward()
        return loss.item(), logp.grad.numpy()

    return run


@pytest.mark.parity
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_surrogate_and_penalty_are_those_of_trl(beta, trl_grpo):
    """The mean over tokens of the surrogate, and k3 as a term of the loss."""
    logp, old, advantages, mask = (x.reshape(-1, 6) for x in random_tokens())
    ref = old + 0.3 * jax.random.normal(KEYS[4], old.shape)

    def ours(logp):
        surrogate = losses.clipped_surrogate(logp, old, advantages, mask, clip_low=0.2, clip_high=0.3)[0]
        penalty = losses.kl_penalty(logp, ref, mask, estimator="k3")
        return (surrogate + beta * penalty).sum() / mask.sum()

    expected, gradient = trl_grpo(logp, old, ref, advantages, mask, beta, 0.2, 0.3)
    np.testing.assert_allclose(ours(logp), expected, rtol=0, atol=1e-9)
    np.testing.assert_allclose(jax.grad(ours)(logp), gradient, rtol=0, atol=1e-9)
