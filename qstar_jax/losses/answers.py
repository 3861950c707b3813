"""From tokens to answers: the sums and means that losses compare, and the record that they return."""

from dataclasses import dataclass

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, ScalarLike


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LossMetrics:
    """What a loss saw; no gradient flows through it.

    Attributes:
        rewards: Reward of each answer, in the scale of the loss: beta * sum_t log-ratio_t where there is a reference
            (also where the loss compares something else, as in TRL's logs), otherwise the score that the loss compares.
            Shape [..., R], or [...] of losses that judge single answers.
    """

    rewards: Float[Array, "..."]

    @property
    def margins(self) -> Float[Array, "..."]:
        """Reward of the first (chosen) answer minus that of the second. Shape [...]."""
        return self.rewards[..., 0] - self.rewards[..., 1]

    @property
    def accuracies(self) -> Float[Array, "..."]:
        """1 where the chosen answer has strictly the higher reward, else 0. Shape [...]."""
        return (self.margins > 0).astype(self.rewards.dtype)


def record(rewards: Float[Array, "..."]) -> LossMetrics:
    """The record of these rewards, cut off from the gradient."""
    return LossMetrics(rewards=jax.lax.stop_gradient(rewards))


def answer_sums(values: Float[Array, "*B T"], mask: Bool[Array, "*B T"]) -> Float[Array, "*B"]:
    """Sums the tokens of each answer; what stands under the mask changes neither value nor gradient.

    Args:
        values: A number a token. Shape [..., T].
        mask: True at the answer's tokens. Shape [..., T].

    Returns:
        Sum of each answer in float32 (or float64), 0 for an empty one. Shape [...].

    Raises:
        AssertionError: If the shapes differ, and would be broadcast.
    """
    chex.assert_equal_shape([values, mask])
    # At least float32: sums of bfloat16 over some hundred tokens have no digits left.
    values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    return jnp.where(mask, values, 0.0).sum(-1)


def answer_means(values: Float[Array, "*B T"], mask: Bool[Array, "*B T"]) -> Float[Array, "*B"]:
    """Averages over the tokens of each answer: `answer_sums` over the answer's length; 0 for an empty answer."""
    return answer_sums(values, mask) / jnp.maximum(mask.sum(-1), 1)


def pair(answers: Float[Array, "*B 2"]) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
    """Splits [..., 2] into (chosen, rejected); raises AssertionError where there are not two answers."""
    chex.assert_axis_dimension(answers, -1, 2)
    return answers[..., 0], answers[..., 1]


def smoothed_log_loss(margin: Float[Array, "*B"], label_smoothing: ScalarLike) -> Float[Array, "*B"]:
    """-(1 - eps) log sigma(margin) - eps log sigma(-margin): the logistic loss under labels flipped with eps."""
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(margin) - label_smoothing * jax.nn.log_sigmoid(-margin)
