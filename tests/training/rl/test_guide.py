"""Token rewards of a DPO run."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax.config import LossOptions, RewardOptions, RlOptions
from qstar_jax.data.tokenization import Example, Response
from qstar_jax.errors import InputError
from qstar_jax.scoring import score_policy
from qstar_jax.training.rl.batches import Batcher
from qstar_jax.training.rl.rewards import Assessor, Guide
from qstar_jax.training.run_log import read_metrics

RL, REWARD = RlOptions(kl_coef=0.1), RewardOptions(kind="none", guide_weight=2.0)


@pytest.fixture(scope="module")
def examples():
    rng = np.random.default_rng(3)

    def response():
        return Response(rng.integers(3, 40, rng.integers(1, 6)).astype(np.int32), False)

    prompts = [rng.integers(3, 40, rng.integers(1, 7)).astype(np.int32) for _ in range(4)]
    return [Example(prompt, False, (response(), response()), row) for row, prompt in enumerate(prompts)]


def assess(model, examples, mesh, params, ref_params, guide, *, is_exact=False, parts=1):
    lengths = {"prompts_per_part": 4 // parts, "samples": 2, "max_new_tokens": 5, "parts": parts}
    batcher = Batcher.of([len(e.prompt) for e in examples], "shared", mesh, **lengths)
    batch = batcher(examples, [e.responses for e in examples])
    assessor = Assessor(model, RL, REWARD, True, guide, is_exact, parts)
    zeros = np.zeros((4, 2), np.float32)
    return assessor.compile()(params, ref_params, batch, zeros, np.zeros((4, 2, 5), np.float32))


@pytest.mark.parametrize("shared", [True, False])
def test_tokens_earn_beta_times_the_log_ratio_of_the_guide(shared, tiny_model, tiny_params, examples, one_device):
    params, guided, other = (jax.tree.map(lambda x, f=f: x * f, tiny_params) for f in (1.02, 1.05, 0.97))
    reference = (None, None) if shared else (tiny_model, other)
    guide = Guide(tiny_model, guided, *reference, beta=0.3, identity="")
    with jax.set_mesh(one_device):
        batch = assess(tiny_model, examples, one_device, params, tiny_params, guide)
        score = jax.jit(lambda params: score_policy(tiny_model, params, replace(batch, outcome={})).logp)
        expected = 2 * 0.3 * (score(guided) - score(tiny_params if shared else other))
        np.testing.assert_allclose(batch.outcome["rewards"], expected, atol=1e-5)
        np.testing.assert_allclose(batch.outcome["logp"], score(params), atol=1e-5)
        np.testing.assert_allclose(batch.ref_logp, score(tiny_params), atol=1e-5)
        if shared:  # micro-batches change nothing
            parts = assess(tiny_model, examples, one_device, params, tiny_params, guide, parts=2)
            for name, values in batch.outcome.items():
                np.testing.assert_allclose(jnp.concatenate(parts.outcome[name]), values, atol=1e-5)


def test_a_guide_needs_a_reference(make_rl_config, tiny_rl, hf_folder, tmp_path):
    config = make_rl_config(tmp_path / "rl", reward={"guide": str(hf_folder)})
    with pytest.raises(InputError, match=r"reward\.guide .* has no reference"):
        tiny_rl(config)


@pytest.mark.slow
def test_a_run_is_guided_by_token_rewards_alone(make_config, tiny_train, make_rl_config, tiny_rl, tmp_path):
    dpo = make_config(tmp_path / "dpo", train={"steps": 12, "save_every": 0}, optimizer={"learning_rate": 1e-2})
    tiny_train(replace(dpo, loss=LossOptions(beta=0.5)))
    reward = RewardOptions(kind="none", guide=str(tmp_path / "dpo"))
    train = {"steps": 20, "batch_size": 16, "save_every": 0}
    config = make_rl_config(
        tmp_path / "rl", reward=reward, train=train, optimizer={"learning_rate": 1e-2}, rl={"kl_coef": 0.01}
    )
    tiny_rl(config, reward=None)
    metrics = read_metrics(tmp_path / "rl")
    earned = metrics["objective/token_reward"][1]
    assert "objective/scores" not in metrics and np.mean(earned[-4:]) > np.mean(earned[:4]) + 0.1
    np.testing.assert_allclose(
        metrics["objective/rlhf_reward"][1],
        np.array(earned) - 0.01 * np.array(metrics["objective/kl"][1]),
        atol=1e-4,
    )
