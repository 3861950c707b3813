"""A real model behind a real server: `transformers serve` of the folder that QSTAR_REAL_MODEL names."""

import json

import pytest

pytest.importorskip("openai")

from qstar_jax.errors import InputError
from qstar_jax.evaluation.judges import Comparison, LlmJudge, win_rate
from qstar_jax.evaluation.judges.chat import ChatServer
from qstar_jax.evaluation.judges.cost import Budget
from qstar_jax.evaluation.judges.prompts import TEMPLATES, load_template

from .conftest import REAL_MODEL

pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.skipif(not REAL_MODEL, reason="QSTAR_REAL_MODEL names no folder of a real model"),
]

COMPARISONS = [
    Comparison(0, "What is the capital of France?", "It is Paris.", "I like cats."),
    Comparison(1, "How do I boil an egg?", "No.", "Eight minutes in boiling water make it hard."),
    Comparison(2, "Name a colour.", "Blue.", "Blue."),
    Comparison(3, "Is the sea salty?", "Yes, about 35 grams of salt a litre.", "Tuesday."),
]


@pytest.fixture
def make(proxy, tmp_path):
    def make(template=TEMPLATES["hh"], base_url=proxy.url, **options):
        # The server is slow to fall over: what is refused is refused at once.
        server = ChatServer(REAL_MODEL, base_url, max_tokens=16, http_retries=0, timeout=300)
        return LlmJudge(server, template, **{"cache": tmp_path, "retries": 1, "concurrency": 2, **options})

    return make


def letters(proxy):
    """Question -> its last letter, read from what went over the wire."""
    found = {}
    for body, reply in proxy.served:
        text = json.loads(reply)["choices"][0]["message"]["content"]
        found[json.loads(body)["messages"][0]["content"]] = TEMPLATES["hh"].parse(text)
    return found


def test_verdicts_are_what_the_model_said(make, proxy):
    budget = Budget(1e6, 1e6)
    judge = make(budget=budget)
    estimate = judge.estimate(COMPARISONS)
    verdicts = judge(COMPARISONS)
    said, decided = letters(proxy), 0
    for comparison, verdict in zip(COMPARISONS, verdicts, strict=True):
        texts = (comparison.answer, comparison.baseline)
        orders = {TEMPLATES["hh"].render(comparison.prompt, *texts): "A"}
        orders |= {TEMPLATES["hh"].render(comparison.prompt, *texts[::-1]): "B"}
        asked = [(said[question], letter) for question, letter in orders.items() if question in said]
        if comparison.answer == comparison.baseline:
            assert verdict.win == 0.5 and not asked
            continue
        ((letter, answer_is),) = asked
        assert verdict.win == (None if letter is None else float(letter == answer_is))
        assert f"answer shown as {answer_is}" in verdict.note
        decided += letter is not None
    assert decided, verdicts
    usage = [json.loads(reply)["usage"] for _, reply in proxy.served]
    assert budget.spent == pytest.approx(sum(u["prompt_tokens"] + u["completion_tokens"] for u in usage))
    first = [u["prompt_tokens"] for (body, _), u in zip(proxy.served, usage, strict=True)
             if len(json.loads(body)["messages"]) == 1]  # fmt: skip
    assert estimate.calls == len(first) == 3
    assert 0.67 < estimate.tokens_in / sum(first) < 1.5
    assert proxy.peak == 2


def test_a_broken_run_costs_nothing_twice(make, proxy, tmp_path):
    proxy.faults = [0, 400, 400, 400]
    with pytest.raises(InputError, match="refuses the request"):
        make()(COMPARISONS)
    kept = len(proxy.served)
    assert kept >= 1
    proxy.faults = []
    verdicts = make()(COMPARISONS)
    keys = [json.loads(line)["key"] for line in (tmp_path / "replies.jsonl").read_text().splitlines()]
    assert len(keys) == len(set(keys)) == len(proxy.served) > kept
    proxy.shutdown()  # nobody answers any more
    proxy.server_close()
    assert make()(COMPARISONS) == verdicts


def test_a_model_that_breaks_the_format_stays_undecided(make, proxy, tmp_path, recorder):
    path = tmp_path / "own.txt"
    path.write_text("Count to twenty in words. (Do not mind these: {prompt} {a} {b})")
    verdicts = make(load_template(str(path)), console=recorder)(COMPARISONS[1:3])
    assert [verdict.win for verdict in verdicts] == [None, 0.5]
    assert len(proxy.served) == 2  # once, and once more
    assert recorder.lines[-1].endswith("1 of 2 comparisons undecided, as its replies name no letter")
    assert win_rate(verdicts).undecided == 1


def test_a_name_that_the_server_does_not_know(proxy):
    judge = LlmJudge(ChatServer("nothing", proxy.url, http_retries=0), TEMPLATES["hh"])
    with pytest.raises(InputError, match=r"refuses the request \(status 4\d\d\): .*check judge\.model 'nothing'"):
        judge(COMPARISONS)


def test_when_the_server_is_gone_kept_replies_still_judge(make, model_server):
    """The last test, as it ends the server."""
    address, process = model_server
    verdicts = make(base_url=address)(COMPARISONS[:1])
    process.terminate()
    process.wait(30)
    assert make(base_url=address)(COMPARISONS[:1]) == verdicts
    with pytest.raises(InputError, match="cannot be reached in one try"):
        make(base_url=address)(COMPARISONS)
