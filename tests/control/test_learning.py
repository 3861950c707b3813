"""CPL on the linear-quadratic task, whose soft-optimal policy is known in closed form."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import minimize

from qstar_jax import losses
from qstar_jax.control import learning, lqr
from qstar_jax.control.actor import Actor
from qstar_jax.control.segments import draw_pairs, draw_segments

TASK = lqr.point_mass(noise=0.02)
OPTIMUM = lqr.solve(TASK)
ACTOR = Actor("gaussian", observation=4, action=2, hidden=())


def segments_of(count, length=6, label="regret", task=TASK):
    episodes = lqr.roll_out(task, 0.5 * OPTIMUM.gain, 0.5 * np.eye(2), episodes=60, steps=20, seed=0)
    return draw_segments(episodes, length=length, count=count, label=label, discount=task.discount, seed=0)


def on_device(segments, ref_logp=0.0):
    scores = jnp.asarray(segments.scores)
    ref_logp = jnp.broadcast_to(ref_logp, segments.actions.shape[:2])
    return learning.SegmentArrays(jnp.asarray(segments.observations), jnp.asarray(segments.actions), scores, ref_logp)


def learned(params):
    factor = ACTOR.distribution(params, jnp.zeros(4)).factor
    return -np.asarray(params["layer_0"]["kernel"]).T, np.asarray(factor @ factor.T)


def converge(loss, params):
    """Minimizes by Newton's method in a trust region, from scipy, with exact derivatives."""
    flat, restore = jax.flatten_util.ravel_pytree(params)

    def of(x):
        return loss(restore(x))

    result = minimize(
        jax.jit(of), flat, jac=jax.jit(jax.grad(of)), hess=jax.jit(jax.hessian(of)),
        method="trust-exact", options={"gtol": 1e-13},
    )  # fmt: skip
    return restore(jnp.asarray(result.x)), result


@pytest.mark.parametrize("length", [1, 6])
def test_cpl_with_exact_preferences_recovers_the_gain_matrix(length):
    """The labels are the probabilities of infinitely many comparisons by regret; gain and covariance to 1e-8."""
    with jax.enable_x64(True):
        segments = segments_of(240, length)
        discounts = TASK.discount ** np.arange(length)
        regret = lqr.advantages(TASK, OPTIMUM, segments.observations, segments.actions) @ discounts
        observations, actions = (x.reshape(120, 2, length, -1) for x in (segments.observations, segments.actions))
        first, second = regret.reshape(120, 2).T
        probability = jax.nn.sigmoid(jnp.asarray(first - second))
        cpl = partial(losses.cpl, beta=TASK.temperature, bias=1.0, discount=TASK.discount)

        def loss(params):
            logp = ACTOR.log_prob(params, observations, actions)
            mask = jnp.ones(logp.shape, bool)
            win, lose = cpl(logp, mask)[0], cpl(logp[:, ::-1], mask)[0]
            return (probability * win + (1 - probability) * lose).mean()

        start = jax.tree.map(lambda leaf: leaf.astype(float), ACTOR.init(jax.random.key(0)))
        params, _ = converge(loss, start)
        gain, covariance = learned(params)
        np.testing.assert_allclose(gain, OPTIMUM.gain, atol=1e-8)
        np.testing.assert_allclose(covariance, OPTIMUM.covariance, atol=1e-8)
        np.testing.assert_allclose(params["layer_0"]["bias"], 0, atol=1e-8)


def test_labels_by_reward_do_not_recover_it():
    """The same fit to preferences by sums of rewards ends elsewhere: what CPL learns is the advantage."""
    with jax.enable_x64(True):
        segments = segments_of(240, label="reward")
        observations, actions = (x.reshape(120, 2, 6, -1) for x in (segments.observations, segments.actions))
        first, second = segments.scores.reshape(120, 2).T
        probability = jax.nn.sigmoid(jnp.asarray(first - second))
        cpl = partial(losses.cpl, beta=TASK.temperature, bias=1.0, discount=TASK.discount)

        def loss(params):
            logp = ACTOR.log_prob(params, observations, actions)
            mask = jnp.ones(logp.shape, bool)
            return (probability * cpl(logp, mask)[0] + (1 - probability) * cpl(logp[:, ::-1], mask)[0]).mean()

        start = jax.tree.map(lambda leaf: leaf.astype(float), ACTOR.init(jax.random.key(0)))
        gain, _ = learned(converge(loss, start)[0])
        assert np.abs(gain - OPTIMUM.gain).max() > 0.1


def test_after_cloning_the_data_lose_exactly_the_kl():
    """Eq. 16 for Gaussians: the mean of log pi / pi_BC over the cloned data is -KL(pi_BC || pi), whatever pi is.

    Exact in the sample, because the residuals of least squares have no correlation with states, and their covariance
    is that of the policy.
    """
    with jax.enable_x64(True):
        segments = on_device(segments_of(50))
        states, actions = segments.observations.reshape(-1, 4), segments.actions.reshape(-1, 2)
        inputs = np.column_stack([states, np.ones(len(states))])
        weights, *_ = np.linalg.lstsq(inputs, actions, rcond=None)
        covariance = np.cov((actions - inputs @ weights).T, bias=True)
        factor = np.linalg.cholesky(covariance)
        bias = factor - np.diag(np.diag(factor)) + np.diag(np.log(np.diag(factor)))
        cloned = {"layer_0": {"kernel": weights[:4], "bias": weights[4]}, "factor": {"bias": jnp.asarray(bias)}}
        gradient = jax.grad(lambda p: ACTOR.log_prob(p, states, actions).mean())(cloned)
        for leaf in jax.tree.leaves(gradient):
            np.testing.assert_allclose(leaf, 0, atol=1e-10)  # it is what cloning converges to
        other = ACTOR.init(jax.random.key(3))
        ratios = ACTOR.log_prob(other, states, actions) - ACTOR.log_prob(cloned, states, actions)
        kl = ACTOR.kl(cloned, other, states)
        np.testing.assert_allclose(ratios.mean(), -kl.mean(), rtol=1e-10)
        assert kl.mean() > 0.5


@pytest.mark.parametrize("form", ["pairs", "all"])
def test_steps_lower_the_loss_and_do_not_depend_on_how_they_are_grouped(form):
    segments = on_device(segments_of(64))
    options = {"beta": 0.1, "bias": 1.0, "discount": 0.95}
    if form == "pairs":
        pairs = jnp.asarray(draw_pairs(np.asarray(segments.scores), count=64, sampled=True, seed=0))
        objective = learning.prefer_pairs(ACTOR, segments, pairs, batch_size=16, **options)
    else:
        objective = learning.prefer_all_pairs(ACTOR, segments, batch_size=16, **options)
    optimizer = optax.adam(3e-2)
    run = learning.minimizer(objective, optimizer, seed=0)
    params = ACTOR.init(jax.random.key(0))
    whole, _, history = run(params, optimizer.init(params), 0, 60)
    assert history[-20:].mean() < 0.8 * history[:20].mean()
    half, state, _ = run(params, optimizer.init(params), 0, 30)
    halves, _, _ = run(half, state, 30, 30)
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(halves), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_the_log_ratios_of_cpl_kl_begin_at_ln_2():
    segments, params = segments_of(64), ACTOR.init(jax.random.key(0))
    ref_logp = ACTOR.log_prob(params, jnp.asarray(segments.observations), jnp.asarray(segments.actions))
    objective = learning.prefer_all_pairs(
        ACTOR, on_device(segments, ref_logp), batch_size=8, beta=0.1, bias=0.5, discount=1.0
    )
    np.testing.assert_allclose(objective(params, jax.random.key(0)), np.log(2), rtol=1e-5)


def test_cloning_of_a_policy_finds_its_gain():
    segments = on_device(segments_of(2000))
    optimizer = optax.adam(1e-2)
    run = learning.minimizer(learning.clone(ACTOR, segments, batch_size=64), optimizer, seed=0)
    params = ACTOR.init(jax.random.key(0))
    params, _, _ = run(params, optimizer.init(params), 0, 600)
    gain, covariance = learned(params)
    np.testing.assert_allclose(gain, 0.5 * OPTIMUM.gain, atol=0.1)
    np.testing.assert_allclose(covariance, 0.5 * np.eye(2), atol=0.1)
