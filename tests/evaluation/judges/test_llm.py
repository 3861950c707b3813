import asyncio
import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

pytest.importorskip("openai")

from qstar_jax.errors import InputError
from qstar_jax.evaluation.judges import Comparison, LlmJudge, win_rate
from qstar_jax.evaluation.judges.chat import ChatServer
from qstar_jax.evaluation.judges.cost import Budget
from qstar_jax.evaluation.judges.prompts import TEMPLATES


def compare(*pairs):
    return [Comparison(row, f"post {row}", *pair) for row, pair in enumerate(pairs)]


# The rule of the server: the longer one is better.
MIXED = compare(*[("long answer", "short")] * 8, *[("short", "long answer")] * 8)


@pytest.fixture
def make(rule_server, tmp_path):
    def make(server=None, **options):
        server = server or ChatServer("rule", rule_server.url, http_retries=0)
        return LlmJudge(server, TEMPLATES["tldr"], **{"cache": tmp_path, **options})

    return make


def test_the_order_is_mixed_and_undone(make, rule_server):
    verdicts = make()(MIXED)
    assert [verdict.win for verdict in verdicts] == [1.0] * 8 + [0.0] * 8
    first = ["answer shown as A" in verdict.note for verdict in verdicts]
    assert 3 < sum(first) < 13
    questions = {body["messages"][0]["content"] for _, body, _ in rule_server.requests}
    for comparison, is_first in zip(MIXED, first, strict=True):
        shown = (comparison.answer, comparison.baseline)
        assert TEMPLATES["tldr"].render(comparison.prompt, *(shown if is_first else shown[::-1])) in questions


def test_the_order_is_of_seed_and_texts_alone(make):
    def first(comparisons, seed):
        return ["shown as A" in verdict.note for verdict in make(seed=seed)(comparisons)]

    order = first(MIXED, 0)
    assert first(MIXED[::-1], 0) == order[::-1]
    assert first([replace(c, row=c.row + 100) for c in MIXED], 0) == order
    assert first(MIXED, 1) != order


def test_a_second_run_makes_no_call(make, rule_server, recorder):
    first = make()(MIXED)
    assert len(rule_server.requests) == len(MIXED)
    rule_server.faults = [500] * 100
    assert make(console=recorder)(MIXED) == first
    assert len(rule_server.requests) == len(MIXED)
    assert recorder.lines == [f"llm rule (tldr): no calls: {len(MIXED)} replies are kept from before"]


def test_a_broken_run_costs_nothing_twice(make, rule_server):
    rule_server.faults = [0] * 6 + [400]  # 0 is no fault
    with pytest.raises(InputError, match="refuses the request"):
        make(concurrency=3)(MIXED)
    broken = len(rule_server.served)
    # Those on their way are kept, and no other began; how many these are depends on when the refusal was seen.
    assert 6 <= broken < len(rule_server.requests) < len(MIXED)
    assert make().estimate(MIXED).calls == len(MIXED) - broken
    assert [verdict.win for verdict in make()(MIXED)] == [1.0] * 8 + [0.0] * 8
    assert len(rule_server.served) == len(MIXED)


@pytest.mark.parametrize("limit", [1, 3])
def test_calls_on_their_way_are_limited(limit, make, rule_server):
    make(concurrency=limit)(MIXED)
    assert rule_server.peak == limit


def test_equal_answers_tie_without_a_call_and_equal_comparisons_are_asked_once(make, rule_server):
    same = compare(("text", "text"), ("text ", "\ntext"))
    twice = [replace(MIXED[0], row=row) for row in (5, 6, 7)]
    verdicts = make()(same + twice)
    assert [verdict.win for verdict in verdicts] == [0.5, 0.5, 1.0, 1.0, 1.0]
    assert len(rule_server.requests) == 1
    assert make()([]) == []


def test_equal_questions_are_one_whoever_is_on_trial(make, rule_server):
    swapped = [replace(c, answer=f" {c.baseline}", baseline=f"{c.answer}\n") for c in MIXED]
    verdicts = make(both_orders=True)([*MIXED, *swapped])
    assert [verdict.win for verdict in verdicts] == ([1.0] * 8 + [0.0] * 8) + ([0.0] * 8 + [1.0] * 8)
    assert len(rule_server.requests) == 2 * len(MIXED)


def test_a_reply_without_a_letter_is_asked_for_again(make, rule_server):
    (verdict,) = make(retries=1)(compare(("a long riddle", "short")))
    assert verdict.win == 1.0 and "reply 2" in verdict.note
    again = rule_server.requests[1][1]["messages"]
    assert [m["role"] for m in again] == ["user", "assistant", "user"] and "does not end as asked" in again[2][
        "content"
    ]


def test_without_a_letter_it_stays_undecided_and_is_counted(make, rule_server, recorder):
    comparisons = [*compare(("many riddles", "short")), MIXED[1]]
    verdicts = make(retries=2, console=recorder)(comparisons)
    assert [verdict.win for verdict in verdicts] == [None, 1.0]
    assert "undecided: names no letter" in verdicts[0].note and "who knows?" in verdicts[0].note
    assert recorder.lines[-1] == "llm rule (tldr): 1 of 2 comparisons undecided, as its replies name no letter"
    assert win_rate(verdicts).undecided == 1 and len(rule_server.requests) == 3 + 1
    assert make(retries=2)(comparisons) == verdicts and len(rule_server.requests) == 4
    make(retries=3)(comparisons)  # one more try is one more call
    assert len(rule_server.requests) == 5


def test_both_orders(make, chat_server):
    assert [verdict.win for verdict in make(both_orders=True)(MIXED)] == [1.0] * 8 + [0.0] * 8

    def always_first(body):
        choice = {"index": 0, "message": {"role": "assistant", "content": "Preferred: A"}}
        return 200, json.dumps({"choices": [choice]}).encode()

    with chat_server(always_first) as server:
        judge = make(ChatServer("first", server.url), both_orders=True)
        verdicts = judge(MIXED)
        assert len(server.requests) == 2 * len(MIXED)
    assert {verdict.win for verdict in verdicts} == {0.5}
    assert "answer shown as A" in verdicts[0].note and "answer shown as B" in verdicts[0].note


def test_half_an_answer_of_both_orders_decides_nothing(make):
    (verdict,) = make(both_orders=True, retries=0)(compare(("riddles and riddles", "short")))
    assert verdict.win is None


def test_the_estimate_comes_first_and_can_refuse(make, rule_server, recorder):
    prices = {"price_in": 10.0, "price_out": 30.0}
    judge = make(budget=Budget(**prices, max_cost=0.001), console=recorder)
    with pytest.raises(InputError, match=r"max_cost \$0\.0010 is less"):
        judge(MIXED)
    assert not rule_server.requests
    assert recorder.lines[0].startswith("llm rule (tldr): 16 calls (0 more are kept from before)")
    judge = make(budget=Budget(**prices, max_cost=1.0))
    estimate = judge.estimate(MIXED)
    assert (estimate.calls, estimate.kept, estimate.tokens_out) == (16, 0, 16 * 256)
    assert estimate.dollars == pytest.approx((estimate.tokens_in * 10 + estimate.tokens_out * 30) / 1e6)
    judge(MIXED)
    assert judge.budget.spent == pytest.approx(16 * (100 * 10 + 10 * 30) / 1e6)  # as the server counts
    assert judge.estimate(MIXED).dollars == 0


def test_repeated_tries_stop_at_the_limit(make, rule_server):
    comparisons = compare(("many riddles", "short"))
    budget = Budget(0.0, 1e6, max_cost=256.0 + 11.0)  # a dollar a token of replies; each try leaves 10 less
    with pytest.raises(InputError, match="used up by replies that did not decide"):
        make(budget=budget, retries=5)(comparisons)
    assert len(rule_server.requests) == 2


def test_progress(make):
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    make(console=console)(MIXED)
    assert "judging" in console.file.getvalue() and "16/16" in console.file.getvalue()


def test_it_works_inside_a_running_loop(make):
    async def notebook():
        return make()(MIXED[:2])

    assert [verdict.win for verdict in asyncio.run(notebook())] == [1.0, 1.0]


def test_no_key_in_the_cache(make, rule_server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    make()(MIXED[:2])
    assert "secret-key" not in (tmp_path / "replies.jsonl").read_text()
    monkeypatch.delenv("OPENAI_API_KEY")
    make()(MIXED[:2])
    assert len(rule_server.requests) == 2


@pytest.mark.parametrize("wrong", [{"retries": -1}, {"concurrency": 0}])
def test_numbers_out_of_range(wrong, make):
    with pytest.raises(InputError, match="is at least"):
        make(**wrong)
