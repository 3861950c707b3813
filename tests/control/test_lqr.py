import numpy as np
import pytest
from scipy.linalg import solve_discrete_lyapunov

from qstar_jax.control import lqr


@pytest.fixture(params=[0.0, 0.02])
def task(request):
    return lqr.point_mass(noise=request.param)


@pytest.fixture
def line():
    """One state, one action, with noise: integrals over both can be done numerically."""
    one = np.ones((1, 1))
    return lqr.LinearQuadratic(0.9 * one, 0.7 * one, 0.8 * one, 0.3 * one, 0.05 * one, discount=0.9, temperature=0.4)


def expected_value_after(task, optimum, states, actions):
    """E[V*(s')] by Gauss-Hermite quadrature over the noise; one dimension."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    after = states @ task.dynamics.T + actions @ task.control.T
    return lqr.values(optimum, after[..., None, :] + (task.noise[0, 0] ** 0.5 * nodes)[:, None]) @ (
        weights / weights.sum()
    )


def test_the_value_solves_the_soft_bellman_equation_by_quadrature(line):
    optimum, alpha = lqr.solve(line), line.temperature
    actions = np.linspace(-12, 12, 20_001)[:, None]
    width = actions[1, 0] - actions[0, 0]
    for state in (-1.5, 0.0, 0.8):
        states = np.full_like(actions, state)
        q = lqr.rewards(line, states, actions) + line.discount * expected_value_after(line, optimum, states, actions)
        np.testing.assert_allclose(lqr.q_values(line, optimum, states, actions), q, rtol=1e-12, atol=1e-12)
        # The trapezoidal rule is exact to rounding for a Gaussian that has vanished at both ends.
        value = alpha * (np.log(np.exp((q - q.max()) / alpha).sum() * width) + q.max() / alpha)
        np.testing.assert_allclose(lqr.values(optimum, np.array([state])), value, atol=1e-10)
        density = np.exp(lqr.advantages(line, optimum, states, actions) / alpha)
        mean = (density * actions[:, 0]).sum() * width
        variance = (density * (actions[:, 0] - mean) ** 2).sum() * width
        np.testing.assert_allclose(density.sum() * width, 1, atol=1e-10)
        np.testing.assert_allclose(mean, -optimum.gain[0, 0] * state, atol=1e-10)
        np.testing.assert_allclose(variance, optimum.covariance[0, 0], atol=1e-10)


def test_value_iteration_by_quadrature_finds_the_value(line):
    """From V = 0, with every integral over actions and noise done numerically, knowing only that V is a parabola."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    actions = np.linspace(-10, 10, 2_001)
    states, width = np.array([-1.0, 0.0, 1.5]), actions[1] - actions[0]
    after = 0.9 * states[:, None, None] + 0.7 * actions[:, None] + line.noise[0, 0] ** 0.5 * nodes
    earned = -(0.8 * states[:, None] ** 2 + 0.3 * actions**2)
    parabola = np.zeros(3)
    for _ in range(260):  # the error shrinks to 0.9^260 = 1e-12
        q = earned + line.discount * np.polyval(parabola, after) @ (weights / weights.sum())
        largest = q.max(1)
        value = largest + line.temperature * np.log(np.exp((q - largest[:, None]) / line.temperature).sum(1) * width)
        parabola = np.polyfit(states, value, 2)
    np.testing.assert_allclose(lqr.values(lqr.solve(line), states[:, None]), value, atol=1e-8)


def test_the_advantage_is_the_log_density_of_the_gaussian_policy(task):
    rng, optimum = np.random.default_rng(0), lqr.solve(task)
    states, actions = rng.normal(size=(50, 4)), rng.normal(size=(50, 2))
    from_mean = actions + states @ optimum.gain.T
    inverse = np.linalg.inv(optimum.covariance)
    log_prob = -0.5 * np.einsum("bi,ij,bj->b", from_mean, inverse, from_mean)
    log_prob -= 0.5 * np.linalg.slogdet(2 * np.pi * optimum.covariance)[1]
    found = lqr.advantages(task, optimum, states, actions)
    np.testing.assert_allclose(found, task.temperature * log_prob, atol=1e-11)


def test_the_gain_is_the_limit_of_riccati_steps(task):
    optimum, value = lqr.solve(task), np.zeros((4, 4))
    a, b, gamma = task.dynamics, task.control, task.discount
    for _ in range(2000):
        gain = np.linalg.solve(task.action_cost + gamma * b.T @ value @ b, gamma * b.T @ value @ a)
        closed = a - b @ gain
        value = task.state_cost + gain.T @ task.action_cost @ gain + gamma * closed.T @ value @ closed
    np.testing.assert_allclose(optimum.gain, gain, atol=1e-10)
    np.testing.assert_allclose(optimum.value_matrix, value, atol=1e-10)


def test_rewards_and_values_at_both_ends_are_the_sum_of_advantages():
    """Where nothing is random, the label by regret of a segment is exactly its sum of A*."""
    from qstar_jax.control.segments import draw_segments

    task = lqr.point_mass()
    optimum = lqr.solve(task)
    episodes = lqr.roll_out(task, 0.5 * optimum.gain, np.eye(2), episodes=5, steps=20, seed=0)
    segments = draw_segments(episodes, length=7, count=30, label="regret", discount=task.discount, seed=0)
    discounts = task.discount ** np.arange(7)
    expected = lqr.advantages(task, optimum, segments.observations, segments.actions) @ discounts
    np.testing.assert_allclose(segments.scores, expected, atol=1e-10)
    by_reward = draw_segments(episodes, length=7, count=30, label="reward", discount=task.discount, seed=0)
    earned = lqr.rewards(task, segments.observations, segments.actions) @ discounts
    np.testing.assert_allclose(by_reward.scores, earned, atol=1e-10)


@pytest.mark.parametrize("share", [1.0, 0.6])
def test_the_cost_of_a_linear_policy_solves_its_lyapunov_equation(share):
    task = lqr.point_mass()
    gain, starts = share * lqr.solve(task).gain, np.random.default_rng(0).normal(size=(20, 4))
    closed = task.dynamics - task.control @ gain
    stage = task.state_cost + gain.T @ task.action_cost @ gain
    value = solve_discrete_lyapunov(task.discount**0.5 * closed.T, stage)
    expected = np.einsum("bi,ij,bj->b", starts, value, starts).mean()
    cost = lqr.cost(task, lambda states: -states @ gain.T, starts)
    np.testing.assert_allclose(cost, expected, rtol=1e-10)
    if share == 1:
        np.testing.assert_allclose(value, lqr.solve(task).value_matrix, atol=1e-10)
