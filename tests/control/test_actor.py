import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax.control.actor import Actor

KINDS = ("deterministic", "gaussian", "squashed")


def actor_of(kind, action=2, **options):
    return Actor(kind, observation=3, action=action, hidden=(8,), **options)


def drawn(actor, seed=0):
    """Parameters whose covariance is neither diagonal nor constant.

    The squashed actor's are small, so that what lies beyond the border, where densities are clipped, is negligible.
    """
    rng, size = np.random.default_rng(seed), 0.2 if actor.kind == "squashed" else 0.5
    shapes = jax.eval_shape(actor.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(size * rng.normal(size=leaf.shape)), shapes)


def grid(kind, points, width=1):
    """Actions and the volume of each, that of the squashed actor's on the scale where it is smooth."""
    if kind == "squashed":  # points x in R with a = tanh(x): da = (1 - a^2) dx
        x = np.linspace(-13, 13, points)
        return np.tanh(x), (1 - np.tanh(x) ** 2) * (x[1] - x[0])
    a = np.linspace(-14, 14, points)
    return a, np.full(points, a[1] - a[0])


@pytest.mark.parametrize("kind", KINDS)
def test_densities_integrate_to_1_in_two_dimensions(kind):
    with jax.enable_x64(True):
        actor = actor_of(kind)
        params = drawn(actor)
        a, volume = grid(kind, 601)
        actions = jnp.stack(jnp.meshgrid(a, a, indexing="ij"), -1)
        observation = jnp.broadcast_to(jnp.array([0.3, -1.0, 0.5]), (*actions.shape[:2], 3))
        density = np.exp(jax.jit(actor.log_prob)(params, observation, actions))
        # What clipping at the border leaves out of the squashed density is below 1e-6.
        np.testing.assert_allclose(
            (density * volume[:, None] * volume).sum(), 1, atol=1e-6 if kind == "squashed" else 1e-9
        )


@pytest.mark.parametrize("kind", KINDS)
def test_kl_by_quadrature(kind):
    with jax.enable_x64(True):
        actor = actor_of(kind, action=1)
        params, others = drawn(actor), drawn(actor, seed=7)
        a, volume = grid(kind, 20_001)
        observation = jnp.broadcast_to(jnp.array([0.3, -1.0, 0.5]), (len(a), 3))
        log_prob = jax.jit(actor.log_prob)
        logp, other = (log_prob(p, observation, jnp.array(a)[:, None]) for p in (params, others))
        expected = (np.exp(logp) * (logp - other) * volume).sum()
        np.testing.assert_allclose(actor.kl(params, others, observation[0]), expected, rtol=1e-5)
        np.testing.assert_allclose(actor.kl(params, params, observation[0]), 0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_kl_in_two_dimensions_is_the_mean_of_samples(kind):
    actor = actor_of(kind)
    params, others = drawn(actor), drawn(actor, seed=7)
    observation = jnp.broadcast_to(jnp.array([0.3, -1.0, 0.5]), (200_000, 3))

    @jax.jit
    def log_ratios(key):
        actions = actor.sample(params, observation, key)
        return actor.log_prob(params, observation, actions) - actor.log_prob(others, observation, actions)

    ratios = log_ratios(jax.random.key(0))
    error = ratios.std() / len(ratios) ** 0.5
    assert abs(ratios.mean() - actor.kl(params, others, observation[0])) < 4 * error + 1e-3


def test_samples_have_the_gaussian_moments():
    actor = actor_of("gaussian")
    params = drawn(actor)
    observation = jnp.broadcast_to(jnp.array([0.3, -1.0, 0.5]), (200_000, 3))
    actions = actor.sample(params, observation, jax.random.key(1))
    factor = actor.distribution(params, observation[0]).factor
    np.testing.assert_allclose(actions.mean(0), actor.mode(params, observation[0]), atol=0.02)
    np.testing.assert_allclose(np.cov(actions.T), factor @ factor.T, atol=0.02)
    assert abs(factor[1, 0]) > 0.01 and factor[0, 1] == 0


def test_the_squashed_density_is_stable_far_out():
    actor = actor_of("squashed", action=1)
    params = drawn(actor)
    actions = jnp.array([[1.0], [-1.0], [0.9999999], [0.0]])
    total = jax.jit(jax.value_and_grad(lambda p: actor.log_prob(p, jnp.zeros((4, 3)), actions).sum()))
    values, grads = total(params)
    assert np.isfinite(values) and all(np.isfinite(grad).all() for grad in jax.tree.leaves(grads))
    assert (np.abs(actor.mode(params, 100 * jnp.ones((5, 3)))) <= 1).all()


def test_the_default_std_leaves_no_constant():
    actor = actor_of("deterministic")
    params = drawn(actor)
    observations, actions = jnp.ones((4, 3)), 0.3 * jnp.ones((4, 2))
    distance = ((actions - actor.mode(params, observations)) ** 2).sum(-1)
    np.testing.assert_allclose(actor.log_prob(params, observations, actions), -np.pi * distance, atol=1e-3)


def test_dropout_needs_a_key():
    actor = actor_of("deterministic", dropout=0.5)
    params, observations = drawn(actor), jnp.ones((4, 3))
    plain = actor.distribution(params, observations).mean
    np.testing.assert_array_equal(plain, actor_of("deterministic").distribution(params, observations).mean)
    first, second = (actor.distribution(params, observations, jax.random.key(n)).mean for n in (0, 1))
    assert not np.allclose(first, second) and not np.allclose(first, plain)


def test_the_squashed_deviation_begins_equal_everywhere_and_learns_to_differ():
    actor = Actor("squashed", observation=3, action=2, hidden=(8,))
    params, observations = actor.init(jax.random.key(0)), 5 * jax.random.normal(jax.random.key(1), (50, 3))
    begun = actor.distribution(params, observations)
    np.testing.assert_allclose(begun.factor, np.exp(-1.5), rtol=1e-6)
    assert np.ptp(begun.mean, axis=0).min() > 0.1
    gradient = jax.grad(lambda p: actor.log_prob(p, observations, jnp.full((50, 2), 0.3)).sum())(params)
    assert abs(gradient["layer_1"]["kernel"][:, 2:]).min() > 0
