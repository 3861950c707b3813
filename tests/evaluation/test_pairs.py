"""Pairs of samples and of their steps."""

import json
import math
import random
import re

import pytest

from qstar_jax.cli.main import main
from qstar_jax.config import DataOptions, PairsConfig
from qstar_jax.data.loading import make_dataset, read_records
from qstar_jax.errors import InputError
from qstar_jax.evaluation.pairs import Sample, below, marked_wrong, response_pairs, step_pairs, worst
from qstar_jax.evaluation.samples import read_samples
from qstar_jax.evaluation.scored import ScoredResponse
from qstar_jax.tasks.tiny_sums.solver import solve
from qstar_jax.tasks.tiny_sums.sums import draw_sum, true_reward
from qstar_jax.tasks.tiny_sums.tokenizer import make_tokenizer


def sample(row, steps, rewards=None, first_wrong=None, prompt="p ", total=None):
    rewards = rewards and tuple(map(float, rewards))
    return Sample(row, prompt, tuple(f"{step};" for step in steps.split()), rewards, first_wrong, total)


def texts(pairs):
    return [(row["prompt"], row["chosen"], row["rejected"]) for row in pairs.rows]


MARKED = [
    sample(0, "a b c", first_wrong=1),
    sample(1, "a B d", first_wrong=-1),  # right after the same step
    sample(2, "a x", first_wrong=1),  # wrong in another way
    sample(3, "a b d", first_wrong=1),  # wrong in the same way as the first
    sample(4, "z", first_wrong=0),
    sample(5, "a", first_wrong=-1),  # has ended where the others go on
    sample(6, "q b", first_wrong=1),  # nobody else began with q
    sample(7, "a b", first_wrong=1, prompt="other "),
]


def test_marked_steps_by_hand():
    pairs = step_pairs(MARKED, marked_wrong)
    assert texts(pairs) == [("p a;", "B;", "b;"), ("p a;", "B;", "x;"), ("p ", "a;", "z;")]
    assert [row["rows"] for row in pairs.rows] == [[1, 0], [1, 2], [1, 4]]
    assert [row["step"] for row in pairs.rows] == [1, 1, 0]
    assert pairs.unused == {
        "no step is wrong": 2,
        "another sample has failed in the same way": 1,
        "no other sample took another step there": 2,
    }
    assert len(pairs.rows) + pairs.unused.total() == len(MARKED)


def test_of_marked_steps_those_of_right_samples_are_chosen_first():
    wrong = sample(0, "a b", first_wrong=0)
    later = [sample(1, "c x", first_wrong=1), sample(2, "d e x", first_wrong=2), sample(3, "f e", first_wrong=-1)]
    for count, chosen in ((3, "f;"), (2, "d;"), (1, "c;")):
        assert step_pairs([wrong, *later[:count]], marked_wrong).rows[0]["chosen"] == chosen
    assert not step_pairs([wrong, sample(1, "c", first_wrong=0)], marked_wrong).rows


SCORED = [
    sample(0, "a b c", [1, -2, 5]),
    sample(1, "a B c", [1, 0.5, 0]),
    sample(2, "a C", [1, 0.7]),
    sample(3, "a C", [1, 0.7]),
    sample(4, "d", [1.5]),
]


def test_scored_steps_by_hand():
    # "a" earned less than "d", the only other first step; after "a", "b" is the worst. Each sample fails once.
    assert texts(step_pairs(SCORED, worst)) == [("p ", "d;", "a;")]
    assert texts(step_pairs(SCORED[:4], worst)) == [("p a;", "C;", "b;")]
    # Below 0 is "b" only; below 0.6 it is chosen among what is right: "C".
    assert texts(step_pairs(SCORED, below(0.0))) == [("p a;", "C;", "b;")]
    assert texts(step_pairs(SCORED, below(0.6))) == [("p a;", "C;", "b;"), ("p a;", "C;", "B;")]
    assert step_pairs(SCORED, below(0.0)).rows[0]["margin"] == pytest.approx(2.7)


def test_the_margin_leaves_close_pairs_out():
    assert len(step_pairs(SCORED, below(0.6), margin=0.3).rows) == 1
    pairs = step_pairs(SCORED, below(0.6), margin=3.0)
    assert not pairs.rows and pairs.unused["the rewards of the two steps are closer than the margin"] == 2


def test_equal_steps_are_not_worse_than_each_other():
    assert not step_pairs([sample(0, "a", [1]), sample(1, "b", [1])], worst).rows
    assert not step_pairs([sample(0, "a", [1]), sample(1, "a", [2])], worst).rows


@pytest.mark.parametrize("rule", [worst, below(0.0)])
def test_pairs_of_random_samples_are_what_they_say(rule):
    generator = random.Random(0)
    # The reward of a step is a function of the steps up to it, as for any model.
    rewards = {}
    samples = []
    for row in range(300):
        steps = tuple(generator.choice("abc") for _ in range(generator.randint(1, 4)))
        earned = tuple(rewards.setdefault(steps[: n + 1], generator.gauss(0, 1)) for n in range(len(steps)))
        samples.append(Sample(row, "p", steps, earned))
    pairs = step_pairs(samples, rule)
    assert len(pairs.rows) > 2 and len(pairs.rows) + pairs.unused.total() == len(samples)
    seen = {(row["prompt"], row["rejected"]) for row in pairs.rows}
    assert len(seen) == len(pairs.rows)
    taken = {sample.steps[: n + 1] for sample in samples for n in range(len(sample.steps))}
    for row in pairs.rows:
        before = tuple(row["prompt"][1:])
        chosen, rejected = (rewards[(*before, row[name])] for name in ("chosen", "rejected"))
        there = [rewards[(*before, step)] for step in "abc" if (*before, step) in taken]
        assert chosen == max(there) > rejected and (rejected < 0 or rule is worst)
        assert rule is not worst or rejected == min(there)


def test_whole_responses_by_hand():
    samples = [
        sample(0, "a", total=1.0),
        sample(1, "b", total=3.0),
        sample(2, "c", total=2.0),
        sample(3, "d", total=1.0, prompt="alone "),
        sample(4, "e", total=1.0, prompt="tied "),
        sample(5, "f", total=1.0, prompt="tied "),
        sample(6, "g", total=1.0, prompt="close "),
        sample(7, "h", total=1.1, prompt="close "),
    ]
    pairs = response_pairs(samples)
    assert texts(pairs) == [("p ", "b;", "a;"), ("close ", "h;", "g;")]
    assert pairs.unused == {"prompts with one sample": 1, "prompts all of whose samples are equally good": 1}
    assert "initial_reason_steps" not in pairs.rows[0]
    assert texts(response_pairs(samples, margin=0.5)) == [("p ", "b;", "a;")]


# A task whose steps are known, through files and the command line


@pytest.fixture(scope="module")
def solutions(tmp_path_factory):
    """A file of twelve solutions of each of forty sums of tiny-sums, some with slips."""
    generator, rows = random.Random(0), []
    for _ in range(40):
        asked = draw_sum(generator, held_out=False)
        for _ in range(12):
            solution = solve(asked, generator)
            row = {"prompt": asked.prompt, "completion": solution.text, "label": solution.is_right}
            rows.append(row | {"first_error": solution.first_error})
    path = tmp_path_factory.mktemp("solutions") / "solutions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs_of(file, out, *options):
    assert main(["pairs", "--samples", str(file), "--out", str(out), *options]) == 0
    rows = [json.loads(line) for line in (out / "pairs.jsonl").open()]
    summary = json.loads((out / "pairs.json").read_text())
    assert summary["pairs"] == len(rows)
    return rows, summary


def number(text):
    return int(text.replace(" ", ""))


def test_steps_of_sums_become_pairs_that_training_reads(solutions, tmp_path, capsys):
    steps = ["--steps", "--wrong_step", "first_error", "--step_delimiter", ";"]
    rows, summary = pairs_of(solutions, tmp_path / "out", *steps)
    assert summary["pairs"] + sum(summary["unused"].values()) == summary["samples"] == 480
    assert all(reason in capsys.readouterr().out for reason in list(summary["unused"])[:1])
    assert len(rows) > 60 and max(row["step"] for row in rows) > 1
    for row in rows:
        # Both add the same numbers, of which the first is what the step before came to; one result is their sum.
        (left, value), (same, other) = (row[name].strip(" ;").split("=") for name in ("chosen", "rejected"))
        first, sign, second = re.fullmatch(r"\s*([\d ]+?)\s*([+-])\s*([\d ]+?)\s*", left).groups()
        assert left == same and number(value) != number(other)
        assert number(value) == number(first) + (number(second) if sign == "+" else -number(second))
        assert row["step"] == 0 or number(row["prompt"].strip(" ;").split("=")[-1]) == number(first)
    # Training sees the tokens of the whole solutions, and adds no EOS.
    options, tokenizer = DataOptions(), make_tokenizer()
    _, records, dropped = read_records(str(tmp_path / "out" / "pairs.jsonl"), "train", "preferences", options)
    dataset = make_dataset(records, dropped, "pairs", tokenizer, options, eos_ids=(tokenizer.eos_token_id,))
    assert not dataset.dropped and len(dataset.examples) == len(rows)
    for row, example in zip(rows, dataset.examples, strict=True):
        for name, response in zip(("chosen", "rejected"), example.responses, strict=True):
            whole = tokenizer(row["prompt"] + row[name])["input_ids"]
            assert [*example.prompt, *response.ids] == [token for token in whole if token != tokenizer.eos_token_id]


def test_solutions_become_pairs_of_right_and_wrong(solutions, tmp_path):
    rows, summary = pairs_of(solutions, tmp_path / "out")
    assert summary["pairs"] + sum(summary["unused"].values()) == 40 and len(rows) > 20
    for row in rows:
        assert true_reward(row["prompt"], row["chosen"]) == 1 and true_reward(row["prompt"], row["rejected"]) == 0
        assert row["margin"] == 1


def test_no_pair_is_an_error_that_says_why(write, tmp_path, capsys):
    file = write([ROW], "rows.jsonl")
    assert main(["pairs", "--samples", file, "--out", str(tmp_path / "out")]) == 2
    assert "no pair can be made of its 1 samples" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# Files


def scored_line(row, prompt, texts, rewards, **more):
    """A line of `qstar score --steps`: two tokens a step, EOS in the last."""
    pieces = [piece for text in texts for piece in (f" {text}", " ;")] + ["</s>"]
    step = [n for n in range(len(texts)) for _ in range(2)] + [len(texts) - 1]
    earned = [part for reward in rewards for part in (reward, 0.0)] + [0.0]
    numbers = {name: tuple(earned) for name in ("logp", "ref_logp", "reward", "q", "v")}
    scored = ScoredResponse(
        row, "answer", prompt, tuple(pieces), (1,) * len(pieces), **numbers, truncated=False, beta=1.0, step=tuple(step)
    )
    return scored.to_json() | more


@pytest.fixture
def write(tmp_path):
    def write(lines, name="scores.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return str(path)

    return write


def test_scores_become_samples_without_their_eos(write, tmp_path):
    lines = [
        scored_line(0, "p", ["a", "b"], [1.0, 2.0]),
        scored_line(1, "p", ["a"], [1.0], truncated=True),
        scored_line(2, "p", ["a"], [1.0], prompt_truncated=True),
        scored_line(3, "p", ["a"], [1.0], action_mask=[True, False, True]),
        {"row": 4, "reason": "too long"},
    ]
    config = PairsConfig(samples=write(lines), out="o", steps=True)
    samples, dropped = read_samples(config)
    assert samples == [Sample(0, "p", (" a ;", " b ;"), (1.0, 2.0), total=3.0)]
    assert dropped.total() == 4 and dropped["not scored"] == 1
    assert read_samples(PairsConfig(samples=str(tmp_path), out="o"))[0] == [Sample(0, "p", (" a ; b ;",), total=3.0)]


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        (
            [scored_line(0, "p", ["a"], [1.0]) | {"step": [], "steps": None}],
            {"steps": True},
            "line 1: it has no steps; score the file",
        ),
        ([{"row": 0}], {}, r"line 1: not a line of `qstar score` \(no 'reason'\)"),
        ([scored_line(0, "p", ["a"], [1.0], total_reward=math.nan)], {}, "line 1: .*found the number NaN"),
        ([scored_line(0, "p", ["a"], [math.inf])], {"steps": True}, "line 1: .*found the number Infinity"),
        (
            [scored_line(0, "p", ["a"], [1.0], total_reward="much")],
            {},
            "line 1: .*total_reward is 'much'; expected a number",
        ),
        ([{"row": 0, "reason": "x"}], {}, r"no sample can be used \(1 not scored\)"),
        ([], {"threshold": 0.0}, "--threshold 0.0 has no effect without --steps"),
        ([], {"threshold": float("nan"), "steps": True}, "--threshold is nan; expected a number"),
        ([], {"wrong_step": "w", "steps": True}, "--wrong_step w has no effect"),
        ([], {"reward": "r"}, "--reward r has no effect"),
        ([], {"label": "r"}, "--label r has no effect on scores.jsonl"),
        ([], {"prompt": "q"}, "--prompt q has no effect on scores.jsonl"),
        ([], {"step_delimiter": ";", "steps": True}, "--step_delimiter ; has no effect on scores.jsonl"),
        ([], {"margin": -1.0}, r"--margin is -1\.0; expected a number in \[0, inf\)"),
        ([], {"margin": float("nan")}, "--margin is nan"),
    ],
)
def test_scores_that_cannot_be_used_are_refused(lines, options, message, write):
    with pytest.raises(InputError, match=message):
        read_samples(PairsConfig(samples=write(lines), out="o", **options))


NOT_FINITE = (float("nan"), float("inf"), -float("inf"), 1e39, 10**400)  # in float32, with which training computes
ROW = {"prompt": "p", "completion": "a\nb", "label": True, "n": 0.5, "w": 1}


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        (ROW, {"steps": True}, "so it must say which steps are wrong; name the column with --wrong_step"),
        (ROW | {"w": 2}, {"steps": True, "wrong_step": "w"}, "row 1, column 'w': found 2; .* first wrong of 2 steps"),
        (ROW | {"w": True}, {"steps": True, "wrong_step": "w"}, "found True"),
        (ROW, {"steps": True, "wrong_step": "x"}, "no column 'x' .*; name yours with --wrong_step"),
        (ROW, {"wrong_step": "w"}, "--wrong_step w has no effect"),
        (ROW, {"margin": 1.0}, "--margin 1.0 has no effect"),
        (ROW, {"threshold": 1.0}, "--threshold 1.0 has no effect"),
        (ROW, {"step_delimiter": ";"}, "--step_delimiter ; has no effect without --steps"),
        (ROW, {"steps": True, "wrong_step": "w", "reward": "n"}, "--reward n has no effect with --steps"),
        (ROW, {"steps": True, "wrong_step": "w", "label": "n"}, "--label n has no effect with --steps"),
        (ROW, {"reward": "n", "label": "w"}, "--label w has no effect beside --reward n"),
        (ROW, {"steps": True, "wrong_step": "w", "step_delimiter": "re:("}, r"^--step_delimiter 're:\(': no regular"),
        (ROW, {"reward": "r"}, "row 1: no column 'r'"),
        *(
            (ROW | {"n": value}, {"reward": "n"}, "row 1: column 'n' .*found .*; expected a number from -3.4e")
            for value in (*NOT_FINITE, "nan", "five", "", None, [1])
        ),
        *(
            (ROW | {"label": value}, {}, "row 1: column 'label' .*found .*; expected true or false, .* with --reward")
            for value in (*NOT_FINITE, 1.0000001, "nan", "", None, [1])
        ),
        *(
            (ROW | {"w": value}, {"steps": True, "wrong_step": "w"}, "row 1, column 'w': found .* of the first wrong")
            for value in (*NOT_FINITE, 0.5, "first", "", None, [1])
        ),
        (ROW | {"prompt": [1]}, {}, "column 'prompt': found list; expected a text"),
    ],
)
def test_rows_that_cannot_be_used_are_refused(row, options, message, write):
    with pytest.raises(InputError, match=message):
        read_samples(PairsConfig(samples=write([row], "rows.jsonl"), out="o", **options))


def test_rows_become_samples(write):
    file = write([ROW, ROW | {"label": False}], "rows.jsonl")
    assert [one.total for one in read_samples(PairsConfig(samples=file, out="o"))[0]] == [1.0, 0.0]
    assert read_samples(PairsConfig(samples=file, out="o", reward="n"))[0][0].total == 0.5
    config = PairsConfig(samples=file, out="o", steps=True, wrong_step="w")
    assert read_samples(config)[0][0] == Sample(0, "p", ("a\n", "b"), first_wrong=1)


@pytest.mark.parametrize(("suffix", "separator"), [("csv", ","), ("tsv", "\t")])
def test_numbers_of_tables_are_read_though_they_are_text(suffix, separator, tmp_path):
    lines = ["prompt completion n label w".split(), ["p", "a;b", "0.5", "true", "1"], ["p", "c", "-1e-3", "0", "-1.0"]]
    file = tmp_path / f"rows.{suffix}"
    file.write_text("".join(separator.join(line) + "\n" for line in lines))
    assert [one.total for one in read_samples(PairsConfig(str(file), "o", reward="n"))[0]] == [0.5, -0.001]
    assert [one.total for one in read_samples(PairsConfig(str(file), "o"))[0]] == [1.0, 0.0]
    config = PairsConfig(str(file), "o", steps=True, wrong_step="w", step_delimiter=";")
    assert [one.first_wrong for one in read_samples(config)[0]] == [1, -1]
