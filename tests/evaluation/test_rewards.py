"""Rewards of responses for training."""

from dataclasses import replace

import numpy as np
import pytest

from qstar_jax.config import DataOptions, RewardOptions, RlConfig
from qstar_jax.data.loading import Dataset
from qstar_jax.data.tokenization import Example
from qstar_jax.errors import InputError
from qstar_jax.evaluation import rewards
from qstar_jax.evaluation.final_answers import EXTRACTORS
from qstar_jax.evaluation.judges.classifier import as_messages
from qstar_jax.evaluation.rewards import Verifier, reward_maker
from qstar_jax.tasks import find
from qstar_jax.training.rl.prompts import Prompts

HASH = EXTRACTORS["hash"]
ROWS = [{"prompt": "1 + 1 =", "answer": "2"}, {"prompt": "2 + 5 =", "answer": "2 + 5 = 7 #### 7.0"}]


def prompts_of(rows, source="sums.jsonl"):
    examples = [Example(np.array([1], np.int32), False, (), row) for row in range(len(rows))]
    return Prompts(Dataset(examples, (), source), "train", {n: row["prompt"] for n, row in enumerate(rows)})


def test_a_verifier_compares_final_answers_with_those_of_the_prompts_row():
    verify = Verifier(prompts_of(ROWS), ROWS, "answer", HASH)
    pairs = [("1 + 1 =", "so # 2"), ("1 + 1 =", "so # 7"), ("2 + 5 =", "# 7"), ("2 + 5 =", "7")]
    assert verify(pairs) == [1.0, 0.0, 1.0, 0.0]  # the last gives no answer after a mark
    assert Verifier(prompts_of(ROWS), ROWS, "answer", EXTRACTORS["number"])(pairs) == [1.0, 0.0, 1.0, 1.0]


def test_a_prompt_with_two_answers_is_refused():
    rows = [*ROWS, {"prompt": "1 + 1 =", "answer": "3"}]
    with pytest.raises(InputError, match=r"row 3: its prompt occurs before with the answer '2', and here it is '3'"):
        Verifier(prompts_of(rows), rows, "answer", HASH)


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


def chats_of(rows, source):
    """The same prompts as chats, which the policy reads with its template."""
    prompts = prompts_of(rows, source)
    return replace(prompts, turns={row: [{"role": "user", "content": text}] for row, text in prompts.turns.items()})


def test_rewards_of_chats_are_those_of_their_text():
    config = RlConfig(model="m", out="o", data=DataOptions(train="builtin:tiny-tldr"), reward=RewardOptions())
    [row] = find("builtin:tiny-tldr")[0].rows("train", 0, 1)
    text, chat = (make([row], "builtin:tiny-tldr") for make in (prompts_of, chats_of))
    assert chat.texts == text.texts
    pairs = [(chat.texts[0], row["chosen"])]
    assert reward_maker(config)(chat)(pairs) == reward_maker(config)(text)(pairs) != [None]
    assert Verifier(chats_of(ROWS, "f"), ROWS, "answer", HASH)([("1 + 1 =", "so # 2")]) == [1.0]


def test_a_reward_models_template_wraps_the_turns_of_a_chat(monkeypatch):
    monkeypatch.setattr(rewards, "load_reward", lambda model, **options: list)  # returns the pairs it gets
    turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    prompts = replace(prompts_of(ROWS), turns={0: turns, 1: [turns[0]]})
    assert prompts.texts == {0: "user: a\n\nassistant: b\n\nuser: c", 1: "a"}
    pairs = [(prompts.texts[0], "x"), ("a", "y")]

    def read(as_chat):
        reward = RewardOptions(kind="reward_model", model="rm", as_chat=as_chat)
        return reward_maker(RlConfig(model="m", out="o", data=DataOptions(train="f"), reward=reward))(prompts)(pairs)

    assert read(False) == pairs and read(True) == [(turns, "x"), ([turns[0]], "y")]
    assert as_messages(turns, "x")[0] == turns and as_messages("a", "y")[0] == [turns[0]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, True, "", ["2"]])
def test_what_is_no_right_answer_is_refused(value):
    """No response could give it, and each would earn 0."""
    rows = [*ROWS, {"prompt": "3 + 4 =", "answer": value}]
    with pytest.raises(InputError, match=r"sums\.jsonl row 3: column 'answer' holds .* that --reward\.answer names"):
        Verifier(prompts_of(rows), rows, "answer", HASH)
