"""Exact values of prefixes, against the enumeration of all solutions."""

from itertools import product

import numpy as np
import pytest

from qstar_jax import tasks
from qstar_jax.tasks.tiny_sums.oracle import Oracle, prefix_success, soft_value
from qstar_jax.tasks.tiny_sums.rows import split_rows
from qstar_jax.tasks.tiny_sums.solver import chances
from qstar_jax.tasks.tiny_sums.sums import Sum, read_answer
from qstar_jax.tasks.tiny_sums.tokenizer import make_tokenizer

SUM = Sum(27, (8, 2, 9, 4))
BETAS = (0.05, 0.3, 1.0)


@pytest.fixture(scope="module")
def solutions():
    """(text, probability, reward) of every solution of the sum, step by step, without the task's oracle."""
    found = []
    for picks in product(range(4), repeat=4):
        value, results, probability = SUM.start, [], 1.0
        for pick, operand in zip(picks, SUM.operands, strict=True):
            options = list(chances(value, operand).items())
            if pick >= len(options):
                break
            value, chance = options[pick]
            results.append(value)
            probability *= chance
        if len(results) == 4:
            text = SUM.write(results)
            found.append((text, probability, float(read_answer(text) == 50)))
    return found


def test_the_enumeration_is_complete(solutions):
    assert SUM.answer == 50 and sum(p for _, p, _ in solutions) == pytest.approx(1.0)
    assert len({text for text, *_ in solutions}) == len(solutions) > 100


@pytest.mark.parametrize("beta", BETAS)
def test_values_of_prefixes_are_those_of_enumeration(solutions, beta):
    prefixes = {text[:end] for text, *_ in solutions[::7] for end in range(len(text) + 1)}
    assert len(prefixes) > 300
    for prefix in prefixes:
        matching = [(p, reward) for text, p, reward in solutions if text.startswith(prefix)]
        mass = sum(p for p, _ in matching)
        value = beta * np.log(sum(p / mass * np.exp(reward / beta) for p, reward in matching))
        success = prefix_success(SUM, prefix)
        assert success == pytest.approx(sum(p * reward for p, reward in matching) / mass, abs=1e-12)
        assert soft_value(np.array(success), beta) == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize("beta", BETAS)
def test_advantages_are_those_of_the_optimal_policy(solutions, beta):
    """pi* is proportional to the solver times exp(R / beta): its conditional probabilities, by enumeration."""
    tokenizer = make_tokenizer()
    oracle = Oracle(tokenizer, beta)

    def mass(prefix):
        matching = [(p, p * np.exp(reward / beta)) for text, p, reward in solutions if text.startswith(prefix)]
        return np.sum(matching, axis=0)

    for text, *_ in solutions[::23]:
        ids = tokenizer(text).input_ids
        masses = np.array([mass(tokenizer.decode(ids[:end])) for end in range(len(ids) + 1)])
        solver, optimal = (masses[1:] / masses[:-1]).T
        expected = beta * (np.log(optimal) - np.log(solver))
        np.testing.assert_allclose(oracle.advantages(SUM.prompt, ids), expected, atol=1e-9)
        with_eos = oracle.advantages(SUM.prompt, [*ids, tokenizer.eos_token_id])
        np.testing.assert_allclose(with_eos, [*expected, 0.0], atol=1e-9)


@pytest.mark.parametrize("text", [" 27 + 8 = 99 ;", " 27 + 9", " 27 + 8 = 35 ; 34", " 27 + 8 = 35 ; # 35", "27"])
def test_what_the_solver_would_not_write_has_no_value(text):
    assert np.isnan(prefix_success(SUM, text))
    done = SUM.write(SUM.results)
    assert np.isnan(prefix_success(SUM, f"{done}2")) and np.isnan(prefix_success(SUM, f"{done} ; 3"))
    assert prefix_success(SUM, done) == 1.0


def test_the_mean_outcome_of_solutions_is_the_value_of_the_start():
    rows = split_rows("outcomes", 1, 4000)
    task, _ = tasks.find("builtin:tiny-sums")
    expected = [prefix_success(tasks.tiny_sums.sums.read_sum(row["prompt"]), "") for row in rows]
    assert np.mean([row["label"] for row in rows]) == pytest.approx(np.mean(expected), abs=0.03)
    ids = make_tokenizer()(rows[0]["completion"]).input_ids
    advantages = task.advantages(make_tokenizer(), 0.3)(rows[0]["prompt"], ids)
    q = soft_value(np.array([expected[0], float(rows[0]["label"])]), 0.3)
    assert advantages.sum() == pytest.approx(q[1] - q[0])


def test_slips_cost_value_and_right_steps_do_not():
    task, _ = tasks.find("builtin:tiny-sums")
    tokenizer = make_tokenizer()
    advantages = task.advantages(tokenizer, 0.3)
    for row in split_rows("steps", 0, 200):
        found = advantages(row["prompt"], tokenizer(row["completion"]).input_ids)
        assert np.isfinite(found).all()
        if row["label"] and row["first_error"] == -1:
            assert found.min() > -0.2 and found.sum() > 0
