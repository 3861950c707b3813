"""Diffusion as a decision process, in float64: against scipy, numerical integration, and a linear-Gaussian model.

In that model everything is Gaussian: the network predicts noise that is linear in x_t, so expectations over the forward
process are closed forms of means and covariances, which share no formula with the module.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.test_util import check_grads
from numpy.polynomial.hermite_e import hermegauss

from qstar_jax import diffusion
from qstar_jax.errors import InputError

EXACT = {"rtol": 0, "atol": 1e-10}
STEPS = 5
SCHEDULES = {
    "linear": partial(diffusion.linear_schedule, STEPS, first=0.02, last=0.4),
    "cosine": partial(diffusion.cosine_schedule, STEPS),
}


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=["linear", "cosine"])
def schedule(request):
    return SCHEDULES[request.param]()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Linear:
    """A network whose predicted noise is slope_t x_t + shift_t, per pixel."""

    slope: jax.Array
    shift: jax.Array

    @classmethod
    def draw(cls, seed, pixels=1, size=0.3):
        slope, shift = size * np.random.default_rng(seed).normal(size=(2, STEPS + 1, pixels))
        return cls(jnp.asarray(slope + 0.5), jnp.asarray(shift))

    def __call__(self, x, t):
        return self.slope[t] * x + self.shift[t]

    def step(self, schedule, t):
        """(factor, constant) of the mean of p(x_{t-1} | x_t), from scratch. Shape [pixels] each."""
        beta, left = float(schedule.beta[t]), float(schedule.alpha_bar[t])
        scale = beta / np.sqrt(1 - left)
        slope, shift = np.asarray(self.slope[t]), np.asarray(self.shift[t])
        return (1 - scale * slope) / np.sqrt(1 - beta), -scale * shift / np.sqrt(1 - beta)


# Each is compiled once per shape.
diffuse, posterior, step_mean, score_steps, noise_errors = (
    jax.jit(getattr(diffusion, name)) for name in "diffuse posterior step_mean score_steps noise_errors".split()
)
sample = jax.jit(diffusion.sample, static_argnames="shape")


# Schedules and the forward process


def test_schedules_by_hand():
    linear = diffusion.linear_schedule(3, first=0.1, last=0.3)
    np.testing.assert_allclose(linear.beta, [0, 0.1, 0.2, 0.3], **EXACT)
    np.testing.assert_allclose(linear.alpha_bar, [1, 0.9, 0.72, 0.504], **EXACT)
    np.testing.assert_allclose(linear.variance, [0, 0.2 * 0.1 / 0.28, 0.2 * 0.1 / 0.28, 0.3 * 0.28 / 0.496], **EXACT)
    np.testing.assert_allclose(diffusion.linear_schedule(3, variance="beta").variance[1], 1e-4, **EXACT)
    cosine = diffusion.cosine_schedule(4, offset=0.1)
    shape = np.cos((np.arange(5) / 4 + 0.1) / 1.1 * np.pi / 2) ** 2
    np.testing.assert_allclose(cosine.alpha_bar[:4], (shape / shape[0])[:4], **EXACT)
    assert cosine.beta[4] == 0.999 and diffusion.cosine_schedule(4, offset=0.3).beta[1] > cosine.beta[1]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [((0,), {}, "at least one step"), ((3,), {"last": 1.0}, "between 0 and 1"), ((3,), {"variance": "x"}, "'beta' or")],
)
def test_impossible_schedules_are_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        diffusion.linear_schedule(*arguments, **options)


def test_steps_of_the_forward_process_compose(schedule):
    x_0, mean, variance = 0.7, 0.7, 0.0
    for t in range(1, STEPS + 1):
        beta = float(schedule.beta[t])
        mean, variance = np.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        found = diffuse(schedule, jnp.full(2, x_0), jnp.array(t), jnp.array([0.0, 1.0]))
        np.testing.assert_allclose(found, [mean, mean + np.sqrt(variance)], **EXACT)


def test_the_posterior_by_numerical_integration(schedule):
    """Bayes' rule on a grid of x_{t-1}."""
    grid, width = np.linspace(-12, 12, 20_001, retstep=True)
    for t in range(2, STEPS + 1):
        beta, before = float(schedule.beta[t]), float(schedule.alpha_bar[t - 1])
        prior = scipy.stats.norm(np.sqrt(before) * 0.7, np.sqrt(1 - before)).pdf(grid)
        density = prior * scipy.stats.norm(np.sqrt(1 - beta) * grid, np.sqrt(beta)).pdf(-0.4)
        density /= density.sum() * width
        mean = (density * grid).sum() * width
        variance = (density * (grid - mean) ** 2).sum() * width
        found = posterior(schedule, jnp.array([0.7]), jnp.array([-0.4]), jnp.array([t]))
        np.testing.assert_allclose(found, [[mean], [variance]], rtol=0, atol=1e-9)
    found = posterior(schedule, jnp.array([0.7]), jnp.array([-0.4]), jnp.array([1]))
    np.testing.assert_allclose(found, [[0.7], [0.0]], **EXACT)


def test_the_step_of_a_perfect_network_has_the_mean_of_the_posterior(schedule):
    x_0, noise = jnp.asarray(np.random.default_rng(0).normal(size=(2, STEPS, 3)))
    t = jnp.arange(1, STEPS + 1)
    x_t = diffuse(schedule, x_0, t, noise)
    mean, _ = posterior(schedule, x_0, x_t, t)
    np.testing.assert_allclose(step_mean(schedule, noise, x_t, t), mean, **EXACT)


# Sampling


@pytest.mark.parametrize("variance", ["beta", "posterior"])
def test_samples_have_the_moments_of_the_linear_model(variance):
    schedule, model, count = SCHEDULES["linear"](variance=variance), Linear.draw(0, pixels=2), 40_000
    states = np.asarray(sample(schedule, model, jax.random.key(1), (count, 2)))
    assert states.shape == (STEPS + 1, count, 2)
    mean, spread = np.zeros(2), np.ones(2)
    for t in range(STEPS, -1, -1):
        # Six standard errors of a mean, and of a variance, for which sqrt(2) is that of a Gaussian.
        np.testing.assert_allclose(states[t].mean(0), mean, atol=6 * np.sqrt(spread.max() / count))
        np.testing.assert_allclose(states[t].var(0), spread, rtol=6 * np.sqrt(2 / count))
        if t:
            factor, constant = model.step(schedule, t)
            mean, spread = factor * mean + constant, factor**2 * spread + float(schedule.variance[t])


def test_a_trajectory_is_made_of_its_steps():
    schedule, model = SCHEDULES["linear"](), Linear.draw(0)
    states = sample(schedule, model, jax.random.key(1), (3, 1))
    again = sample(schedule, model, jax.random.key(2), (3, 1))
    assert (states != again).all()
    noise = []
    for t in range(1, STEPS + 1):
        factor, constant = model.step(schedule, t)
        noise.append((states[t - 1] - factor * states[t] - constant) / np.sqrt(schedule.variance[t]))
    # All of it is noise of its own: nothing repeats.
    assert len(np.unique(np.round(noise, 6))) == STEPS * 3


# Exact rewards


def random_states(pixels, count=4):
    return jnp.asarray(np.random.default_rng(5).normal(size=(STEPS + 1, count, pixels)))


def test_rewards_of_steps_are_log_ratios_of_densities(schedule):
    policy, reference, states, beta = Linear.draw(0, 3), Linear.draw(1, 3), random_states(3), 0.7
    scores = score_steps(schedule, policy, reference, states)
    expected = np.zeros(states.shape)
    for t in range(1, STEPS + 1):
        logp = [
            scipy.stats.norm(factor * states[t] + constant, np.sqrt(schedule.variance[t])).logpdf(states[t - 1])
            for factor, constant in (policy.step(schedule, t), reference.step(schedule, t))
        ]
        expected[t] = logp[0] - logp[1]
    np.testing.assert_allclose(scores.log_ratios, expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(scores.rewards(beta), beta * expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(scores.returns(beta), beta * expected.sum((0, 2)), rtol=1e-9, atol=1e-9)


def test_divergences_of_steps_by_numerical_integration(schedule):
    policy, reference, states = Linear.draw(0), Linear.draw(1), random_states(1, count=1)
    kls = score_steps(schedule, policy, reference, states).kls
    assert kls[0] == 0
    for t in range(1, STEPS + 1):
        (mean, ref_mean), sd = (
            [float((a * states[t] + b).item()) for a, b in (m.step(schedule, t) for m in (policy, reference))],
            float(np.sqrt(schedule.variance[t])),
        )
        grid, width = np.linspace(mean - 10 * sd, mean + 10 * sd, 4001, retstep=True)
        p, q = scipy.stats.norm(mean, sd), scipy.stats.norm(ref_mean, sd)
        expected = (p.pdf(grid) * (p.logpdf(grid) - q.logpdf(grid))).sum() * width
        np.testing.assert_allclose(kls[t].item(), expected, rtol=1e-9, atol=1e-9)


def test_the_mean_reward_of_policy_and_reference_samples():
    """KL(policy || reference) on the policy's trajectories, and -KL(reference || policy) on the reference's."""
    schedule, policy, reference, count = (
        SCHEDULES["linear"](),
        Linear.draw(0, size=0.1),
        Linear.draw(1, size=0.1),
        20_000,
    )
    for source, sign in ((policy, 1), (reference, -1)):
        states = sample(schedule, source, jax.random.key(3), (count, 1))
        scores = score_steps(schedule, policy, reference, states)
        returns, kls = scores.returns(1.0), scores.kls.sum((0, 2))
        error = float(jnp.std(returns - sign * kls)) / np.sqrt(count)
        np.testing.assert_allclose(returns.mean(), sign * kls.mean(), atol=5 * error)
        assert kls.mean() > 20 * error


def test_other_trajectories_are_refused(schedule):
    with pytest.raises(InputError, match=r"states \[5, 4, 1\]: expected shape \[6, 4, 1\]"):
        score_steps(schedule, Linear.draw(0), Linear.draw(1), random_states(1)[1:])


# Where the exact form and that of squared errors agree


def expected_log_ratio(schedule, policy, reference, x_0, t):
    """E_q log p(x_{t-1} | x_t) / p_ref(x_{t-1} | x_t) given x_0, from the joint Gaussian of x_{t-1} and x_t."""
    beta, left, before = (float(x) for x in (schedule.beta[t], schedule.alpha_bar[t], schedule.alpha_bar[t - 1]))
    covariance = np.sqrt(1 - beta) * (1 - before)

    def expected_square(model):
        factor, constant = model.step(schedule, t)
        offset = np.sqrt(before) * x_0 - factor * np.sqrt(left) * x_0 - constant
        return offset**2 + (1 - before) - 2 * factor * covariance + factor**2 * (1 - left)

    return (expected_square(reference) - expected_square(policy)).sum() / (2 * float(schedule.variance[t]))


def expected_errors(schedule, model, x_0, t):
    """Expectation of `noise_errors` over noise, exact: quadrature of squares, pixel by pixel. x_0 of shape [R, D]."""
    nodes, weights = hermegauss(4)
    weights = weights / weights.sum()
    noise = jnp.repeat(jnp.asarray(nodes)[:, None], x_0.shape[-1], 1)  # pixels are independent: one axis does
    pairs = jnp.broadcast_to(x_0, (len(nodes), *x_0.shape))
    errors = noise_errors(schedule, model, pairs, jnp.full(len(nodes), t), noise)
    return (weights[:, None] * errors).sum(0)


@pytest.mark.parametrize("variance", ["beta", "posterior"])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("pixels", [1, 3])
def test_squared_errors_with_the_weights_of_the_elbo_are_expected_log_ratios(name, variance, pixels):
    schedule, policy, reference = SCHEDULES[name](variance=variance), Linear.draw(0, pixels), Linear.draw(1, pixels)
    x_0 = jnp.asarray(np.random.default_rng(2).normal(size=(2, pixels)))
    for t in range(1, STEPS + 1):
        exact = [expected_log_ratio(schedule, policy, reference, np.asarray(x), t) for x in x_0]
        errors, ref_errors = (expected_errors(schedule, m, x_0, t) for m in (policy, reference))
        found = pixels * diffusion.elbo_weights(schedule)[t] * (ref_errors - errors)
        np.testing.assert_allclose(found, exact, rtol=1e-9, atol=1e-8)
        assert np.abs(exact).min() > 1e-4


def test_the_margin_of_diffusion_dpo_is_that_of_expected_implicit_returns(schedule):
    pixels, beta = 3, 0.2
    policy, reference = Linear.draw(0, pixels), Linear.draw(1, pixels)
    x_0 = jnp.asarray(np.random.default_rng(2).normal(size=(2, pixels)))
    steps = jnp.arange(1, STEPS + 1)
    margins = []
    for t in steps:
        errors, ref_errors = (expected_errors(schedule, m, x_0, t)[None] for m in (policy, reference))
        beta_dpo = diffusion.beta_dpo_of(schedule, t[None], beta=beta, dimensions=pixels)
        _, metrics = diffusion.diffusion_dpo(errors, ref_errors, beta_dpo=beta_dpo)
        margins.append(metrics.margins[0])
    chosen, rejected = (
        beta * sum(expected_log_ratio(schedule, policy, reference, np.asarray(x), int(t)) for t in steps) for x in x_0
    )
    np.testing.assert_allclose(np.mean(margins), chosen - rejected, rtol=1e-9, atol=1e-8)


def test_an_expected_log_ratio_by_numerical_integration():
    """Over x_{t-1} and x_t of the forward process, with the module's own log-ratios under the integral."""
    schedule, policy, reference, x_0, t = SCHEDULES["linear"](), Linear.draw(0), Linear.draw(1), 0.7, 3
    left, before = float(schedule.alpha_bar[t]), float(schedule.alpha_bar[t - 1])
    grid = np.linspace(-9, 9, 1201)
    x_next, x_t = np.meshgrid(grid, grid, indexing="ij")
    covariance = np.sqrt(1 - float(schedule.beta[t])) * (1 - before)
    q = scipy.stats.multivariate_normal(
        [np.sqrt(before) * x_0, np.sqrt(left) * x_0], [[1 - before, covariance], [covariance, 1 - left]]
    )
    density = q.pdf(np.stack([x_next, x_t], -1))
    times = jnp.full(grid.shape, t)[:, None]
    means = [
        step_mean(schedule, m(jnp.asarray(grid)[:, None], times[:, 0]), jnp.asarray(grid)[:, None], times[:, 0])
        for m in (policy, reference)
    ]
    ratios = diffusion.step_log_ratios(*(m[None, :, 0] for m in means), jnp.asarray(x_next), schedule.variance[t])
    found = (density * np.asarray(ratios)).sum() * (grid[1] - grid[0]) ** 2
    np.testing.assert_allclose(found, expected_log_ratio(schedule, policy, reference, x_0, t), rtol=0, atol=1e-8)


# Diffusion-DPO


def test_diffusion_dpo_by_hand():
    errors, ref_errors = jnp.array([[0.1, 0.4], [0.3, 0.3]]), jnp.array([[0.2, 0.2], [0.3, 0.3]])
    loss, metrics = diffusion.diffusion_dpo(errors, ref_errors, beta_dpo=20.0)
    np.testing.assert_allclose(metrics.rewards, [[1.0, -2.0], [0.0, 0.0]], **EXACT)
    np.testing.assert_allclose(loss, [np.log1p(np.exp(-3.0)), np.log(2)], **EXACT)
    weaker, _ = diffusion.diffusion_dpo(errors, ref_errors, beta_dpo=jnp.array([2.0, 2.0]))
    np.testing.assert_allclose(weaker, [np.log1p(np.exp(-0.3)), np.log(2)], **EXACT)
    total = jax.jit(lambda e: diffusion.diffusion_dpo(e, ref_errors, beta_dpo=20.0)[0].sum())
    check_grads(total, (errors,), order=1, modes="rev")


def test_errors_are_means_over_pixels_with_shared_step_and_noise():
    schedule, model, rng = SCHEDULES["linear"](), Linear.draw(0, 3), np.random.default_rng(0)
    x_0, noise, t = rng.normal(size=(4, 2, 3)), rng.normal(size=(4, 3)), np.array([1, 5, 2, 3])
    found = noise_errors(schedule, model, jnp.asarray(x_0), jnp.asarray(t), jnp.asarray(noise))
    for b in range(4):
        for r in range(2):
            left = float(schedule.alpha_bar[t[b]])
            x_t = np.sqrt(left) * x_0[b, r] + np.sqrt(1 - left) * noise[b]
            predicted = np.asarray(model.slope[t[b]]) * x_t + np.asarray(model.shift[t[b]])
            np.testing.assert_allclose(found[b, r], np.mean((noise[b] - predicted) ** 2), **EXACT)


def test_shared_noise_lowers_the_variance_of_margins():
    schedule, policy, reference = SCHEDULES["linear"](), Linear.draw(0, 3), Linear.draw(1, 3)
    keys, count = jax.random.split(jax.random.key(0), 3), 4000
    x_0 = jnp.array([[0.2, 0.1, 0.0], [0.1, 0.2, -0.1]])
    t = jax.random.randint(keys[0], (count,), 1, STEPS + 1)
    noises = [jax.random.normal(key, (count, 3)) for key in keys[1:]]

    def gains(noise):
        pairs = jnp.broadcast_to(x_0, (count, 2, 3))
        errors, ref_errors = (noise_errors(schedule, m, pairs, t, noise) for m in (policy, reference))
        return ref_errors - errors

    first, second = map(gains, noises)
    assert jnp.var(first[:, 0] - first[:, 1]) < 0.5 * jnp.var(first[:, 0] - second[:, 1])


def test_no_shapes_are_broadcast_by_mistake():
    schedule = SCHEDULES["linear"]()
    with pytest.raises(InputError, match="expected arrays of one shape"):
        diffuse(schedule, jnp.zeros((4, 1)), jnp.ones(4, int), jnp.zeros((4, 3)))
