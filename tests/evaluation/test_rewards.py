"""Rewards of responses for training."""

import numpy as np
import pytest

from qstar_jax.config import DataOptions, RewardOptions, RlConfig
from qstar_jax.data.loading import Dataset
from qstar_jax.data.tokenization import Example
from qstar_jax.errors import InputError
from qstar_jax.evaluation.rewards import Verifier, reward_maker
from qstar_jax.tasks import find
from qstar_jax.training.rl.prompts import Prompts

ROWS = [{"prompt": "1 + 1 =", "answer": "2"}, {"prompt": "2 + 5 =", "answer": "2 + 5 = 7 #### 7.0"}]


def prompts_of(rows, source="sums.jsonl"):
    examples = [Example(np.array([1], np.int32), False, (), row) for row in range(len(rows))]
    return Prompts(Dataset(examples, (), source), "train", {n: row["prompt"] for n, row in enumerate(rows)})


def test_a_verifier_compares_final_answers_with_those_of_the_prompts_row():
    verify = Verifier(prompts_of(ROWS), ROWS, "answer", "hash")
    pairs = [("1 + 1 =", "so # 2"), ("1 + 1 =", "so # 7"), ("2 + 5 =", "# 7"), ("2 + 5 =", "7")]
    assert verify(pairs) == [1.0, 0.0, 1.0, 0.0]  # the last gives no answer after a mark
    assert Verifier(prompts_of(ROWS), ROWS, "answer", "number")(pairs) == [1.0, 0.0, 1.0, 1.0]


def test_a_prompt_with_two_answers_is_refused():
    rows = [*ROWS, {"prompt": "1 + 1 =", "answer": "3"}]
    with pytest.raises(InputError, match=r"row 3: its prompt occurs before with the answer '2', and here it is '3'"):
        Verifier(prompts_of(rows), rows, "answer", "hash")


@pytest.mark.parametrize(("train", "held_out"), [("sums.jsonl", None), ("builtin:tiny-tldr", "sums.jsonl")])
def test_files_have_no_true_reward_which_is_said_before_anything_is_loaded(train, held_out):
    config = RlConfig(model="m", out="o", data=DataOptions(train=train, eval=held_out), reward=RewardOptions())
    with pytest.raises(InputError, match=r"reward\.kind true_reward: sums\.jsonl is no built-in task"):
        reward_maker(config)


def test_the_true_reward_is_the_tasks():
    config = RlConfig(model="m", out="o", data=DataOptions(train="builtin:tiny-tldr"), reward=RewardOptions())
    task = find("builtin:tiny-tldr")[0]
    [row] = task.rows("train", 0, 1)
    reward = reward_maker(config)(prompts_of([row], "builtin:tiny-tldr"))
    pairs = [(row["prompt"], row["chosen"]), (row["prompt"], row["rejected"])]
    assert reward(pairs) == [task.true_reward(*pair) for pair in pairs] and reward(pairs)[0] != reward(pairs)[1]
