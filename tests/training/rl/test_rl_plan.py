"""Options that are refused, and what becomes of the others."""

import pytest

from qstar_jax.config import RewardOptions, RlOptions
from qstar_jax.errors import InputError
from qstar_jax.training.rl.plan import make_rl_plan, updates_per_step


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"train": ""}}, r"--data\.train is missing"),
        ({"data": {"layout": "packed"}}, r"data\.layout packed has other shapes.*shared"),
        ({"data": {"row_length": 64}}, r"data\.row_length 64 has no effect"),
        ({"rl": {"samples_per_prompt": 1}}, r"rl\.samples_per_prompt 1: expected at least 2"),
        ({"rl": {"kl_coef": -0.1}}, r"rl\.kl_coef -0\.1 must be at least 0"),
        ({"rl": {"temperature": 0.0}}, r"rl\.temperature 0 above 0"),
        ({"rl": {"max_new_tokens": 0}}, r"rl\.max_new_tokens 0 at least 1"),
        ({"rl": {"clip_ratio": 0.1}}, r"clip_ratio 0\.1 has no effect with algorithm rloo; ppo reads it"),
        ({"rl": {"algorithm": "ppo", "clip_ratio": 1.5}}, r"clip_ratio is 1\.5; expected a number in \(0, 1\)"),
        ({"rl": {"algorithm": "ppo", "minibatches": 3}}, r"train\.batch_size 8 \(prompts\) does not divide .* 3 parts"),
        ({"rl": {"algorithm": "grpo"}}, "algorithm 'grpo' is unknown; choose from rloo, ppo"),
        ({"reward": RewardOptions(kind="reward_model")}, r"needs --reward\.model"),
        ({"reward": RewardOptions(model="runs/dpo")}, "model 'runs/dpo' has no effect with kind true_reward"),
        ({"reward": RewardOptions(kind="none")}, r"gives no reward; set --reward\.guide"),
        ({"reward": RewardOptions(kind="none", weight=1.0)}, "weight 1.0 has no effect with kind none"),
        ({"reward": {"guide_weight": 2.0}}, r"no effect without reward\.guide"),
        ({"reward": {"guide": "runs/dpo", "guide_clip": -1.0}}, r"guide_clip -1 must be above 0"),
        ({"train": {"reference_samples": 16}}, r"train\.reference_samples 16 has no effect"),
        ({"train": {"keep_best": "loss", "eval_every": 2}, "data": {"eval": "e"}}, "is not measured by this verb"),
        ({"train": {"steps": 4, "epochs": 1.0}}, r"train\.steps 4 and train\.epochs 1\.0 contradict"),
    ],
)
def test_refusals(changes, message, make_rl_config, tmp_path):
    with pytest.raises(InputError, match=message):
        make_rl_plan(make_rl_config(tmp_path, **changes))


def test_defaults_are_filled_in_and_the_reference_follows_from_kl_coef(make_rl_config, tmp_path):
    plan = make_rl_plan(make_rl_config(tmp_path))
    assert plan.reference.mode == "live" and plan.objective.beta == 0.05 and plan.config.reward.weight == 1.0
    free = make_rl_plan(make_rl_config(tmp_path, rl={"kl_coef": 0.0}))
    assert free.reference.mode == "none" and free.objective.beta is None
    ppo = make_rl_plan(make_rl_config(tmp_path, rl={"algorithm": "ppo", "minibatches": 2})).config.rl
    assert (ppo.clip_ratio, ppo.inner_epochs, updates_per_step(ppo)) == (0.2, 4, 8)
    assert updates_per_step(RlOptions()) == 1
