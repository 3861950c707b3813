"""Policies over continuous actions: pure functions of parameters and observations, with exact densities.

Shapes: observations [..., O], actions [..., A]; log-probabilities are log densities, in nats.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from qstar_jax.config import ActorOptions

Params = dict[str, Any]
Kind = Literal["deterministic", "gaussian", "squashed"]

_LOG_STD = (-5.0, 2.0)  # range of the squashed actor's log standard deviations, as in soft actor-critic
_BORDER = 1e-6  # actions are taken this far inside of -1 and 1, where the squashed density is not defined


@dataclass(frozen=True)
class Normal:
    """A normal distribution N(mean, L L').

    Attributes:
        mean: Shape [..., A].
        factor: L: standard deviations [..., A], or one lower triangular matrix [A, A] if `full`.
        full: Whether `factor` is a matrix.
    """

    mean: Float[Array, "*B A"]
    factor: Float[Array, "*any A"]
    full: bool = False

    def log_prob(self, values: Float[Array, "*B A"]) -> Float[Array, "*B"]:
        """Computes log densities, in nats. Shape [...]."""
        return jax.scipy.stats.norm.logpdf(self._whiten(values - self.mean)).sum(-1) - self._log_volume()

    def kl(self, other: "Normal") -> Float[Array, "*B"]:
        """Computes KL(self || other) of two distributions of one form, in nats. Shape [...]."""
        distance = (other._whiten(self.mean - other.mean) ** 2).sum(-1)
        relative = other._whiten(self.factor.T) if self.full else self.factor / other.factor
        trace = (relative**2).sum((-2, -1) if self.full else -1)  # of L_other^-1 L L' L_other^-T
        size = self.mean.shape[-1]
        return 0.5 * (distance + trace - size) + other._log_volume() - self._log_volume()

    def sample(self, key: PRNGKeyArray) -> Float[Array, "*B A"]:
        """Draws one value of each distribution."""
        noise = jax.random.normal(key, self.mean.shape, self.mean.dtype)
        return self.mean + (noise @ self.factor.T if self.full else noise * self.factor)

    def _whiten(self, values: Float[Array, "*B A"]) -> Float[Array, "*B A"]:
        if not self.full:
            return values / self.factor
        inverse = jax.scipy.linalg.solve_triangular(self.factor, jnp.eye(len(self.factor)), lower=True)
        return values @ inverse.T

    def _log_volume(self) -> Float[Array, "*any"]:
        return jnp.log(jnp.diagonal(self.factor) if self.full else self.factor).sum(-1)


@dataclass(frozen=True)
class Actor:
    """A multilayer perceptron with tanh units whose output is a distribution of actions.

    Attributes:
        kind: `deterministic`: N(tanh(f(s)), std^2), of which the mean acts; `gaussian`: N(f(s), L L'), with one
            covariance for all states, which is learned; `squashed`: tanh of N(f(s), g(s)^2), for actions in (-1, 1).
        observation: O.
        action: A.
        hidden: Widths of the hidden layers; none: f is linear.
        std: Standard deviation of `deterministic`, the initial one of `gaussian`. At 1 / sqrt(2 pi) the density of the
            mean is 1, so log pi = -pi |a - mean|^2 has no constant, which losses with a bias below 1 would feel.
        dropout: Share of the hidden units that are left out in training.
    """

    kind: Kind
    observation: int
    action: int
    hidden: tuple[int, ...] = (256, 256)
    std: float = 0.39894228
    dropout: float = 0.0

    def init(self, key: PRNGKeyArray) -> Params:
        """Draws parameters: orthogonal matrices, biases of 0; of `squashed` deviations begin equal at all states."""
        outputs = self.action * (2 if self.kind == "squashed" else 1)
        sizes = (self.observation, *self.hidden, outputs)
        make = jax.nn.initializers.orthogonal()
        keys = jax.random.split(key, len(sizes) - 1)
        params: Params = {
            f"layer_{number}": {"kernel": make(keys[number], sizes[number : number + 2]), "bias": jnp.zeros(size)}
            for number, size in enumerate(sizes[1:])
        }
        if self.kind == "squashed":
            # Else some states begin with deviations near the least one, and with densities of exp(-10,000).
            last = params[f"layer_{len(self.hidden)}"]
            last["kernel"] = last["kernel"].at[:, self.action :].set(0.0)
        if self.kind == "gaussian":
            # The logarithm of the diagonal, and what is below it; what is above is not read.
            params["factor"] = {"bias": jnp.diag(jnp.full(self.action, jnp.log(self.std)))}
        return params

    def distribution(
        self, params: Params, observations: Float[Array, "*B O"], key: PRNGKeyArray | None = None
    ) -> Normal:
        """Computes the distribution of actions, of `squashed` before its tanh.

        Args:
            params: See `init`.
            observations: Shape [..., O].
            key: Key of the dropout; None: no unit is left out.
        """
        outputs = self._network(params, observations, key)
        if self.kind == "deterministic":
            return Normal(jnp.tanh(outputs), jnp.full(self.action, self.std, outputs.dtype))
        if self.kind == "gaussian":
            factor = params["factor"]["bias"]
            lower = jnp.tril(factor, -1) + jnp.diag(jnp.exp(jnp.diagonal(factor)))
            return Normal(outputs, lower, full=True)
        mean, raw = jnp.split(outputs, 2, axis=-1)
        low, high = _LOG_STD
        return Normal(mean, jnp.exp(low + (high - low) * (jnp.tanh(raw) + 1) / 2))

    def log_prob(
        self,
        params: Params,
        observations: Float[Array, "*B O"],
        actions: Float[Array, "*B A"],
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*B"]:
        """Computes log pi(a | s), in nats; `squashed` counts the Jacobian of tanh. Shape [...]."""
        distribution = self.distribution(params, observations, key)
        if self.kind != "squashed":
            return distribution.log_prob(actions)
        before = jnp.arctanh(jnp.clip(actions, -1 + _BORDER, 1 - _BORDER))
        # log(1 - tanh(x)^2), which cancels for large x if it is computed as written
        jacobian = 2 * (jnp.log(2.0) - before - jax.nn.softplus(-2 * before))
        return distribution.log_prob(before) - jacobian.sum(-1)

    def kl(self, params: Params, others: Params, observations: Float[Array, "*B O"]) -> Float[Array, "*B"]:
        """Computes KL(pi || pi_other) at each observation, exactly, as tanh does not change it. Shape [...]."""
        return self.distribution(params, observations).kl(self.distribution(others, observations))

    def mode(self, params: Params, observations: Float[Array, "*B O"]) -> Float[Array, "*B A"]:
        """Computes the action to take without noise: the mean (of `squashed`, its tanh). Shape [..., A]."""
        mean = self.distribution(params, observations).mean
        return jnp.tanh(mean) if self.kind == "squashed" else mean

    def sample(self, params: Params, observations: Float[Array, "*B O"], key: PRNGKeyArray) -> Float[Array, "*B A"]:
        """Draws actions. Shape [..., A]."""
        drawn = self.distribution(params, observations).sample(key)
        return jnp.tanh(drawn) if self.kind == "squashed" else drawn

    def _network(
        self, params: Params, observations: Float[Array, "*B O"], key: PRNGKeyArray | None
    ) -> Float[Array, "*B F"]:
        hidden, last = observations, len(self.hidden)
        for number in range(last):
            hidden = jnp.tanh(_linear(params[f"layer_{number}"], hidden))
            if key is not None and self.dropout:
                kept = jax.random.bernoulli(jax.random.fold_in(key, number), 1 - self.dropout, hidden.shape)
                hidden = jnp.where(kept, hidden / (1 - self.dropout), 0.0)
        return _linear(params[f"layer_{last}"], hidden)


def make_actor(options: ActorOptions, observation: int, action: int) -> Actor:
    """Makes the actor of an `actor:` block without nulls."""
    return Actor(options.kind, observation, action, tuple(options.hidden), options.std, options.dropout)


def _linear(layer: Params, values: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
    return values @ layer["kernel"] + layer["bias"]
