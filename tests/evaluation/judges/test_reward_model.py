import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from qstar_jax.config import (
    ComputeOptions,
    DataOptions,
    DpoConfig,
    LossOptions,
    MeshOptions,
    OptimizerOptions,
    TrainOptions,
)
from qstar_jax.errors import InputError
from qstar_jax.evaluation.judges import Comparison, RewardJudge
from qstar_jax.evaluation.judges.reward_model import load_reward
from qstar_jax.store.open import load_model
from qstar_jax.training.run import train

BETA = 0.3
PAIRS = [("w1 w2", "w3 w4 w5"), ("w1 w2", "w6"), ("w7", "w8 w9"), ("w1 w2", ""), ("w7", "w8 w9 w10 w11 w12")]


@pytest.fixture(scope="module")
def dpo_run(tmp_path_factory, hf_folder, train_file, on_devices):
    """Folder of a DPO run of a few steps; nothing but that folder is left of it."""
    place = tmp_path_factory.mktemp("judge")
    model = shutil.copytree(hf_folder, place / "model")
    config = DpoConfig(
        model=str(model),
        out=str(place / "run"),
        data=DataOptions(train=str(train_file)),
        loss=LossOptions(beta=BETA),
        optimizer=OptimizerOptions(learning_rate=3e-3),
        train=TrainOptions(steps=4, batch_size=8, reference_samples=0),
    )
    with on_devices(1):
        train(config, Console(quiet=True))
    shutil.rmtree(model)
    return place / "run"


def test_the_reward_of_a_run_is_its_summed_log_ratio(dpo_run, tiny_params, tiny_tokenizer, one_device):
    found = load_reward(str(dpo_run), mesh=one_device)(PAIRS)
    policy = load_model(dpo_run, ComputeOptions(), one_device, MeshOptions())
    logits_of = jax.jit(policy.model.logits)
    for (prompt, answer), reward in zip(PAIRS, found, strict=True):
        start = tiny_tokenizer(prompt).input_ids
        ids = [*start, *tiny_tokenizer(answer, add_special_tokens=False).input_ids, tiny_tokenizer.eos_token_id]
        row = jnp.zeros((1, 32), jnp.int32).at[0, : len(ids)].set(jnp.array(ids))
        total = 0.0
        for sign, params in ((1, policy.params), (-1, tiny_params)):
            logp = jax.nn.log_softmax(logits_of(params, row, jnp.array([len(ids)]))[0])
            total += sign * sum(float(logp[i - 1, ids[i]]) for i in range(len(start), len(ids)))
        assert reward == pytest.approx(BETA * total, abs=1e-5)
    assert np.ptp(found) > 0.01


def test_it_judges(dpo_run, one_device):
    reward = load_reward(str(dpo_run), mesh=one_device)
    rewards = dict(zip(PAIRS, reward(PAIRS), strict=True))
    (prompt, one), (_, other) = PAIRS[:2]
    first, second = RewardJudge("run", reward)([Comparison(0, prompt, one, other), Comparison(1, prompt, other, one)])
    assert first.win == float(rewards[prompt, one] > rewards[prompt, other]) == 1 - second.win
    assert first.answer_score == pytest.approx(rewards[prompt, one], abs=1e-6)


def test_another_policy_needs_reference_and_beta(hf_folder, dpo_run, one_device):
    with pytest.raises(InputError, match=r"is no reward model: .*judge\.reference"):
        load_reward(str(hf_folder), mesh=one_device)
    with pytest.raises(InputError, match=r"set --judge\.beta"):
        load_reward(str(hf_folder), mesh=one_device, reference=str(hf_folder))
    same = load_reward(str(hf_folder), mesh=one_device, reference=str(hf_folder), beta=1.0)(PAIRS)
    np.testing.assert_allclose(same, 0.0, atol=1e-5)
    twice = load_reward(str(dpo_run), mesh=one_device, beta=2 * BETA)(PAIRS)
    np.testing.assert_allclose(twice, 2 * np.array(load_reward(str(dpo_run), mesh=one_device)(PAIRS)), rtol=1e-4)


def test_what_is_cut_or_unreadable_is_said(dpo_run, one_device, recorder):
    data = DataOptions(max_length=8, max_prompt_length=4)
    reward = load_reward(str(dpo_run), mesh=one_device, data=data, console=recorder)
    found = reward([("w1", "w2 " * 30), ("w1", "w2 [EOS] w3"), ("w1", "w2")])
    assert math.isnan(found[1]) and not math.isnan(found[0] + found[2])
    assert recorder.lines == [
        "no reward: 1 EOS token inside a response",
        "1 of 2 responses were truncated: they exceed judge.max_length",
    ]
    assert np.isnan(reward([("w1", "w2 [EOS] w3")])).all()


def test_chats(dpo_run, one_device):
    with pytest.raises(InputError, match="no chat template"):
        load_reward(str(dpo_run), mesh=one_device, data=DataOptions(as_chat=True))(PAIRS)
