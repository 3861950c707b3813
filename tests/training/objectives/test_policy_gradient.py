"""Metrics of the policy gradient."""

from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from qstar_jax.training.objectives.policy_gradient import sample_metrics


def test_the_share_of_prompts_whose_samples_all_earn_the_same():
    scores = jnp.array([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0], [1.0, 1.0]])
    rewards = jnp.stack([jnp.zeros_like(scores), scores], axis=-1)  # [B, R, T]
    counts = jnp.ones(scores.shape)
    batch = SimpleNamespace(
        outcome={"logp": jnp.zeros_like(rewards), "rewards": rewards, "scores": scores},
        weights=jnp.array([1.0, 1.0, 1.0, 0.0]),  # the last fills the batch
        num_actions=counts,
        truncated=counts,
        ref_logp=None,
    )
    total, weight = sample_metrics(batch, 0.1)["frac_reward_zero_std"]
    assert total / weight == pytest.approx(2 / 3)
    # Token rewards tell apart what the score does not.
    batch.outcome["rewards"] = rewards.at[0, 0, 0].set(0.5)
    total, weight = sample_metrics(batch, 0.1)["frac_reward_zero_std"]
    assert total / weight == pytest.approx(1 / 3)
    # An evaluation draws one sample, which has nothing to differ from.
    batch.outcome = {name: value[:, :1] for name, value in batch.outcome.items()}
    batch.num_actions = batch.truncated = counts[:, :1]
    assert "frac_reward_zero_std" not in sample_metrics(batch, 0.1)
