from dataclasses import asdict

import pytest

from qstar_jax.config import DecodeOptions, JudgeOptions, OptimizerOptions
from qstar_jax.config.compare import drop_unread_defaults, first_difference
from qstar_jax.config.variants import declarations

# What earlier versions stored where nothing was given.
FORMER = {
    DecodeOptions: {
        "min_new_tokens": 0, "stop": [], "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "return_sequences": 1,
        "seed": 0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "preset": "none", "groups": 1, "diversity": 0.0,
        "stochastic": False, "delimiters": [],
    },
    JudgeOptions: {
        "tolerance": 1e-6, "as_chat": False, "max_length": 1024, "max_prompt_length": 512, "batch_size": 4,
        "prompt": "tldr", "seed": 0, "both_orders": False, "retries": 2, "temperature": 0.0, "max_tokens": 256,
        "concurrency": 8, "http_retries": 5, "timeout": 120.0,
    },
}  # fmt: skip


def test_the_first_difference_is_named():
    stored, given = {"a": 1, "train": {"steps": 5, "seed": 0}}, {"a": 1, "train": {"steps": 7, "seed": 0}, "b": None}
    assert first_difference(stored, given) == ("train.steps", 5, 7)
    assert first_difference(stored, given, free=("train.steps",)) is None
    assert first_difference(stored, given | {"a": 2}, free=("train",)) == ("a", 1, 2)


@pytest.mark.parametrize("method", ["greedy", "sample", "beam", "best_of_n", "chunk", "mcts", "exact"])
def test_what_an_earlier_version_stored_is_what_is_given_today(method):
    stored = {"decode": asdict(DecodeOptions(method=method)) | FORMER[DecodeOptions]}
    assert first_difference(stored, {"decode": asdict(DecodeOptions(method=method))}) is None


@pytest.mark.parametrize("kind", ["true_reward", "reward_model", "llm"])
def test_judges_of_an_earlier_version(kind):
    stored = {"judge": asdict(JudgeOptions(kind=kind)) | FORMER[JudgeOptions]}
    assert first_difference(stored, {"judge": asdict(JudgeOptions(kind=kind))}) is None


@pytest.mark.parametrize("block", FORMER)
def test_defaults_are_the_former_ones(block):
    defaults = {name: set(map(str, d.defaults.values())) for name, d in declarations(block).items()}
    assert {name: defaults[name] for name in FORMER[block]} == {n: {str(v)} for n, v in FORMER[block].items()}


def test_a_default_that_is_spelled_out_is_no_difference_and_another_value_is_one():
    stored = {"decode": asdict(DecodeOptions(method="sample"))}
    assert first_difference(stored, {"decode": asdict(DecodeOptions(method="sample", temperature=1.0))}) is None
    assert first_difference(stored, {"decode": asdict(DecodeOptions(method="sample", temperature=0.5))}) == (
        *("decode.temperature", 1.0, 0.5),
    )
    stored = {"optimizer": asdict(OptimizerOptions())}
    assert first_difference(stored, {"optimizer": asdict(OptimizerOptions(beta1=0.9))}) is None
    assert first_difference(stored, {"optimizer": asdict(OptimizerOptions(beta1=0.8))}) == ("optimizer.beta1", 0.9, 0.8)


def test_defaults_that_a_file_spells_out_are_dropped_only_where_they_are_not_read():
    decode = {"method": "beam", "beams": 4, "top_p": 1.0, "top_k": 3, "max_new_tokens": 128}
    tree = {"out": "o", "decode": decode, "judge": {"kind": "llm", "tolerance": 1e-6, "seed": 0}}
    assert drop_unread_defaults(tree) == {
        "out": "o",
        "decode": {"method": "beam", "beams": 4, "top_k": 3, "max_new_tokens": 128},
        "judge": {"kind": "llm", "seed": 0},
    }
    assert drop_unread_defaults({"decode": {"top_p": 1.0, "top_k": 5}}) == {"decode": {"top_k": 5}}  # greedy
    # Its methods have different defaults, so a flag that selects another one must find it.
    assert drop_unread_defaults({"decode": {"objective": "likelihood"}}) == {"decode": {"objective": "likelihood"}}
    assert drop_unread_defaults({"decode": "a file"}) == {"decode": "a file"}
    assert drop_unread_defaults({"decode": {"method": ["beam"], "top_k": 3}})["decode"]["method"] == ["beam"]
