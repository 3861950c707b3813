"""Random combinations of options against `generate` of torch transformers, on a tiny model."""

import os
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax.decoding.constraints import Constraints
from qstar_jax.decoding.search.beam import beam_search
from qstar_jax.decoding.search.beam_options import hf_compat

pytestmark = pytest.mark.parity

CLOSE = {"rtol": 0, "atol": 1e-4}  # sums of at most eight float32 log-probabilities; two are that close nowhere here
WIDTH = 9
CASES = 40 if os.environ.get("QSTAR_FULL_PARITY") == "1" else 12  # each compiles a program


def random_cases():
    """Combinations of options; every second one has constraints."""
    rng = np.random.default_rng(0)
    for index in range(CASES):
        beams = (2, 5, 3, 1)[index % 4]
        case = {
            "beams": beams,
            "num_return_sequences": int(rng.integers(1, beams + 1)),
            "room": int(rng.choice([3, 8])),
            "length_penalty": float(rng.choice([-1.0, 0.0, 0.5, 1.0, 2.0])),
            "early_stopping": [True, False, "never"][rng.integers(3)],
            "ends": int(rng.integers(1, 3)),
        }
        # One beam is greedy decoding there, where the penalty is applied to logits and not to log-probabilities.
        penalty = float(rng.choice([1.0, 1.3])) if beams > 1 else 1.0
        constraints = (int(rng.choice([0, 2])), penalty, int(rng.choice([0, 2])))
        constraints = constraints if index % 8 >= 4 else ()
        name = "-".join(str(value) for value in [*case.values(), *constraints])
        yield pytest.param(case | {"constraints": Constraints(*constraints)}, id=name)


@pytest.fixture(scope="module")
def oracle(beam_parity, hf_folder):
    return beam_parity.Folder(str(hf_folder)).torch


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(3, 60, size).tolist() for size in (WIDTH, 1, 5, 3)]


@pytest.fixture(scope="module")
def likely(tiny_model, tiny_params, prompts):
    """Tokens that are said often: with these as EOS, responses end at every step."""
    tokens, lengths = padded(prompts)
    found = jax.device_get(beam_search(tiny_model, tiny_params, tokens, lengths, hf_compat(5, 8, ())))
    return np.bincount(found.tokens.ravel(), minlength=60).argsort()[::-1].tolist()


def padded(prompts):
    tokens = np.zeros((len(prompts), WIDTH), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return jnp.asarray(tokens), jnp.array([len(prompt) for prompt in prompts], jnp.int32)


@pytest.fixture(scope="module")
def decode(tiny_model, tiny_params, prompts, likely):
    """Ours: [(tokens, score)] of each prompt."""

    def run(case, **changes):
        options = hf_compat(
            case["beams"],
            case["room"],
            tuple(likely[: case["ends"]]),
            length_penalty=case["length_penalty"],
            early_stopping=case["early_stopping"],
            constraints=case["constraints"],
        )
        found = beam_search(tiny_model, tiny_params, *padded(prompts), replace(options, **changes))
        found = jax.device_get(found)
        rows = zip(found.tokens, found.lengths, found.score, strict=True)
        return [[(t[:n].tolist(), float(s)) for t, n, s in zip(*row, strict=True)] for row in rows]

    return run


@pytest.fixture(scope="module")
def generate(beam_parity, oracle, prompts, likely):
    """Theirs. Where the past counts, one prompt at a time: there padding counts as something that was said."""

    def run(case):
        constraints = case["constraints"]
        more = {}
        if constraints.min_new_tokens:
            more["min_new_tokens"] = constraints.min_new_tokens
        if constraints.read_history:
            more["repetition_penalty"] = constraints.repetition_penalty
            more["no_repeat_ngram_size"] = constraints.no_repeat_ngram_size
        batches = [[prompt] for prompt in prompts] if constraints.read_history else [prompts]
        options = [case[name] for name in ("beams", "length_penalty", "early_stopping", "room")]
        found = []
        for batch in batches:
            found += beam_parity.beams_of_torch(oracle, batch, tuple(likely[: case["ends"]]), *options, **more).given
        return found

    return run


@pytest.mark.parametrize("case", random_cases())
def test_hypotheses_and_scores_are_those_of_torch(case, decode, generate):
    count = case["num_return_sequences"]
    for own, other in zip(decode(case), generate(case), strict=True):
        assert [text for text, _ in own][:count] == [text for text, _ in other][:count]
        np.testing.assert_allclose([s for _, s in own][:count], [s for _, s in other][:count], **CLOSE)


GREEDY = {"beams": 1, "num_return_sequences": 1, "room": 8, "ends": 2, "constraints": Constraints()}


def test_one_beam_is_greedy_decoding_whatever_the_rest(decode, generate):
    case = GREEDY | {"length_penalty": 2.0, "early_stopping": "never"}
    own, other = decode(case), generate(case)
    assert any(len(text) < 8 for [(text, _)] in other)  # there are responses that the penalty would go beyond
    assert [text for [(text, _)] in own] == [text for [(text, _)] in other]


def test_another_rule_for_ends_is_seen(decode, generate):
    case = GREEDY | {"beams": 2, "length_penalty": 0.0, "early_stopping": False}
    other = [[text for text, _ in row] for row in generate(case)]
    assert [[text for text, _ in row] for row in decode(case)] == other
    assert [[text for text, _ in row] for row in decode(case, eos_rule="all")] != other
