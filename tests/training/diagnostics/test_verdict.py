import math
import re

import pytest

from qstar_jax.training.diagnostics.verdict import Evidence, collect, decide, sentence

PLAIN = {
    "chosen": -0.4,
    "chosen_error": 0.02,
    "chosen_length": 50.0,
    "expected": -0.4,
    "expected_error": 0.04,
    "expected_length": 50.0,
    "samples": 16,
    "beta": 0.1,
    "held_out": True,
}


def evidence(**changes):
    return Evidence(**{**PLAIN, **changes})


@pytest.mark.parametrize(
    ("changes", "case"),
    [
        ({"chosen": 0.3}, "rose"),
        ({"chosen": 0.041}, "rose"),
        ({"chosen": 0.039}, "unmoved"),
        ({"chosen": -0.039}, "unmoved"),
        ({"chosen": -5.0, "chosen_error": math.inf}, "unmoved"),  # of a single pair
        ({}, "ordinary"),
        ({"chosen": -0.2}, "ordinary"),
        ({"chosen": -0.6}, "ordinary"),  # 2 * 0.4 - 0.6 = 0.2; noise 2 * hypot(0.02, 0.08) = 0.165
        ({"chosen": -0.66}, "unsure"),
        ({"chosen": -0.95}, "unsure"),
        ({"chosen": -0.98}, "displaced"),
        ({"expected_error": 0.4}, "unsure"),  # too few samples
        ({"expected": 0.1, "expected_error": 0.01}, "displaced"),  # an expectation above 0 is noise, and counts as 0
        ({"chosen": -0.09, "expected": -1e-4, "expected_error": 1e-5}, "slight"),  # less than a nat
        ({"chosen": -0.09, "chosen_error": 0.04, "expected": -0.06, "expected_error": 0.03}, "slight"),
        ({"chosen": -0.11, "expected": -1e-4, "expected_error": 1e-5}, "displaced"),
        ({"chosen": -0.09, "beta": 0.05, "expected": -1e-4, "expected_error": 1e-5}, "displaced"),
        # Samples of half the length have half of the fall, and half of its error.
        ({"chosen": -1.2, "chosen_length": 100.0}, "ordinary"),
        ({"chosen": -1.2, "chosen_length": 100.0, "expected_error": 0.08}, "unsure"),
        ({"chosen_length": 10.0}, "displaced"),
    ],
    ids=str,
)
def test_every_case(changes, case):
    assert decide(evidence(**changes)) == case


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"chosen": 0.3}, "rose to +0.300 +- 0.020 on held-out pairs.*-0.400 +- 0.040"),
        ({"chosen": 0.002}, "are +0.002 +- 0.020.*no further from 0 than noise"),
        ({}, "fell to -0.400 +- 0.020 on held-out pairs, which is ordinary.*-0.400 +- 0.040.*Eq. 16"),
        ({"chosen": -0.09, "expected": -1e-4, "expected_error": 1e-5}, "little: they are 0.41 times as likely"),
        ({"chosen": -2.0}, "more than 2 times the -0.400.*learning_rate.*loss.beta.*dpop.*sft"),
        ({"expected_error": 0.4, "held_out": False}, "on training pairs at the end.*noise hides.*reference_samples"),
        ({"chosen_length": 100.0}, "-0.800 +- 0.080.*16 samples of the reference, scaled from 50 to 100 tokens"),
    ],
    ids=str,
)
def test_the_sentence_has_the_figures_and_what_to_do(changes, words):
    text = sentence(evidence(**changes))
    pattern = re.escape(words).replace(r"\.\*", ".*")
    assert text.isascii() and "\n" not in text and re.search(pattern, text), text


def test_verdicts_on_what_other_losses_prefer():
    summary = {f"rewards/{name}": -1.0 for name in ("place_1", "completion")} | {
        f"lengths/{name}": length for name, length in (("place_1", 3.0), ("completion", 4.0))
    }
    summary |= {"eval_rewards/reference_expected": -0.1, "eval_rewards/reference_expected_stderr": 0.001}
    figures = {"samples": 16, "length": 3.0, "beta": 0.1}
    best = collect(summary | {"rewards/place_1_stderr": 0.01}, **figures, kind="rankings")
    assert (best.chosen_length, best.chosen_error) == (3.0, 0.01)
    text = sentence(best)
    assert text.startswith("rewards of the best responses fell to -1.000") and "on training rankings" in text
    assert "optimizer.learning_rate or a higher loss.beta usually helps" in text and "dpop" not in text
    assert collect(summary, **figures, kind="returns").chosen_length == 4.0
    assert collect(summary, **figures, kind="labels") is None  # no desirable response among the last ones


def test_held_out_pairs_come_before_those_of_training():
    summary = {
        "rewards/chosen": -1.0,
        "rewards/chosen_stderr": 0.1,
        "lengths/chosen": 7.0,
        "eval_rewards/reference_expected": -0.5,
        "eval_rewards/reference_expected_stderr": 0.05,
    }
    collected = collect(summary, samples=16, length=5.0, beta=0.1)
    assert collected == Evidence(-1.0, 0.1, 7.0, -0.5, 0.05, 5.0, 16, 0.1, False)
    held_out = {"eval_rewards/chosen": -2.0, "eval_lengths/chosen": 9.0}  # one row: no standard error
    collected = collect(summary | held_out, samples=16, length=5.0, beta=0.1)
    assert collected == Evidence(-2.0, math.inf, 9.0, -0.5, 0.05, 5.0, 16, 0.1, True)


def test_segments_have_an_exact_expectation_and_other_remedies():
    exact = {"chosen_length": 8.0, "expected": -1.0, "expected_error": 0.07, "expected_length": 8.0}
    exact |= {"chosen_error": 0.07, "samples": 200, "kind": "segments"}
    text = sentence(evidence(chosen=-0.67, **exact))
    assert "rewards of chosen segments fell to -0.670" in text and "ordinary" in text
    assert text.endswith("(exact KL at the states of 200 held-out segments)")
    displaced = sentence(evidence(chosen=-4.0, **exact))
    assert "or a higher loss.beta usually helps" in displaced and "dpop" not in displaced
    unsure = sentence(evidence(chosen=-2.0, **exact))
    assert "reference_samples" not in unsure and "more evaluation pairs would tell" in unsure
