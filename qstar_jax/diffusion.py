"""A diffusion model as a decision process: schedules, sampling, exact step rewards and Diffusion-DPO.

Conventions, after Appendix B of "From r to Q*" (arXiv 2404.12358) and DDPM (arXiv 2006.11239):

- x_0 is data, x_T noise. In state (c, x_t, t) the action is the less noisy x_{t-1}; transitions are deterministic, and
  the value of x_0 is 0. The noise x_T is no action: the policy does not choose it.
- The network is an argument `eps_fn(x_t, t)`, which predicts the noise in x_t; a condition c is bound in it. t has the
  leading axes of x.
- A step is a Gaussian p(x_{t-1} | x_t) = N(mu(x_t, t), s_t^2), the last one included. Policy and reference have the
  same s_t, so a log-ratio of densities is exact, and a sum over dimensions: steps have credit, and so have dimensions.
- Arrays over steps have K = T + 1 entries: entry t belongs to step t, and entry 0 to the data.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, ScalarLike

from qstar_jax import losses
from qstar_jax.shapes import check_same_shape, check_shape

EpsFn = Callable[[Float[Array, "..."], Int[Array, "..."]], Float[Array, "..."]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Schedule:
    """How much noise each step adds, and how much the model's steps have.

    Attributes:
        beta: Variance that step t of the forward process adds; 0 at t = 0. Shape [K].
        alpha_bar: Share of the data's variance that is left in x_t, the product of 1 - beta; 1 at t = 0. Shape [K].
        variance: s_t^2, the variance of p(x_{t-1} | x_t), of policy and reference alike; 0 at t = 0. Shape [K].
    """

    beta: Float[Array, " K"]
    alpha_bar: Float[Array, " K"]
    variance: Float[Array, " K"]

    @property
    def steps(self) -> int:
        """T, the number of steps."""
        return len(self.beta) - 1


def linear_schedule(steps: int, *, first: float = 1e-4, last: float = 0.02, variance: str = "posterior") -> Schedule:
    """Schedule whose beta grows linearly (DDPM's defaults, which are for a thousand steps).

    Args:
        steps: T, at least 1.
        first: beta of step 1, in (0, 1).
        last: beta of step T, in (0, 1).
        variance: Of the model's steps: "beta" is beta_t; "posterior" that of q(x_{t-1} | x_t, x_0), and at step 1,
            where it is 0, that of step 2.

    Raises:
        ValueError: If a number is out of range.
    """
    return _schedule(np.linspace(first, last, steps), variance)


def cosine_schedule(steps: int, *, offset: float = 0.008, variance: str = "posterior") -> Schedule:
    """Schedule whose alpha_bar falls as a squared cosine, with beta at most 0.999.

    Args:
        steps: T, at least 1.
        offset: Keeps the first beta from being too small.
        variance: See `linear_schedule`.

    Raises:
        ValueError: If a number is out of range.

    References:
        Nichol and Dhariwal, "Improved denoising diffusion probabilistic models", arXiv 2102.09672, Eq. 17.
    """
    angle = (np.arange(steps + 1) / max(steps, 1) + offset) / (1 + offset) * np.pi / 2
    alpha_bar = np.cos(angle) ** 2
    return _schedule(np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999), variance)


def _schedule(beta: np.ndarray, variance: str) -> Schedule:
    if not len(beta) or not ((beta > 0) & (beta < 1)).all():
        raise ValueError(f"beta {beta}: a schedule needs at least one step, and every beta between 0 and 1")
    if variance not in ("beta", "posterior"):
        raise ValueError(f"variance {variance!r}: expected 'beta' or 'posterior'")
    beta = np.append(0.0, beta)
    alpha_bar = np.cumprod(1 - beta)
    model = beta.copy()
    if variance == "posterior" and len(beta) > 2:
        model[2:] *= (1 - alpha_bar[1:-1]) / (1 - alpha_bar[2:])
        model[1] = model[2]
    return Schedule(*map(jnp.asarray, (beta, alpha_bar, model)))


def diffuse(
    schedule: Schedule, x_0: Float[Array, "..."], t: Int[Array, "..."], noise: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Draws x_t of the forward process q(x_t | x_0) from standard normal noise.

    Args:
        schedule: The schedule.
        x_0: Data. Shape [*B, ...].
        t: Steps, 0 to T. Shape [*B], or leading axes of it.
        noise: Standard normal. Shape of `x_0`.

    Returns:
        sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise. Shape of `x_0`.
    """
    check_same_shape(x_0=x_0, noise=noise)
    kept = _at(schedule.alpha_bar, t, x_0)
    return jnp.sqrt(kept) * x_0 + jnp.sqrt(1 - kept) * noise


def posterior(
    schedule: Schedule, x_0: Float[Array, "..."], x_t: Float[Array, "..."], t: Int[Array, "..."]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Mean and variance of q(x_{t-1} | x_t, x_0), which is Gaussian.

    Args:
        schedule: The schedule.
        x_0: Data. Shape [*B, ...].
        x_t: The same after t steps. Shape of `x_0`.
        t: Steps, 1 to T. Shape [*B], or leading axes of it.

    Returns:
        Mean, shape of `x_0`, and variance, shape [*B, 1, ...]; at t = 1 they are x_0 and 0.

    References:
        Ho et al., arXiv 2006.11239, Eq. 6 and 7.
    """
    check_same_shape(x_0=x_0, x_t=x_t)
    beta, left, before = (
        _at(values, steps, x_t)
        for values, steps in ((schedule.beta, t), *((schedule.alpha_bar, s) for s in (t, t - 1)))
    )
    mean = (jnp.sqrt(before) * beta * x_0 + jnp.sqrt(1 - beta) * (1 - before) * x_t) / (1 - left)
    return mean, beta * (1 - before) / (1 - left)


def step_mean(
    schedule: Schedule, noise: Float[Array, "..."], x_t: Float[Array, "..."], t: Int[Array, "..."]
) -> Float[Array, "..."]:
    """Mean of p(x_{t-1} | x_t) of a model that predicts this noise in x_t.

    Args:
        schedule: The schedule.
        noise: What `eps_fn(x_t, t)` returned. Shape [*B, ...].
        x_t: States. Shape of `noise`.
        t: Steps, 1 to T. Shape [*B], or leading axes of it.

    Returns:
        (x_t - beta_t / sqrt(1 - alpha_bar_t) noise) / sqrt(1 - beta_t). Shape of `x_t`.

    References:
        Ho et al., arXiv 2006.11239, Eq. 11.
    """
    check_same_shape(noise=noise, x_t=x_t)
    beta, left = _at(schedule.beta, t, x_t), _at(schedule.alpha_bar, t, x_t)
    return (x_t - beta / jnp.sqrt(1 - left) * noise) / jnp.sqrt(1 - beta)


def sample(schedule: Schedule, eps_fn: EpsFn, key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "K ..."]:
    """Samples from noise to data, and keeps all states: ancestral sampling as a scan.

    The last step has noise as well (s_1^2, which is small), so that each step is an action with a density.

    Args:
        schedule: The schedule.
        eps_fn: The model, see the module.
        key: Random key.
        shape: Shape of the data, [B, ...].

    Returns:
        States; entry t is x_t, so entry 0 is data. Shape [K, B, ...].

    References:
        Ho et al., arXiv 2006.11239, Algorithm 2.
    """
    start_key, noise_key = jax.random.split(key)
    start = jax.random.normal(start_key, shape, schedule.beta.dtype)

    def step(x_t, inputs):
        t, key = inputs
        mean = step_mean(schedule, eps_fn(x_t, jnp.full(shape[:1], t)), x_t, t)
        x_next = mean + jnp.sqrt(schedule.variance[t]) * jax.random.normal(key, shape, mean.dtype)
        return x_next, x_next

    steps = jnp.arange(schedule.steps, 0, -1)
    _, states = jax.lax.scan(step, start, (steps, jax.random.split(noise_key, schedule.steps)))
    return jnp.concatenate([states[::-1], start[None]])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepScores:
    """What a policy and its reference say about each dimension of stored denoising steps; sums over them are of steps.

    Attributes:
        log_ratios: log p(x_{t-1} | x_t) / p_ref(x_{t-1} | x_t), in nats. Shape [K, B, ...], 0 at t = 0.
        kls: KL(p(. | x_t) || p_ref(. | x_t)), in nats. Summed over steps and dimensions, its mean over the policy's
            own trajectories is the divergence of whole trajectories, with less variance than their log-ratio. Same
            shape.
    """

    log_ratios: Float[Array, "K ..."]
    kls: Float[Array, "K ..."]

    def rewards(self, beta: ScalarLike) -> Float[Array, "K ..."]:
        """Implicit rewards beta * log-ratio: the optimal advantages of steps (Lemma 2). Shape [K, B, ...].

        With s_t fixed they are beta / (2 s_t^2) (|x_{t-1} - mu_ref|^2 - |x_{t-1} - mu|^2): exact, not a bound.
        """
        return beta * self.log_ratios

    def returns(self, beta: ScalarLike) -> Float[Array, " B"]:
        """Implicit return of each trajectory: its return less the value of (c, x_T, T). Shape [B]."""
        rewards = self.rewards(beta)
        return rewards.sum((0, *range(2, rewards.ndim)))


def score_steps(schedule: Schedule, eps_fn: EpsFn, ref_eps_fn: EpsFn, states: Float[Array, "K ..."]) -> StepScores:
    """Scores stored trajectories, such as those of `sample`; one step at a time is in memory.

    Args:
        schedule: The schedule.
        eps_fn: The policy.
        ref_eps_fn: The reference.
        states: Entry t is x_t. Shape [K, B, ...].

    Returns:
        Log-ratios and divergences of all steps.
    """
    check_shape((schedule.steps + 1, *states.shape[1:]), states=states)

    def step(inputs):
        t, x_t, x_next = inputs
        times = jnp.full(x_t.shape[:1], t)
        mean, ref_mean = (step_mean(schedule, fn(x_t, times), x_t, t) for fn in (eps_fn, ref_eps_fn))
        variance = schedule.variance[t]
        return step_log_ratios(mean, ref_mean, x_next, variance), step_kls(mean, ref_mean, variance)

    scored = jax.lax.map(step, (jnp.arange(1, schedule.steps + 1), states[1:], states[:-1]))
    return StepScores(*(jnp.concatenate([jnp.zeros_like(values[:1]), values]) for values in scored))


def step_log_ratios(
    mean: Float[Array, "..."], ref_mean: Float[Array, "..."], x_next: Float[Array, "..."], variance: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Log-ratio of two Gaussians of one variance at x_{t-1}, dimension by dimension.

    Args:
        mean: Mean of the policy's step.
        ref_mean: Mean of the reference's step.
        x_next: The x_{t-1} that was drawn.
        variance: s_t^2 of both.

    Returns:
        (|x - mu_ref|^2 - |x - mu|^2) / (2 s_t^2) without the sum, in nats. The shape of the means.
    """
    return (mean - ref_mean) * (2 * x_next - mean - ref_mean) / (2 * variance)


def step_kls(
    mean: Float[Array, "..."], ref_mean: Float[Array, "..."], variance: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Divergence of two Gaussians of one variance, dimension by dimension: |mu - mu_ref|^2 / (2 s_t^2), in nats."""
    return (mean - ref_mean) ** 2 / (2 * variance)


def elbo_weights(schedule: Schedule) -> Float[Array, " K"]:
    """Nats of divergence per squared error of the predicted noise, *summed* over dimensions, at each step.

    |mu_q - mu|^2 / (2 s_t^2) = w_t |noise - eps_fn(x_t, t)|^2, where mu_q is the mean of q(x_{t-1} | x_t, x_0). So the
    expected log-ratio of a step under q is w_t times how much smaller the policy's squared error is.

    Args:
        schedule: The schedule.

    Returns:
        w_t = beta_t^2 / (2 s_t^2 (1 - beta_t) (1 - alpha_bar_t)); 0 at t = 0. Shape [K].

    References:
        Ho et al., arXiv 2006.11239, Eq. 12.
    """
    beta, left, variance = schedule.beta[1:], 1 - schedule.alpha_bar[1:], schedule.variance[1:]
    return jnp.append(0.0, beta**2 / (2 * variance * (1 - beta) * left))


def noise_errors(
    schedule: Schedule, eps_fn: EpsFn, x_0: Float[Array, "B R ..."], t: Int[Array, " B"], noise: Float[Array, "B ..."]
) -> Float[Array, "B R"]:
    """Mean squared error of the predicted noise; responses to one prompt share step and noise.

    What they share cancels in the difference of their errors, which has less variance.

    Args:
        schedule: The schedule.
        eps_fn: The model; it sees x of shape [B, R, ...] and t of shape [B, R].
        x_0: Data; of pairs, the preferred one first. Shape [B, R, ...].
        t: Step of each example, 1 to T. Shape [B].
        noise: Standard normal, of each example. Shape [B, ...].

    Returns:
        *Means* over dimensions. Shape [B, R].
    """
    noise = jnp.broadcast_to(noise[:, None], x_0.shape)
    t = jnp.broadcast_to(t[:, None], x_0.shape[:2])
    squares = (noise - eps_fn(diffuse(schedule, x_0, t, noise), t)) ** 2
    return squares.mean(tuple(range(2, squares.ndim)))


def diffusion_dpo(
    errors: Float[Array, "B 2"], ref_errors: Float[Array, "B 2"], *, beta_dpo: Float[Array, " B"] | ScalarLike = 500.0
) -> tuple[Float[Array, " B"], losses.LossMetrics]:
    """Diffusion-DPO: preferences between data, without their trajectories.

    -log sigma(beta_dpo / 2 [(ref_error_w - error_w) - (ref_error_l - error_l)]); by Jensen's inequality, its mean over
    steps and noise bounds the loss of whole trajectories. Errors are means over the D dimensions, as in the authors'
    code (their Eq. 14 has sums), so the same beta_dpo is another temperature where D or T differ; `beta_dpo_of`
    converts.

    Args:
        errors: `noise_errors` of the policy, the preferred first. Shape [B, 2].
        ref_errors: `noise_errors` of the reference at the same steps and noise. Shape [B, 2].
        beta_dpo: Strength of the penalty; the same for all, or one per example.

    Returns:
        Loss of each pair, in nats, shape [B], and its metrics.

    References:
        Wallace et al., "Diffusion model alignment using direct preference optimization", arXiv 2311.12908, Eq. 14.
    """
    check_same_shape(errors=errors, ref_errors=ref_errors)
    rewards = 0.5 * jnp.asarray(beta_dpo)[..., None] * (ref_errors - errors)
    return losses.sigmoid(rewards[..., None], jnp.ones((*rewards.shape, 1), bool), beta=1.0)


def beta_dpo_of(schedule: Schedule, t: Int[Array, " B"], *, beta: ScalarLike, dimensions: int) -> Float[Array, " B"]:
    """beta_dpo at which the margin of `diffusion_dpo` is that of trajectories at temperature beta, on average.

    With it, the mean margin over steps (uniform), noise and trajectories of q equals that of exact implicit returns.

    Args:
        schedule: The schedule.
        t: Steps. Shape [B].
        beta: Temperature: reward per nat.
        dimensions: D, the size of one x.

    Returns:
        2 beta T D w_t with `elbo_weights` w_t. Shape [B].
    """
    return 2 * beta * schedule.steps * dimensions * elbo_weights(schedule)[t]


def _at(values: Float[Array, " K"], t: Int[Array, "..."], x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Reads an array over steps, with axes of length 1 for those of x that t lacks."""
    t = jnp.asarray(t)
    return values[t].reshape(t.shape + (1,) * (x.ndim - t.ndim))
