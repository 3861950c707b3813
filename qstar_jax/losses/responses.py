"""From tokens to responses: the sums and means that losses compare, and the metrics that they return."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, ScalarLike

from qstar_jax.errors import InputError
from qstar_jax.shapes import check_same_shape, show_shape


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LossMetrics:
    """What a loss compared; no gradient flows through it.

    Attributes:
        rewards: Reward of each response, in the scale of the loss: beta * sum_t log-ratio_t where there is a reference
            (also where the loss compares something else, as in TRL's logs), otherwise the score that the loss compares.
            Shape [..., R], or [...] for losses that judge single responses.
    """

    rewards: Float[Array, "..."]

    @property
    def margins(self) -> Float[Array, "..."]:
        """Reward of the first (chosen) response minus that of the second. Shape [...]."""
        return self.rewards[..., 0] - self.rewards[..., 1]

    @property
    def accuracies(self) -> Float[Array, "..."]:
        """1 where the reward of the chosen response is strictly higher, else 0. Shape [...]."""
        return (self.margins > 0).astype(self.rewards.dtype)


def record(rewards: Float[Array, "..."]) -> LossMetrics:
    """Makes the metrics of these rewards, with the gradient stopped."""
    return LossMetrics(rewards=jax.lax.stop_gradient(rewards))


def response_sums(values: Float[Array, "*B T"], mask: Bool[Array, "*B T"]) -> Float[Array, "*B"]:
    """Sums the actions of each response; values where `mask` is False change neither result nor gradient.

    Args:
        values: One number per token. Shape [..., T].
        mask: True at actions. Shape [..., T].

    Returns:
        Sum of each response in float32 (or float64), 0 for an empty one. Shape [...].

    Raises:
        InputError: If the shapes differ and would be broadcast.
    """
    check_same_shape(values=values, mask=mask)
    # At least float32: bfloat16 sums over hundreds of tokens have no digits left.
    values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    return jnp.where(mask, values, 0.0).sum(-1)


def response_means(values: Float[Array, "*B T"], mask: Bool[Array, "*B T"]) -> Float[Array, "*B"]:
    """Averages over the actions of each response: `response_sums` over their number; 0 where there is none."""
    return response_sums(values, mask) / jnp.maximum(mask.sum(-1), 1)


def pair(responses: Float[Array, "*B 2"]) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
    """Splits [..., 2] into (chosen, rejected); raises InputError unless there are two responses."""
    if responses.shape[-1:] != (2,):
        found = show_shape((*responses.shape, "T"))
        raise InputError(f"log-ratios or log-probabilities {found}: expected [..., 2, T], chosen first, then rejected")
    return responses[..., 0], responses[..., 1]


def smoothed_log_loss(margin: Float[Array, "*B"], label_smoothing: ScalarLike) -> Float[Array, "*B"]:
    """-(1 - eps) log sigma(margin) - eps log sigma(-margin): logistic loss of labels flipped with probability eps."""
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(margin) - label_smoothing * jax.nn.log_sigmoid(-margin)
