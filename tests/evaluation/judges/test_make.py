import io
from dataclasses import fields

import pytest
from rich.console import Console

pytest.importorskip("openai")

from qstar_jax.config import JudgeOptions
from qstar_jax.config.variants import declarations
from qstar_jax.errors import InputError
from qstar_jax.evaluation.judges import Comparison, LlmJudge, RewardJudge, check_judge, make_judge

LLM = {"kind": "llm", "model": "rule"}


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
        ({**LLM, "tolerance": 1e-6}, "tolerance 1e-06 has no effect with kind llm"),
        ({"model": "m", "temperature": None}, "temperature None has no effect with kind reward_model"),
        ({**LLM, "seed": 1, "both_orders": True}, "seed 1 has no effect with both_orders"),
        ({**LLM, "concurrency": 0}, r"concurrency is 0; expected a number in \[1, inf\)"),
        ({**LLM, "temperature": -1.0}, r"temperature is -1.0; expected a number in \[0, inf\)"),
        ({**LLM, "timeout": 0.0}, r"timeout is 0.0; expected a number in \(0, inf\)"),
        ({"model": "m", "tolerance": float("nan")}, r"tolerance is nan; expected a number in \[0, inf\)"),
    ],
)
def test_options_that_cannot_be(given, match):
    with pytest.raises(InputError, match=match) as error:
        check_judge(JudgeOptions(**given))
    assert str(error.value).startswith("judge: ")
    with pytest.raises(InputError, match=match):
        make_judge(JudgeOptions(**given))


KINDS = ("true_reward", "reward_model", "llm")
DECLARED = declarations(JudgeOptions)


def test_every_option_has_its_readers():
    assert DECLARED.keys() | {"kind"} == {option.name for option in fields(JudgeOptions)}
    assert {kind for declaration in DECLARED.values() for kind in declaration.defaults} == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_every_option_that_a_kind_does_not_read_is_refused(kind):
    unread = [name for name, declaration in DECLARED.items() if kind not in declaration.defaults]
    assert unread
    for name in unread:
        with pytest.raises(InputError, match=f"judge: {name} 1 has no effect with kind {kind};"):
            check_judge(JudgeOptions(kind=kind, **{name: 1}))


def test_defaults_are_filled_in():
    judge = check_judge(JudgeOptions(**LLM))
    assert (judge.temperature, judge.max_tokens, judge.prompt, judge.cache, judge.tolerance) == (
        *(0.0, 256, "tldr"),
        *(None, None),
    )
    assert check_judge(JudgeOptions(**LLM, temperature=None)).temperature is None  # left to the server


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
