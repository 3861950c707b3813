"""`qstar score --steps`: a tiny model whose steps end with the word w0."""

import json
import re

import numpy as np
import pytest

from qstar_jax.cli.main import main
from qstar_jax.evaluation.insights.steps import StepErrors
from qstar_jax.evaluation.scored import read_scores
from qstar_jax.evaluation.step_marks import REWARD
from qstar_jax.evaluation.steps import first_error

STEPS = ("--steps", "--data.step_delimiter", "w0", "--answers", "single")


def score(out, *words):
    return main(["score", "--out", str(out), "--alternatives", "0", *map(str, words)])


def row(number):
    """Three steps; in two of three rows one is wrong. Two rows have one prompt."""
    rng = np.random.default_rng(number)
    texts = [" ".join(f"w{word}" for word in rng.integers(1, 20, rng.integers(1, 4))) for _ in range(3)]
    steps = [f"{texts[0]} w0", f"{texts[1]} w0", texts[2]]
    wrong = number % 3 - 1 if number % 3 else -1
    marks = [] if wrong < 0 else [[len(" ".join(steps[:wrong])) + (wrong > 0), len(" ".join(steps[: wrong + 1]))]]
    return {
        "prompt": f"w{number // 2} w9",
        "completion": " ".join(steps),
        "parts": steps,
        "first": wrong,
        "all": [] if wrong < 0 else [wrong],
        "marks": marks,
    }


@pytest.fixture(scope="module")
def rows():
    return [row(number) for number in range(24)]


@pytest.fixture(scope="module")
def file(rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("steps") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def scored(dpo_run, file, tmp_path_factory, on_devices):
    out = tmp_path_factory.mktemp("steps") / "out"
    with on_devices(1):
        assert score(out, "--model", dpo_run, "--data.eval", file, *STEPS, "--wrong_step", "first", "--show", "2") == 0
    return out


def lines(out):
    return [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]


def test_steps_have_rewards_values_and_totals(scored, rows):
    errors = StepErrors.read(scored)
    for line, expected in zip(lines(scored), rows, strict=True):
        steps, rewards = line["steps"], [step["reward"] for step in line["steps"]]
        assert [step["text"].split() for step in steps[:2]] == [part.split() for part in expected["parts"][:2]]
        assert steps[2]["text"].split() == [*expected["parts"][2].split(), "[EOS]"]
        for step in steps:
            own = [r for r, s in zip(line["reward"], line["step"], strict=True) if s == step["step"]]
            assert step["actions"] == len(own) and step["reward"] == pytest.approx(sum(own))
        np.testing.assert_allclose([step["value"] for step in steps], np.cumsum(rewards))
        totals = {"sum": sum(rewards), "min": min(rewards), "mean": np.mean(rewards), "last": rewards[-1]}
        assert line["step_totals"] == pytest.approx(totals)
        assert totals["sum"] == pytest.approx(line["total_reward"])  # the outcome reward
        assert line["first_error"] == first_error(rewards, errors.detectors[REWARD].threshold)
    assert len({line["first_error"] for line in lines(scored)}) > 1


def test_endogenous_rewards_and_entropies_are_columns(scored, tiny_tokenizer):
    for line in lines(scored):
        following = [*line["v"][1:], 0.0]
        np.testing.assert_allclose(line["endogenous"], np.array(line["q"]) - following, atol=1e-5)
        assert all(0 < entropy <= np.log(len(tiny_tokenizer)) + 1e-4 for entropy in line["entropy"])
    response = read_scores(scored / "scores.jsonl")[0]
    assert response.to_json() == lines(scored)[0]


def test_the_record_says_how_well_errors_are_found(scored, rows):
    errors = StepErrors.read(scored)
    assert errors.questions + errors.calibration_questions == 12 and errors.questions == 6
    assert errors.steps == 3 * errors.responses and errors.wrong_steps == errors.erroneous
    # What else the trained policy says of steps is no control.
    assert list(errors.gains) == ["outcome reward", "lowest reference log-probability", "highest reference entropy"]
    assert set(errors.detectors) - set(errors.gains) == {"step reward", "value after the step", "endogenous reward"}
    assert (scored / "steps.png").stat().st_size > 1000


def test_the_page_shows_a_step_a_line(scored):
    page = (scored / "heatmap.html").read_text()
    assert page.count('role="listitem"') == 6 and page.count("the outcome reward") == 2
    suspected = sum(line["first_error"] >= 0 for line in lines(scored)[:2])
    assert page.count(">first suspected error<") == suspected


def test_listed_steps_threshold_and_calibration_change_what_is_found(
    scored, dpo_run, file, tmp_path, one_device_only, capsys
):
    words = ["--model", dpo_run, "--data.eval", file, "--steps", "--answers", "single", "--show", "1"]
    listed = ["--data.step_delimiter", "column:parts", "--wrong_step", "first"]
    assert score(tmp_path / "a", *words, *listed, "--threshold", "0.001", "--calibration", "0.75") == 0
    assert "first suspected error" in capsys.readouterr().out
    found = StepErrors.read(tmp_path / "a")
    assert [line["step"] for line in lines(tmp_path / "a")] == [line["step"] for line in lines(scored)]
    assert found.detectors[REWARD].threshold == 0.001 and found.given_threshold and found.calibration_questions == 9
    # Without truth: steps that lower the value are suspected, and nothing is measured.
    assert score(tmp_path / "b", *words, "--data.step_delimiter", "re:w0") == 0
    for line in lines(tmp_path / "b"):
        assert line["first_error"] == first_error([step["reward"] for step in line["steps"]], 0.0)
        assert line["entropy"] == []
    assert {path.name for path in (tmp_path / "b").iterdir()} == {
        "scores.jsonl", "scores.identity.json", "heatmap.html"
    }  # fmt: skip


def test_report_has_a_section(scored, tmp_path, capsys):
    assert main(["report", "--steps", str(scored), "--out", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "First errors" in page and "value after the step" in page and (tmp_path / "steps.png").exists()
    assert "F1 of first errors" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--wrong_step", "first", "--answers", "single"], "--wrong_step first has no effect without --steps"),
        (["--threshold", "0"], "--threshold 0.0 has no effect without --steps"),
        (["--data.step_delimiter", ";"], "--data.step_delimiter ; has no effect without --steps"),
        (["--steps", "--calibration", "0.3"], "--calibration 0.3 has no effect without --wrong_step"),
        ([*STEPS, "--wrong_step", "first", "--calibration", "1"], r"--calibration 1: expected a share in \(0, 1\)"),
        (["--steps", "--wrong_step", "first"], "expected --answers single"),
        (["--steps", "--data.step_delimiter", "re:("], "no regular expression"),
        (["--steps", "--threshold", ".nan"], "--threshold nan: expected a finite number"),
    ],
)
def test_what_has_no_effect_or_no_sense_is_refused(words, message, dpo_run, file, tmp_path, one_device_only, capsys):
    assert score(tmp_path / "out", "--model", dpo_run, "--data.eval", file, *words) == 2
    assert re.search(message, capsys.readouterr().err, re.DOTALL)
    assert not (tmp_path / "out").exists()
