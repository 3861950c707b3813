"""What tokens are credited with: every option, against a loop."""

from dataclasses import replace

import numpy as np
import pytest

from qstar_jax.config import RewardOptions, RlOptions
from qstar_jax.training.rl.rewards import Assessor

RL, REWARD = RlOptions(kl_coef=0.1), RewardOptions(weight=2.0, guide_weight=0.5)


@pytest.fixture(scope="module")
def arrays():
    """Log-probabilities, a guide's rewards, scores and mask of two prompts with three samples of up to four tokens."""
    rng = np.random.default_rng(0)
    logp, ref_logp, guide = rng.normal(size=(3, 2, 3, 4)).astype(np.float32)
    mask = np.arange(4) < np.array([[4, 2, 3], [1, 4, 4]])[..., None]
    return *(np.where(mask, x, 0) for x in (logp, ref_logp, guide)), rng.normal(size=(2, 3)).astype(np.float32), mask


def credit(arrays, rl=RL, reward=REWARD):
    return [np.asarray(x) for x in Assessor(None, rl, reward, True, None, True).credit(*arrays)]


def by_hand(arrays, rl=RL, reward=REWARD):
    logp, ref_logp, guide, scores, mask = arrays
    lengths = mask.sum(-1)
    rewards = reward.guide_weight * guide
    if reward.guide_clip:
        rewards = np.clip(rewards, -reward.guide_clip, reward.guide_clip)
    advantages = np.zeros_like(rewards)
    for b in range(2):
        for n in range(3):
            rewards[b, n, lengths[b, n] - 1] += reward.weight * scores[b, n]
    net = rewards - rl.kl_coef * (logp - ref_logp)
    for b in range(2):
        for n in range(3):
            others = [m for m in range(3) if m != n]
            for t in range(lengths[b, n]):
                if rl.credit == "sequence":
                    own, baseline = net[b, n].sum(), np.mean([net[b, m].sum() for m in others])
                else:
                    own = net[b, n, t:].sum()
                    baseline = np.mean([net[b, m, min(t, lengths[b, m] - 1) :].sum() for m in others])
                advantages[b, n, t] = own - baseline
    if rl.normalize_advantages:
        values = advantages[mask]
        advantages /= np.sqrt(((values - values.mean()) ** 2).mean())
    return rewards, advantages


@pytest.mark.parametrize(
    ("rl", "reward"),
    [
        ({}, {}),
        ({"kl_coef": 0.5}, {}),
        ({"credit": "sequence"}, {}),
        ({"normalize_advantages": True}, {}),
        ({}, {"weight": 0.0}),
        ({}, {"guide_weight": 2.0}),
        ({}, {"guide_clip": 0.2}),
    ],
)
def test_credit(rl, reward, arrays):
    rl, reward = replace(RL, **rl), replace(REWARD, **reward)
    found, expected = credit(arrays, rl, reward), by_hand(arrays, rl, reward)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    if (rl, reward) != (RL, REWARD):  # the option changes something
        assert not np.allclose(found[1], credit(arrays)[1], atol=1e-3)


def test_without_reference_or_guide_a_score_is_the_reward_of_the_last_token(arrays):
    logp, _, _, scores, mask = arrays
    rewards, _ = credit((logp, None, None, scores, mask))
    last = np.arange(4) == mask.sum(-1, keepdims=True) - 1
    np.testing.assert_allclose(rewards, np.where(last, 2 * scores[..., None], 0), rtol=1e-6)


def test_a_single_sample_has_no_advantage(arrays):
    _, advantages = credit([x[:, :1] for x in arrays])
    assert not advantages.any()
