"""Exact search against enumeration of all responses; and beam search's proofs against what is true."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax import tabular
from qstar_jax.decoding.objectives import ImplicitReward, RegularisedReward, TableReward
from qstar_jax.decoding.policies import Ensemble
from qstar_jax.decoding.responses import Finish
from qstar_jax.decoding.search.beam import beam_search
from qstar_jax.decoding.search.beam_options import BeamOptions
from qstar_jax.decoding.search.exact import exact_search
from qstar_jax.decoding.token_tree import TreePolicy

TREE = tabular.TokenTree(vocabulary=4, depth=4, eos=3)
POLICY, EOS = TreePolicy(TREE), (TREE.eos,)
COUNT = 240


@pytest.fixture(scope="module")
def tables():
    """log pi of many trees, flat ones and peaked ones, float32."""
    scale = np.linspace(0.3, 4.0, COUNT)[:, None, None]
    logits = scale * np.random.default_rng(1).standard_normal((COUNT, *TREE.shape))
    return (logits - np.log(np.exp(logits).sum(-1, keepdims=True))).astype(np.float32)


def ranked(table):
    """All responses and their scores, best first: every sequence of tokens that is one, in plain Python."""
    found = []
    for length in range(1, TREE.depth + 1):
        for tokens in itertools.product(range(TREE.vocabulary), repeat=length):
            if TREE.eos in tokens[:-1] or not (tokens[-1] == TREE.eos or length == TREE.depth):
                continue
            states = [TREE.states.index(tokens[:t]) for t in range(length)]
            found.append((tokens, sum(float(table[s, token]) for s, token in zip(states, tokens, strict=True))))
    return sorted(found, key=lambda item: -item[1])


def search(table, **more):
    given = {"max_new_tokens": TREE.depth, "eos_ids": EOS} | more
    return exact_search(POLICY, jnp.asarray(table), jnp.zeros(1, jnp.int32), **given)


def responses(found):
    return [tuple(t[:n].tolist()) for t, n in zip(found.tokens[0], found.lengths[0], strict=True) if n]


@pytest.mark.parametrize("batch_size", [1, 8])
def test_finds_the_best_responses(tables, batch_size):
    expansions = []
    for table in tables[:: COUNT // 20]:
        found, expected = search(table, n_best=5, batch_size=batch_size), ranked(table)[:5]
        assert found.proven and found.certified.all()
        assert responses(found) == [tokens for tokens, _ in expected]
        for sums in (found.score, found.logp):
            np.testing.assert_allclose(sums[0], [score for _, score in expected], rtol=0, atol=1e-5)
        for tokens, finish in zip(responses(found), found.finish[0], strict=True):
            assert finish == (Finish.EOS if tokens[-1] == TREE.eos else Finish.LENGTH)
        expansions.append(found.expansions)
    assert max(expansions) < TREE.shape[0]
    if batch_size == 1:  # several at a time are looked at in vain
        assert np.mean(expansions[-5:]) < 0.7 * np.mean(expansions[:5])  # peaked policies are soon done


def test_a_budget_that_ends_too_early_is_no_proof(tables):
    """Over all budgets: claims that are made are true, results never get worse, and with enough all is proven."""
    wrong = 0
    for table in tables[:: COUNT // 8]:
        expected, last = ranked(table), -np.inf
        for budget in (*range(1, 9), 40):
            found = search(table, n_best=2, max_expansions=budget, batch_size=1)
            assert found.expansions <= budget
            first, both = responses(found)[:1] == [expected[0][0]], responses(found) == [t for t, _ in expected[:2]]
            assert first or not found.certified[0]
            assert both or not found.proven
            wrong += not both
            assert found.score[0, 0] >= last
            last = found.score[0, 0]
        assert found.proven
    assert wrong > 8  # claims could have been wrong


def test_more_responses_than_there_are(tables):
    found, expected = search(tables[0], n_best=500), ranked(tables[0])
    assert found.proven and len(expected) == (found.finish[0] != Finish.INVALID).sum()
    assert responses(found) == [tokens for tokens, _ in expected]
    assert (found.score[0, len(expected) :] == -np.inf).all() and not found.tokens[0, len(expected) :].any()
    assert found.expansions == TREE.shape[0]


def test_nothing_seen_in_time(tables):
    found = search(tables[0], eos_ids=(), max_expansions=1)
    assert not found.proven and not found.certified[0]
    assert found.finish[0, 0] == Finish.INVALID and found.logp[0, 0] == -np.inf


def test_ties_go_to_the_first_tokens():
    flat = np.full(TREE.shape, -np.log(4), np.float32)
    assert responses(search(flat, n_best=3)) == [(3,), (0, 3), (1, 3)]


def test_impossible_tokens(tables):
    table = np.array(tables[0])
    table[:, 1:] = -np.inf  # not even EOS
    found = search(table, n_best=2)
    assert responses(found) == [(0, 0, 0, 0)] and found.proven
    found = search(np.full_like(table, -np.inf))
    assert found.finish[0, 0] == Finish.INVALID and found.proven and not found.certified[0]


def test_other_objectives(tables):
    """The regularised reward finds the same; those without a proof are refused."""
    pair, objective = Ensemble((POLICY, POLICY)), RegularisedReward(0.5)
    params = (jnp.asarray(tables[60]), jnp.asarray(tables[61]))
    common = {"max_new_tokens": TREE.depth, "eos_ids": EOS, "n_best": 4}
    found = exact_search(pair, params, jnp.zeros(1, jnp.int32), objective=objective, **common)
    expected = ranked(tables[60])[:4]
    reference = dict(ranked(tables[61]))
    assert responses(found) == [tokens for tokens, _ in expected]
    np.testing.assert_allclose(found.score[0], [0.5 * score for _, score in expected], rtol=0, atol=1e-5)
    np.testing.assert_allclose(found.ref_logp[0], [reference[t] for t in responses(found)], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="exact search with ImplicitReward: its sum can rise again"):
        exact_search(pair, params, jnp.zeros(1, jnp.int32), objective=ImplicitReward(0.5), **common)

    class Rising(TableReward):
        monotone = True

    with pytest.raises(ValueError, match="Rising has values, which do not bound"):
        three = Ensemble((POLICY,) * 3)
        exact_search(three, (*params, params[0]), jnp.zeros(1, jnp.int32), objective=Rising(0.5), **common)
    with pytest.raises(ValueError, match="n_best 0"):
        search(tables[0], n_best=0)


def test_a_transformer(micro, all_responses):
    """Prefixes of all lengths in one batch, of a prompt of its own length."""
    for prompt in ([1, 2, 3], [4, 1, 2]):
        found = exact_search(*micro, jnp.array(prompt), max_new_tokens=4, eos_ids=(0, 3), n_best=6)
        expected = all_responses(prompt, 4, (0, 3))[:6]
        assert found.proven and responses(found) == [tokens for tokens, _ in expected]
        np.testing.assert_allclose(found.score[0], [score for _, score in expected], rtol=0, atol=2e-5)


@pytest.mark.parametrize("beams", [1, 2])
def test_beams_are_never_certified_wrongly(tables, beams):
    """Hundreds of policies: what a beam search says to be proven is the argmax; and it does say so, where it can."""
    logits = np.array(tables)
    logits[: COUNT // 2, :, TREE.eos] -= 5.0  # every second one goes on to the end, where beams go astray
    logits[: COUNT // 2, TREE.levels[0]] *= 0.2
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    prompts, lengths = jnp.zeros((COUNT, 1), jnp.int32), jnp.ones(COUNT, jnp.int32)
    found = jax.device_get(
        beam_search(POLICY, jnp.asarray(logits), prompts, lengths, BeamOptions(beams, TREE.depth, EOS))
    )
    first = [tuple(t[0, : n[0]].tolist()) for t, n in zip(found.tokens, found.lengths, strict=True)]
    best = [ranked(table)[0] for table in logits]
    right = np.array([ours == response for ours, (response, _) in zip(first, best, strict=True)])
    assert not (found.certified & ~right).any()
    assert found.certified.sum() > 80 and (~right).sum() > 6
    assert found.certified[right].mean() < 1  # a proof asks for more than being right
    for table, (_, score) in zip(logits[::20], best[::20], strict=True):
        proof = search(table)
        assert proof.proven
        np.testing.assert_allclose(proof.score[0, 0], score, rtol=0, atol=1e-5)
