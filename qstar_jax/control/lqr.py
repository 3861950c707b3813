"""Linear-quadratic control with an entropy bonus, solved exactly: the oracle of continuous control.

States move as s' = A s + B a + w, w ~ N(0, W), and earn r = -(s' Q s + a' R a). The soft-optimal policy of discount
gamma and temperature alpha is Gaussian, with a mean that is linear in the state and one covariance:

    Q*(s, a) = r + gamma E[V*(s')]        V*(s) = alpha log integral exp(Q*(s, a) / alpha) da = -(s' P s + c)
    pi*(a | s) = exp((Q* - V*) / alpha) = N(-K s, alpha / 2 H^-1)        A* = Q* - V* = alpha log pi*

Functions are pure, and compute in numpy's float64.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.linalg import solve_discrete_are

from qstar_jax.control.segments import Episodes


@dataclass(frozen=True)
class LinearQuadratic:
    """A task; arrays are in the units of the task.

    Attributes:
        dynamics: A. Shape [N, N].
        control: B. Shape [N, M].
        state_cost: Q, symmetric and not negative. Shape [N, N].
        action_cost: R, symmetric and positive. Shape [M, M].
        noise: W, the covariance of the noise of a step. Shape [N, N].
        discount: gamma in (0, 1).
        temperature: alpha, reward per nat.
    """

    dynamics: Float[np.ndarray, "N N"]
    control: Float[np.ndarray, "N M"]
    state_cost: Float[np.ndarray, "N N"]
    action_cost: Float[np.ndarray, "M M"]
    noise: Float[np.ndarray, "N N"]
    discount: float = 0.95
    temperature: float = 0.1


@dataclass(frozen=True)
class SoftOptimum:
    """The soft-optimal policy N(-K s, alpha / 2 H^-1) of a task, and its value V*(s) = -(s' P s + c).

    Attributes:
        gain: K. Shape [M, N].
        precision: H, the curvature of -Q* in the action. Shape [M, M].
        value_matrix: P. Shape [N, N].
        value_constant: c, in units of reward.
        covariance: alpha / 2 H^-1. Shape [M, M].
    """

    gain: Float[np.ndarray, "M N"]
    precision: Float[np.ndarray, "M M"]
    value_matrix: Float[np.ndarray, "N N"]
    value_constant: float
    covariance: Float[np.ndarray, "M M"]


def point_mass(*, noise: float = 0.0, discount: float = 0.95, temperature: float = 0.1) -> LinearQuadratic:
    """Makes the task of pushing a mass in the plane to the origin.

    Args:
        noise: Variance of the noise of each coordinate of the state in a step.
        discount: See `LinearQuadratic`.
        temperature: See `LinearQuadratic`.

    Returns:
        The task: states are positions and velocities, actions are forces, which turn and couple a little, so that no
        coordinate can be learned alone.
    """
    step, still = 0.3 * np.eye(2), np.zeros((2, 2))
    turned = np.array([[1.0, 0.3], [-0.2, 0.8]])
    return LinearQuadratic(
        dynamics=np.block([[np.eye(2), step], [still, 0.9 * np.eye(2)]]),
        control=np.vstack([still, 0.3 * turned]),
        state_cost=np.diag([1.0, 1.0, 0.1, 0.1]),
        action_cost=np.array([[0.2, 0.05], [0.05, 0.3]]),
        noise=noise * np.eye(4),
        discount=discount,
        temperature=temperature,
    )


def solve(task: LinearQuadratic) -> SoftOptimum:
    """Solves the discounted Riccati equation, and the constants that the entropy adds.

    Returns:
        The optimum. The gain is that of the task without entropy; temperature sets the covariance.

    References:
        arXiv 2404.12358, Eq. 3 to 5, for continuous actions; Levine, arXiv 1805.00909, for the Gaussian policy.
    """
    gamma, alpha, actions = task.discount, task.temperature, task.control.shape[1]
    # Discounting scales dynamics and control by sqrt(gamma) in the undiscounted equation.
    scale = gamma**0.5
    value = solve_discrete_are(scale * task.dynamics, scale * task.control, task.state_cost, task.action_cost)
    precision = task.action_cost + gamma * task.control.T @ value @ task.control
    gain = np.linalg.solve(precision, gamma * task.control.T @ value @ task.dynamics)
    # integral exp(-x' H x / alpha) dx = (pi alpha)^(M / 2) det(H)^(-1 / 2), in every step; noise costs tr(P W).
    entropy = alpha / 2 * (actions * np.log(np.pi * alpha) - np.linalg.slogdet(precision)[1])
    constant = (gamma * np.trace(value @ task.noise) - entropy) / (1 - gamma)
    return SoftOptimum(gain, precision, value, float(constant), alpha / 2 * np.linalg.inv(precision))


def rewards(
    task: LinearQuadratic, states: Float[np.ndarray, "*B N"], actions: Float[np.ndarray, "*B M"]
) -> Float[np.ndarray, "*B"]:
    """Computes r(s, a) = -(s' Q s + a' R a). Shape [...]."""
    return -(_square(task.state_cost, states) + _square(task.action_cost, actions))


def values(optimum: SoftOptimum, states: Float[np.ndarray, "*B N"]) -> Float[np.ndarray, "*B"]:
    """Computes V*(s). Shape [...]."""
    return -(_square(optimum.value_matrix, states) + optimum.value_constant)


def q_values(
    task: LinearQuadratic,
    optimum: SoftOptimum,
    states: Float[np.ndarray, "*B N"],
    actions: Float[np.ndarray, "*B M"],
) -> Float[np.ndarray, "*B"]:
    """Computes Q*(s, a) = r + gamma E[V*(s')]. Shape [...]."""
    following = states @ task.dynamics.T + actions @ task.control.T
    noise = np.trace(optimum.value_matrix @ task.noise)
    return rewards(task, states, actions) + task.discount * (values(optimum, following) - noise)


def advantages(
    task: LinearQuadratic,
    optimum: SoftOptimum,
    states: Float[np.ndarray, "*B N"],
    actions: Float[np.ndarray, "*B M"],
) -> Float[np.ndarray, "*B"]:
    """Computes A*(s, a) = Q* - V* = alpha log pi*(a | s). Shape [...]."""
    return q_values(task, optimum, states, actions) - values(optimum, states)


def roll_out(
    task: LinearQuadratic,
    gain: Float[np.ndarray, "M N"],
    covariance: Float[np.ndarray, "M M"],
    *,
    episodes: int,
    steps: int,
    seed: int,
) -> Episodes:
    """Plays episodes of a policy N(-gain s, covariance) from standard normal states, with V* at every state.

    Args:
        task: The task.
        gain: The policy's gain.
        covariance: Its covariance.
        episodes: Number of episodes E.
        steps: Steps T of each.
        seed: Seed of states, actions and noise.

    Returns:
        The episodes.
    """
    rng = np.random.default_rng(seed)
    size, width = task.control.shape
    states, chosen = [rng.normal(size=(episodes, size))], []
    for _ in range(steps):
        noise = rng.multivariate_normal(np.zeros(width), covariance, episodes)
        chosen.append(states[-1] @ -gain.T + noise)
        moved = states[-1] @ task.dynamics.T + chosen[-1] @ task.control.T
        states.append(moved + rng.multivariate_normal(np.zeros(size), task.noise, episodes))
    observations, actions = np.stack(states, axis=1), np.stack(chosen, axis=1)
    return Episodes(
        observations=observations,
        actions=actions,
        rewards=rewards(task, observations[:, :-1], actions),
        lengths=np.full(episodes, steps),
        values=values(solve(task), observations),
    )


def cost(
    task: LinearQuadratic,
    act: Callable[[Float[np.ndarray, "B N"]], Float[np.ndarray, "B M"]],
    states: Float[np.ndarray, "B N"],
    *,
    steps: int = 200,
) -> float:
    """Computes the mean discounted cost of a policy without noise, where nothing in the task is random.

    Args:
        task: The task; its noise is left out.
        act: From states to actions.
        states: Where it begins. Shape [B, N].
        steps: Steps that count.

    Returns:
        The sum of -gamma^t r_t, averaged over the states.
    """
    total = 0.0
    for step in range(steps):
        actions = act(states)
        total -= task.discount**step * rewards(task, states, actions).mean()
        states = states @ task.dynamics.T + actions @ task.control.T
    return float(total)


def _square(matrix: Float[np.ndarray, "N N"], vectors: Float[np.ndarray, "*B N"]) -> Float[np.ndarray, "*B"]:
    return np.einsum("...i,ij,...j->...", vectors, matrix, vectors)
