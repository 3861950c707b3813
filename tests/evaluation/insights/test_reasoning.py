"""What is measured of steps: policies whose rewards are exact find all false steps, those of others do not."""

from dataclasses import replace
from random import Random

import numpy as np
import pytest

from qstar_jax.config import DataOptions
from qstar_jax.errors import InputError
from qstar_jax.evaluation.insights.reasoning import (
    AUC,
    CEILING,
    DPO,
    ENTROPY,
    F1,
    OUTCOME,
    PRM,
    RANDOM,
    REFERENCE,
    SIZES,
    HeldOut,
    Reasoning,
    Sampled,
    best,
    measure_reasoning,
)
from qstar_jax.evaluation.scored import ScoredResponse
from qstar_jax.evaluation.step_marks import with_steps
from qstar_jax.tasks.tiny_sums.oracle import Oracle, prefix_success
from qstar_jax.tasks.tiny_sums.rows import split_rows
from qstar_jax.tasks.tiny_sums.solver import solve
from qstar_jax.tasks.tiny_sums.sums import DELIMITER, read_sum
from qstar_jax.tasks.tiny_sums.tokenizer import make_tokenizer

BETA = 0.2
TOKENIZER = make_tokenizer()
ORACLE = Oracle(TOKENIZER, BETA)


def scored(prompt, text, row, *, sign=1.0):
    """A solution with exact rewards, or rewards of the other sign, and what the solver knows of its tokens."""
    ids = [*TOKENIZER(text).input_ids, TOKENIZER.eos_token_id]
    rewards = sign * ORACLE.advantages(prompt, ids)
    pieces = TOKENIZER.convert_ids_to_tokens(ids)
    # The solver's own log-probabilities: those of the results of steps.
    places = np.array([piece == " =" for piece in pieces])
    ref_logp = np.where(np.roll(places, 1), -1.0, -0.01)
    zero = (0.0,) * len(ids)
    response = ScoredResponse(
        row=row,
        role="answer",
        prompt=prompt,
        pieces=tuple(pieces),
        token_ids=tuple(ids),
        logp=tuple(ref_logp + rewards / BETA),
        ref_logp=tuple(ref_logp),
        reward=tuple(rewards),
        q=zero,
        v=zero,
        truncated=False,
        beta=BETA,
        entropy=zero,
        endogenous=zero,
    )
    (found,) = with_steps([response], (), DataOptions(step_delimiter=DELIMITER), TOKENIZER.all_special_ids)
    return found


@pytest.fixture(scope="module")
def material():
    rows = split_rows("steps", 0, 160)
    solutions = [scored(row["prompt"], row["completion"], n) for n, row in enumerate(rows)]
    rng, prompts = Random(0), [row["prompt"] for row in rows[:6]]
    samples = [[scored(p, solve(read_sum(p), rng).text, n) for _ in range(SIZES[-1])] for n, p in enumerate(prompts)]
    right = [read_sum(prompt).write(read_sum(prompt).results) for prompt in prompts]
    sampled = Sampled(prompts, dict.fromkeys((PRM, DPO), samples), {"4 x 4 beams over steps": right}, 16)
    return HeldOut(rows, dict.fromkeys((PRM, DPO), solutions)), sampled


@pytest.fixture(scope="module")
def record(material, tmp_path_factory):
    out = tmp_path_factory.mktemp("reasoning")
    return measure_reasoning(*material, seed=0, trained_on={PRM: 64, DPO: 64}, out=out), out


def test_exact_rewards_find_false_steps_and_rank_values(record):
    measured, _ = record
    for name in (PRM, DPO, CEILING):
        assert measured.of(name).f1.mean > 0.9 and measured.of(name).auc.mean > 0.97
    assert measured.of(PRM).rank_correlation.mean == pytest.approx(1.0, abs=1e-4)  # sums may break ties
    assert measured.of(REFERENCE).auc.mean < 0.8 and measured.of(RANDOM).auc.mean == pytest.approx(0.5, abs=0.15)
    assert (
        measured.of(ENTROPY).auc.mean == pytest.approx(0.5) and measured.of(OUTCOME).f1.mean < measured.of(PRM).f1.mean
    )
    assert measured.solutions == 80
    assert set(measured.differences[F1]) == {
        f"{policy} - {control}" for policy in (PRM, DPO) for control in (REFERENCE, ENTROPY, OUTCOME, RANDOM)
    }
    difference = measured.of(PRM).auc.mean - measured.of(REFERENCE).auc.mean
    assert measured.differences[AUC][f"{PRM} - {REFERENCE}"].mean == pytest.approx(difference)


def test_the_best_by_exact_reward_is_right_where_one_is(record, material):
    measured, _ = record
    for total in ("sum", "min"):
        assert np.allclose(
            [one.mean for one in measured.selection[best(DPO, total)]],
            [one.mean for one in measured.selection["oracle"]],
            atol=1e-9 if total == "sum" else 0.1,
        )
    expected = np.mean([prefix_success(read_sum(prompt), "") for prompt in material[1].prompts])
    assert measured.selection["chance"][0].mean == pytest.approx(expected, abs=0.1)
    assert (
        next(one.method for one in measured.search) == "4 x 4 beams over steps"
        and measured.search[0].accuracy.mean == 1
    )


def test_the_verdict_follows_from_every_gain(record):
    measured, _ = record
    assert measured.finding().reproduced is True and "F1 of first errors" in measured.finding().measured
    gains = measured.differences[F1]
    name, gain = next(iter(gains.items()))
    undecided = replace(measured, differences=measured.differences | {F1: gains | {name: replace(gain, low=-0.1)}})
    assert undecided.finding().reproduced is None
    lost = replace(gain, mean=-0.2, low=-0.3, high=-0.1)
    refuted = replace(measured, differences=measured.differences | {F1: gains | {name: lost}})
    assert refuted.finding().reproduced is False


def test_rewards_of_the_other_sign_lose(material, tmp_path):
    held_out, sampled = material
    reverse = [scored(row["prompt"], row["completion"], n, sign=-1.0) for n, row in enumerate(held_out.rows)]
    held_out = replace(held_out, scored=held_out.scored | {DPO: reverse})
    measured = measure_reasoning(held_out, sampled, seed=0, trained_on={PRM: 64, DPO: 64}, out=tmp_path)
    assert measured.of(DPO).auc.mean < 0.1 and measured.finding().reproduced is False


def test_the_record_is_read_back(record, tmp_path):
    measured, out = record
    assert Reasoning.read(out) == measured
    with pytest.raises(InputError, match="--reasoning expects a folder that `qstar demo --insight reasoning` wrote"):
        Reasoning.read(tmp_path)
