import json
import os
import signal
from contextlib import nullcontext

import numpy as np
import pytest

from qstar_jax.cli.main import main
from qstar_jax.config import DataOptions, SelectConfig
from qstar_jax.decoding.generations_file import read_generations
from qstar_jax.errors import InputError
from qstar_jax.evaluation.selecting import check_options
from qstar_jax.interruption import TEMPORARY

pytestmark = pytest.mark.usefixtures("one_device_only")

WORDS = [f"w{i}" for i in range(1, 9)]


def select(out, *words):
    return main(["select", "--out", str(out), "--batch_size", "6", *map(str, words)])


def record(out):
    return json.loads((out / "selection.json").read_text())


def responses(out):
    return [json.loads(line) for line in (out / "responses.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Six questions with three responses each, in columns of their own names; the answer is the last number."""
    rng, rows = np.random.default_rng(0), []
    for q in range(6):
        right = int(rng.integers(1, 4))
        for _ in range(3):
            answer, words = int(rng.integers(1, 4)), " ".join(rng.choice(WORDS, rng.integers(1, 4)))
            row = {"question": f"w{10 + q} w1", "solution": f"{words} w9 w{answer}", "answer": f"so #### {right}.0"}
            rows.append(row | {"is_correct": answer == right})
    rows[4]["is_correct"] = not rows[4]["is_correct"]  # a wrong label
    path = tmp_path_factory.mktemp("select") / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


COLUMNS = ("--data.prompt", "question", "--data.completion", "solution", "--data.label", "is_correct")


@pytest.fixture(scope="module")
def selected(questions, dpo_run, tmp_path_factory, on_devices):
    """The responses of the file, scored by the run, with w9 after each step."""
    out = tmp_path_factory.mktemp("select") / "out"
    words = ["--data.eval", questions, *COLUMNS, "--right", "answer", "--final_answer", "number", "--model", dpo_run]
    with on_devices(1):
        assert select(out, *words, "--data.step_delimiter", "w9") == 0
    return out


def test_stored_responses_are_scored_and_selected(selected, questions, dpo_run, tmp_path):
    found, lines = record(selected), responses(selected)
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    assert (found["questions"], found["responses"], found["sizes"], found["beta"]) == (6, 18, [1, 2], 0.3)
    assert found["disagreements"] == 1  # with the wrong label
    assert [line["correct"] for line in lines] == [row["solution"][-1] == row["answer"][8] for row in rows]
    assert [line["answer"] for line in lines] == [row["solution"][-1] for row in rows]
    scores = ("sum", "min", "mean", "last", "log pi_ref")
    ways = [f"{how} by {score}" for how in ("best", "vote") for score in scores]
    assert set(found["methods"]) == {"chance", "majority", *ways, "oracle"}
    assert (selected / "selection.png").stat().st_size > 1000
    # The scores are those of `qstar score`, and its file can stand for the model.
    words = ["--data.eval", questions, *COLUMNS, "--steps", "--data.step_delimiter", "w9"]
    scored = tmp_path / "scored"
    assert main(["score", "--out", str(scored), "--model", str(dpo_run), "--answers", "single", *map(str, words)]) == 0
    totals = [json.loads(line)["total_reward"] for line in (scored / "scores.jsonl").read_text().splitlines()]
    np.testing.assert_allclose([line["scores"]["sum"] for line in lines], totals, atol=1e-5)
    assert any(line["scores"]["min"] < line["scores"]["sum"] - 1e-6 for line in lines)
    words = ["--data.eval", questions, *COLUMNS, "--right", "answer", "--final_answer", "number", "--scores", scored]
    assert select(tmp_path / "from_scores", *words) == 0
    again = record(tmp_path / "from_scores")
    for name in ("majority", "best by sum", "vote by min", "best by log pi_ref"):
        for one, other in zip(again["methods"][name], found["methods"][name], strict=True):
            assert one == pytest.approx(other, abs=1e-6)


def test_options_change_the_result(selected, questions, tmp_path, capsys):
    base = ["--data.eval", questions, *COLUMNS]
    assert select(tmp_path / "labels", *base, "--final_answer", "number") == 0
    labels = record(tmp_path / "labels")
    assert labels["model"] is labels["beta"] is None and list(labels["methods"]) == ["chance", "majority", "oracle"]
    assert labels["disagreements"] == 0 and labels["right"] != record(selected)["right"]
    assert "without a final answer" in capsys.readouterr().out
    words = [*base, "--final_answer", "pattern", "--pattern", "w9 (w[12])", "--sizes", "[3]"]
    assert select(tmp_path / "pattern", *words) == 0
    pattern = record(tmp_path / "pattern")
    assert pattern["sizes"] == [3] and pattern["unanswered"] > 0
    assert {line["answer"] for line in responses(tmp_path / "pattern")} == {"w1", "w2", None}


def test_sigterm_while_responses_are_scored(questions, dpo_run, tmp_path, monkeypatch, capsys):
    def signalled(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the command went on")

    words = ["--data.eval", questions, *COLUMNS, "--right", "answer", "--final_answer", "number", "--model", dpo_run]
    monkeypatch.setattr("qstar_jax.evaluation.selecting.score_responses", signalled)
    assert select(tmp_path / "out", *words) == TEMPORARY
    said = f"qstar select: stopped; go on with\nqstar select --out {tmp_path / 'out'} "
    assert capsys.readouterr().err.startswith(said)


@pytest.mark.slow
def test_fresh_samples_and_step_searches_are_kept_and_continued(questions, dpo_run, tmp_path, capsys):
    words = ["--data.eval", questions, *COLUMNS, "--right", "answer", "--final_answer", "number", "--model", dpo_run]
    words += ["--samples", "8", "--max_new_tokens", "6", "--step_beams", "[1,2]", "--step_samples", "2"]
    words += ["--step_length", "2", "--step_ends", "[w3]"]
    assert select(tmp_path / "out", *words) == 0
    found, lines = record(tmp_path / "out"), responses(tmp_path / "out")
    samples = read_generations(tmp_path / "out" / "samples")
    kept = [line for line in samples if line["finish"] != "dropped"]
    assert found["questions"] == 6 and found["sizes"] == [1, 2, 4, 8] and len(kept) == len(lines) == 48
    for search, beams in zip(found["search"], (1, 2), strict=True):
        records = read_generations(tmp_path / "out" / f"step-beams-{beams}")
        drawn = [line["drawn"] for line in records if line["finish"] != "dropped"]
        assert search["tokens"] == pytest.approx(np.mean(drawn)) and max(drawn) <= 6 * beams * 2
        mean_length = sum(line["length"] for line in kept) / 8
        assert search["equal_samples"] == pytest.approx(sum(drawn) / mean_length)
        assert (beams, 2) == (search["beams"], search["samples"])
    # The same command samples nothing again; the reference writes other responses, which the policy judges.
    before = (tmp_path / "out" / "samples" / "generations.jsonl").stat().st_mtime_ns
    assert select(tmp_path / "out", *words) == 0 and record(tmp_path / "out") == found
    assert (tmp_path / "out" / "samples" / "generations.jsonl").stat().st_mtime_ns == before
    assert select(tmp_path / "out", *words, "--sampler", "reference") == 2
    assert "holds responses with sampler 'policy', and it is 'reference' now" in capsys.readouterr().err
    assert select(tmp_path / "reference", *words, "--sampler", "reference") == 0
    assert responses(tmp_path / "reference") != lines
    # What was generated is read back, with the scores of the model and without.
    words = ["--data.eval", questions, *COLUMNS[:2], "--right", "answer", "--final_answer", "number"]
    words += ["--generations", tmp_path / "out" / "samples"]
    assert select(tmp_path / "read", *words, "--model", dpo_run) == 0
    assert record(tmp_path / "read")["methods"] == found["methods"]
    assert select(tmp_path / "plain", *words) == 0
    assert record(tmp_path / "plain")["methods"]["majority"] == found["methods"]["majority"]
    assert "best by log pi" in record(tmp_path / "plain")["methods"]


def test_a_selection_is_a_section_of_the_report(selected, tmp_path):
    assert main(["report", "--selection", str(selected), "--out", str(tmp_path / "page")]) == 0
    page = (tmp_path / "page" / "report.html").read_text()
    assert "Selecting among N responses" in page and "best by min" in page
    assert json.loads((tmp_path / "page" / "summary.json").read_text())["selection"] == record(selected)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--data.eval is missing"),
        (["--data.eval", "{file}", "--samples", "4"], "--samples 4 has no effect without --model"),
        (["--data.eval", "{file}", "--temperature", "0.5"], "--temperature 0.5 has no effect without --samples"),
        (["--data.eval", "{file}", "--beta", "0.5"], "--beta 0.5 has no effect without --model"),
        (["--data.eval", "{file}", "--model", "{run}", "--scores", "s"], "--scores s holds the scores already"),
        (["--data.eval", "{file}", "--generations", "g", "--scores", "s"], "two sources"),
        (["--data.eval", "{file}", "--pattern", "A: (.+)"], "--pattern and --final_answer pattern belong together"),
        (["--data.eval", "{file}", "--final_answer", "pattern", "--pattern", "x"], "has 0 groups"),
        (["--data.eval", "{file}", "--subsets", "0"], "--subsets is 0; expected a number in [1, inf)"),
        (["--data.eval", "{file}", "--model", "{run}", "--samples", "2"], "--right is missing"),
        (
            ["--data.eval", "{file}", "--model", "{run}", "--samples", "2", "--right", "a", "--sizes", "[1,4]"],
            "the largest of --sizes",
        ),
        (["--data.eval", "{file}"], "no column 'completion'"),
        (["--data.eval", "{file}", *COLUMNS[:4]], "no column 'label'"),
        (["--data.eval", "{file}", *COLUMNS], "no response has a final answer by --final_answer marked"),
        (["--data.eval", "{file}", *COLUMNS, "--right", "key"], "column 'key' is missing"),
        (["--data.eval", "{file}", *COLUMNS, "--final_answer", "number", "--sizes", "[4]"], "from 1 to 3"),
        (["--data.eval", "{file}", *COLUMNS, "--scores", "nowhere"], "no such file"),
        (["--data.eval", "{file}", *COLUMNS, "--right", "answer", "--generations", "nowhere"], "no such file"),
        (
            ["--data.eval", "{file}", "--model", "{run}", "--samples", "2", "--right", "a", "--max_new_tokens", "0"],
            "decode: ",
        ),
    ],
)
def test_bad_input_is_told(words, message, questions, dpo_run, tmp_path, capsys):
    words = [word.format(file=questions, run=dpo_run) for word in words]
    assert select(tmp_path / "out", *words) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, r"--seed is -1; expected a number in \[0, 9e18\]"),
        ({"model": "m", "beta": float("nan")}, r"--beta is nan; expected a number in \(0, inf\)"),
        ({"batch_size": 0}, "--batch_size is 0"),
        ({"weight": "identity"}, "--weight identity has no effect without scores"),
        ({"delimiter": ";"}, r"--data\.step_delimiter ; has no effect without --model"),
        ({"delimiter": ";", "scores": "s"}, r"--data\.step_delimiter ; has no effect without --model"),
        ({"delimiter": ";", "model": "m"}, None),
        ({"weight": "identity", "scores": "s"}, None),
        ({"weight": "identity", "generations": "g"}, None),
    ],
)
def test_options_out_of_range_or_without_effect_are_refused(changes, message):
    options = {name: value for name, value in changes.items() if name != "delimiter"}
    data = DataOptions(eval="rows.jsonl", step_delimiter=changes.get("delimiter", DataOptions().step_delimiter))
    expected = nullcontext() if message is None else pytest.raises(InputError, match=message)
    with expected:
        check_options(SelectConfig(out="o", data=data, **options))


def test_generations_of_another_tokenizer_or_file_are_refused(questions, dpo_run, tmp_path, capsys):
    out = tmp_path / "g"
    words = ["--data.eval", questions, "--data.prompt", "question", "--model", dpo_run]
    sampling = ["--decode.method", "sample", "--decode.max_new_tokens", "3", "--data.max_eval_rows", "2"]
    assert main(["generate", "--out", str(out), *map(str, words), *sampling]) == 0
    other = tmp_path / "other.jsonl"
    other.write_text(questions.read_text().replace("w10 w1", "w20 w2"))
    words = ["--data.eval", other, "--data.prompt", "question", "--model", dpo_run, "--right", "answer"]
    capsys.readouterr()
    assert select(tmp_path / "out", *words, "--final_answer", "number", "--generations", out) == 2
    assert "responds to '[BOS] w10 w1', and the model reads '[BOS] w20 w2'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["reward", "logp"])
def test_generations_of_which_some_lack_a_score_are_refused(name, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "p", "answer": "1"}\n')
    record = {"row": 0, "answers": 2, "prompt": "p", "text": "# 1", "tokens": [5], "length": 1, "finish": "eos"}
    records = [record | {"rank": rank, "logp": -1.0, "reward": 0.5, "drawn": 1} for rank in range(2)]
    records[1][name] = None
    (tmp_path / "generations.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    words = ["--data.eval", tmp_path / "rows.jsonl", "--right", "answer", "--generations", tmp_path]
    assert select(tmp_path / "out", *words) == 2 and not (tmp_path / "out").exists()
    assert "row 0 of the generations: its response of rank 1" in capsys.readouterr().err
