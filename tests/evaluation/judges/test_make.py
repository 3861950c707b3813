import io
from dataclasses import fields

import pytest
from rich.console import Console

pytest.importorskip("openai")

from qstar_jax.config import JudgeOptions
from qstar_jax.errors import InputError
from qstar_jax.evaluation.judges import Comparison, LlmJudge, RewardJudge, check_judge, make_judge
from qstar_jax.evaluation.judges.options import KINDS, READERS

LLM = {"kind": "llm", "model": "rule"}


def test_every_option_has_its_readers():
    assert READERS.keys() == {option.name for option in fields(JudgeOptions)}
    assert {kind for kinds in READERS.values() for kind in kinds} == set(KINDS)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"kind": "true_reward"}, "this one does not; set --judge.kind reward_model or llm"),
        ({}, r"kind reward_model needs --judge\.model: the folder of a DPO run"),
        ({"kind": "llm"}, r"kind llm needs --judge\.model"),
        (
            {"model": "m", "base_url": "http://x/v1"},
            "base_url 'http://x/v1' has no effect with kind reward_model; llm reads",
        ),
        (
            {"kind": "true_reward", "model": "m"},
            "model 'm' has no effect with kind true_reward; reward_model and llm read",
        ),
        ({**LLM, "tolerance": 0.1}, "tolerance 0.1 has no effect with kind llm"),
        ({**LLM, "seed": 1, "both_orders": True}, "seed 1 has no effect with both_orders"),
        ({**LLM, "concurrency": 0}, "concurrency 0: expected at least 1"),
        ({**LLM, "temperature": -1.0}, "temperature -1.0: expected at least 0"),
        ({**LLM, "timeout": 0.0}, "timeout 0.0: expected seconds above 0"),
        ({"model": "m", "tolerance": float("nan")}, "tolerance nan: expected at least 0"),
    ],
)
def test_options_that_cannot_be(given, match):
    with pytest.raises(InputError, match=match) as error:
        check_judge(JudgeOptions(**given))
    assert str(error.value).startswith("judge: ")
    with pytest.raises(InputError, match=match):
        make_judge(JudgeOptions(**given))


def test_true_reward():
    judge = make_judge(
        JudgeOptions(kind="true_reward", tolerance=1.0), true_reward=lambda pairs: [len(a) for _, a in pairs]
    )
    assert isinstance(judge, RewardJudge)
    assert [v.win for v in judge([Comparison(0, "p", "abc", "a"), Comparison(1, "p", "ab", "a")])] == [1.0, 0.5]


def test_reward_model(hf_folder, one_device):
    options = JudgeOptions(model=str(hf_folder), reference=str(hf_folder), beta=1.0, tolerance=1e-3)
    judge = make_judge(options, mesh=one_device)
    assert judge.name == "reward model tiny"
    assert [v.win for v in judge([Comparison(0, "w1", "w2", "w3 w4")])] == [0.5]


def test_llm(rule_server, tmp_path):
    text = io.StringIO()
    options = JudgeOptions(**LLM, base_url=rule_server.url, cache=str(tmp_path / "cache"), price_in=1.0, price_out=2.0)
    judge = make_judge(options, console=Console(file=text, width=40))
    assert isinstance(judge, LlmJudge) and judge.name == "llm rule (tldr)"
    assert [v.win for v in judge([Comparison(0, "p", "longer", "one")])] == [1.0]
    assert (tmp_path / "cache" / "replies.jsonl").exists()
    assert text.getvalue().startswith("llm rule (tldr): 1 calls (0 more are kept from before), about ")
    assert "at most about $0.0" in text.getvalue() and text.getvalue().count("\n") == 1


def test_the_cache_is_the_users_by_default(rule_server, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    make_judge(JudgeOptions(**LLM, base_url=rule_server.url))([Comparison(0, "p", "longer", "one")])
    assert (tmp_path / "qstar_jax" / "judge" / "replies.jsonl").exists()


def test_without_the_package(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(InputError, match=r"pip install 'qstar_jax\[judge\]'"):
        make_judge(JudgeOptions(**LLM, base_url="http://localhost/v1"))
