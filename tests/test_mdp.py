import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax import mdp

LOGP = jnp.array([[-1.0, -2.5, -0.5], [-3.0, -0.25, -4.0]])
REF = jnp.array([[-1.5, -2.0, -0.5], [-1.0, -1.25, -2.0]])
LOGZ = jnp.array([[2.0, 0.5, -1.0], [3.0, 1.0, 0.0]])
MASK = jnp.array([[True, True, True], [True, True, False]])


def test_rewards_by_hand():
    # beta * (logp - ref): 0.1 * [0.5, -0.5, 0], 0.1 * [-2, 1, masked]
    rewards = mdp.implicit_rewards(LOGP, REF, MASK, beta=0.1)
    np.testing.assert_allclose(rewards, [[0.05, -0.05, 0.0], [-0.2, 0.1, 0.0]], rtol=0, atol=1e-7)


def test_values_and_q_values_by_hand():
    np.testing.assert_allclose(mdp.state_values(LOGZ, beta=2.0), [[4.0, 1.0, -2.0], [6.0, 2.0, 0.0]])
    np.testing.assert_allclose(mdp.q_values(LOGP, LOGZ, beta=2.0), [[2.0, -4.0, -3.0], [0.0, 1.5, -8.0]])


def test_q_minus_v_is_beta_log_pi_and_q_is_beta_times_the_logit():
    logits = jax.random.normal(jax.random.key(0), (2, 3, 7)) * 3
    action = jnp.array([[0, 6, 2], [3, 3, 1]])
    logz = jax.nn.logsumexp(logits, -1)
    chosen = jnp.take_along_axis(logits, action[..., None], -1)[..., 0]
    q, v = mdp.q_values(chosen - logz, logz, beta=0.3), mdp.state_values(logz, beta=0.3)
    np.testing.assert_allclose(q - v, 0.3 * (chosen - logz), atol=1e-6)
    np.testing.assert_allclose(q, 0.3 * chosen, atol=1e-6)
    # V is the soft maximum of Q over all actions (Eq. 6).
    np.testing.assert_allclose(v, 0.3 * jax.nn.logsumexp(0.3 * logits / 0.3, -1), atol=1e-6)


def test_rewards_do_not_know_the_potential_of_the_logits():
    # Shifting all logits of a state moves Q and V alike and leaves the advantage alone.
    q, v = mdp.q_values(LOGP, LOGZ, beta=0.5), mdp.state_values(LOGZ, beta=0.5)
    shifted_q, shifted_v = mdp.q_values(LOGP, LOGZ + 7.0, beta=0.5), mdp.state_values(LOGZ + 7.0, beta=0.5)
    np.testing.assert_allclose(shifted_q - q, 3.5, atol=1e-6)
    np.testing.assert_allclose(shifted_q - shifted_v, q - v, atol=1e-6)


@pytest.mark.parametrize("rubbish", [-jnp.inf, jnp.inf, jnp.nan, 1e30])
@pytest.mark.parametrize("operand", [0, 1])
def test_what_stands_under_the_mask_changes_neither_value_nor_gradient(rubbish, operand):
    def total(logp, ref):
        return (mdp.implicit_rewards(logp, ref, MASK, beta=0.1) ** 2).sum()

    clean = [LOGP, REF]
    dirty = list(clean)
    dirty[operand] = dirty[operand].at[1, 2].set(rubbish)
    chex.assert_trees_all_equal(
        jax.value_and_grad(total, argnums=(0, 1))(*dirty), jax.value_and_grad(total, argnums=(0, 1))(*clean)
    )
    assert jax.grad(total)(*dirty)[1, 2] == 0


def test_batched_equals_vmapped():
    row = jax.vmap(lambda *x: mdp.implicit_rewards(*x, beta=0.1))
    np.testing.assert_array_equal(row(LOGP, REF, MASK), mdp.implicit_rewards(LOGP, REF, MASK, beta=0.1))
