"""Beams of a real model against torch transformers' `generate`: QSTAR_REAL_MODEL names the model's folder.

A few combinations by default. The whole grid, about an hour on two cores, runs with QSTAR_FULL_PARITY=1 and
QSTAR_REAL_PROMPTS=FILE; or by `beam_parity.py` itself. QSTAR_PARITY_REPORT names a file for the report.
"""

import json
import os
from pathlib import Path

import pytest

FOLDER = os.environ.get("QSTAR_REAL_MODEL", "")
PROMPTS = os.environ.get("QSTAR_REAL_PROMPTS", "")
FULL = os.environ.get("QSTAR_FULL_PARITY", "") == "1"
needs_model = [
    pytest.mark.real,
    pytest.mark.skipif(not FOLDER, reason="QSTAR_REAL_MODEL names no folder of a real model"),
]
pytestmark = pytest.mark.parity

QUESTIONS = [
    "Name three animals that can fly.",
    "What is the capital of Australia, and why is it not Sydney?",
    "Write a short poem about a kettle that is afraid of tea.",
    "I have a job interview tomorrow, and I am nervous. What should I do tonight so that I sleep well?",
]


@pytest.fixture(scope="module")
def folder(beam_parity):
    assert Path(FOLDER).is_dir(), f"QSTAR_REAL_MODEL={FOLDER} is no folder"
    return beam_parity.Folder(FOLDER)


def check(beam_parity, reports, tmp_path, record):
    path = Path(os.environ.get("QSTAR_PARITY_REPORT") or tmp_path / "parity.jsonl")
    path.write_text("".join(json.dumps(report) + "\n" for report in reports))
    summary = beam_parity.summary(reports)
    print(f"\n{summary}\n{path}")
    record("parity", summary)
    assert all(map(beam_parity.agrees, reports)), summary


@pytest.mark.slow
@pytest.mark.skipif(FULL, reason="the whole grid runs")
class TestSome:
    pytestmark = needs_model

    @pytest.fixture(scope="class")
    def prompts(self, folder, tmp_path_factory):
        path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
        path.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in QUESTIONS))
        found = folder.prompts(str(path), len(QUESTIONS), 96)
        assert len({len(prompt) for prompt in found}) > 2
        return found

    def test_hypotheses_are_those_of_torch(self, beam_parity, folder, prompts, tmp_path, record_property):
        # Answers rarely end within so few tokens; full stops and commas that end them make all rules count.
        ends = tuple(folder.ours[0].tokenizer.convert_tokens_to_ids([".", ","]))
        combinations = [(1, 0.0, False), (2, 0.0, True), (5, 1.0, False)]
        reports = list(
            beam_parity.grid(folder, prompts, 16, combinations=combinations, eos_ids=(*folder.eos_ids, *ends))
        )
        assert sum(report["ended"] for report in reports) > 4
        check(beam_parity, reports, tmp_path, record_property)


@pytest.mark.skipif(not FULL, reason="QSTAR_FULL_PARITY is not 1")
class TestAll:
    pytestmark = needs_model

    def test_hypotheses_are_those_of_torch(self, beam_parity, folder, tmp_path, record_property):
        assert PROMPTS, "the whole grid needs real prompts: set QSTAR_REAL_PROMPTS to a file"
        reports = list(beam_parity.grid(folder, folder.prompts(PROMPTS, 20, 96), 48))
        check(beam_parity, reports, tmp_path, record_property)


GOOD, BETTER = ([5, 6], -1.0), ([5, 7], -0.5)


@pytest.mark.parametrize(
    ("theirs", "narrowest", "expected"),
    [
        ([BETTER, GOOD], 1.0, []),
        ([GOOD, BETTER], 1.0, [False, False]),  # one that is worse by half a nat stands first: no tie
        ([([5, 8], -0.50005), GOOD], 1.0, [True]),  # another one that is as good
        ([([5, 8], -0.4), GOOD], 1.0, [False]),
        ([([5, 8], -0.4), GOOD], 0.00005, [True]),  # its beginning tied with one that was kept
    ],
)
def test_only_ties_are_excused(theirs, narrowest, expected, beam_parity):
    found = beam_parity.differences([[BETTER, GOOD]], [theirs], [narrowest])
    assert [difference["tied"] for difference in found] == expected


def test_a_report_with_other_scores_or_tokens_does_not_agree(beam_parity):
    good = {"hypotheses": 2, "equal": 2, "ended": 1, "score_difference": 5e-5, "differences": []}
    good["score_difference_as_given"] = 3e-4
    tie = good | {"equal": 1, "differences": [{"tied": True}]}
    other = good | {"equal": 1, "differences": [{"tied": False}]}
    far = good | {"score_difference": 2e-4}
    assert [beam_parity.agrees(report) for report in (good, tie, other, far)] == [True, True, False, False]
    assert beam_parity.summary([good, tie, other, far]).count("disagreement") == 2
