"""Beam search against every response there is, against a restatement in plain lists, and against what must hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax.decoding.responses import Finish
from qstar_jax.decoding.search.beam import beam_search
from qstar_jax.decoding.search.beam_options import BeamOptions, t5x_compat
from qstar_jax.decoding.search.beam_selection import _top

# One holds EOS, which is 0, one is a single token, one ends in EOS: none of these is finished before it starts.
PROMPTS = [[1, 0, 3], [4], [2, 0]]
CLOSE = {"rtol": 0, "atol": 2e-5}  # sums of at most five float32 log-probabilities of at most 10 nats


@pytest.fixture(scope="module")
def search(padded):
    def run(policy, options, prompts=PROMPTS, width=3, pad=0, **keywords):
        found = jax.device_get(beam_search(*policy, *padded(prompts, width, pad), options, **keywords))
        check_contract(found, options)
        return found

    return run


def check_contract(found, options):
    """What holds for every search: sorted, unique, nothing behind an end, and nothing where there is no response."""
    assert not any(np.isnan(x).any() for x in (found.logp, found.score))
    for row in range(len(found.tokens)):
        exists = found.finish[row] != Finish.INVALID
        count = exists.sum()
        assert exists[:count].all() and (np.diff(found.score[row, :count]) <= 0).all()
        texts = [tuple(t[:n].tolist()) for t, n in zip(found.tokens[row], found.lengths[row], strict=True)]
        assert len(set(texts[:count])) == count and all(texts[:count])
        for k, text in enumerate(texts[:count]):
            assert not set(text[:-1]) & set(options.eos_ids) and (found.tokens[row, k, len(text) :] == 0).all()
            ended = text[-1] in options.eos_ids
            assert found.finished[row, k] == ended and (ended or len(text) == options.max_new_tokens)
        assert (found.lengths[row, count:] == 0).all() and (found.tokens[row, count:] == 0).all()
        assert (found.logp[row, count:] == -np.inf).all() and (found.score[row, count:] == -np.inf).all()


def assert_same(found, row, texts, scores):
    count = len(texts)
    got = [tuple(t[:n].tolist()) for t, n in zip(found.tokens[row, :count], found.lengths[row, :count], strict=True)]
    assert got == texts
    np.testing.assert_allclose(found.score[row, :count], scores, **CLOSE)
    assert (found.finish[row, count:] == Finish.INVALID).all()


def test_two_beams_of_a_bigram_model(search, table_lm):
    # Tokens: 0 ends a response, 1, 2. Behind the prompt 1, then behind 1, then behind 2:
    bigrams = [[[1.0, 0.0, 0.0], [0.1, 0.6, 0.3], [0.5, 0.4, 0.1]]]
    found = search(table_lm(bigrams), BeamOptions(2, 2, (0,)), [[1]], width=1)
    # First step: 1 (0.6) and 2 (0.3) live, the empty response (0.1) ended. Second step: 1 1 (0.36) and 1 2 (0.18) reach
    # the limit; 2 0 (0.15) ended and comes third.
    assert found.tokens[0].tolist() == [[1, 1], [1, 2]] and found.finish[0].tolist() == [Finish.LENGTH] * 2
    np.testing.assert_allclose(np.exp(found.score[0]), [0.36, 0.18], rtol=1e-5)
    assert found.certified.tolist() == [True]


# Wide enough that no live prefix is ever dropped: there are at most (V - 1) ** (T - 1) of these.
WIDE = {3: 85, 4: 341, 5: 364}
SPACES = [(3, "compete"), (4, "compete"), (5, "compete"), (4, "drop")]


@pytest.mark.thin("4-compete", "4-drop")
@pytest.mark.parametrize(("room", "truncated"), SPACES)
def test_a_beam_wider_than_the_tree_finds_every_response_in_order(
    room, truncated, search, history_lm, history_next, every_response
):
    options = BeamOptions(WIDE[room], room, (0,), truncated=truncated)
    for vocabulary in (3, 4, 5):
        policy = history_lm(vocabulary, vocabulary)
        found = search(policy, options)
        for row, prompt in enumerate(PROMPTS):
            responses = every_response(history_next(policy[1], prompt), room, (0,))
            highest = max(responses.values())
            if truncated == "drop":
                responses = {text: score for text, score in responses.items() if text[-1] == 0}
            else:
                # Responses are a partition: their probabilities add up to 1.
                np.testing.assert_allclose(sum(np.exp(list(responses.values()))), 1, rtol=1e-9)
            ranked = sorted(responses.items(), key=lambda item: -item[1])
            if vocabulary < 5 or room < 5:
                assert len(ranked) <= options.beams  # so this is all of them
            texts, scores = zip(*ranked[: options.beams], strict=True)
            # Nothing was pruned, except responses at the limit where these are dropped: the first may have been better.
            assert found.certified[row] == (scores[0] == highest)
            assert_same(found, row, list(texts), scores)


def test_narrow_beams_miss_what_wide_ones_find(search, history_lm, history_next, every_response):
    # The control of the test above: its tables are such that a search can go wrong.
    options, missed = BeamOptions(1, 4, (0,)), 0
    for seed in range(10):
        policy = history_lm(seed, bias=-2.0)
        found = search(policy, options)
        for row, prompt in enumerate(PROMPTS):
            best = max(every_response(history_next(policy[1], prompt), 4, (0,)).values())
            assert found.logp[row, 0] <= best + 2e-5
            missed += found.logp[row, 0] < best - 1e-3
    assert 0 < missed < 30


LENGTH_RULES = [("hf", -1.0), ("hf", 0.6), ("hf", 1.0), ("hf", 2.0), ("gnmt", 0.6), ("gnmt", 2.0)]


@pytest.mark.thin("hf--1.0", "hf-0.6", "gnmt-2.0")
@pytest.mark.parametrize(("rule", "penalty"), LENGTH_RULES)
def test_length_rules_order_all_responses(rule, penalty, search, history_lm, history_next, every_response):
    options = BeamOptions(85, 3, (0,), length_rule=rule, length_penalty=penalty)
    orders = []
    for seed in range(3):
        policy = history_lm(seed)
        found = search(policy, options)
        for row, prompt in enumerate(PROMPTS):
            responses = every_response(history_next(policy[1], prompt), 3, (0,))
            bases = {text: len(text) if rule == "hf" else (5 + len(text)) / 6 for text in responses}
            divided = {text: score / bases[text] ** penalty for text, score in responses.items()}
            ranked = sorted(divided.items(), key=lambda item: -item[1])
            assert_same(found, row, *map(list, zip(*ranked, strict=True)))
            logp = [responses[text] for text, _ in ranked]
            np.testing.assert_allclose(found.logp[row, : len(ranked)], logp, **CLOSE)  # undivided
            orders.append([text for text, _ in ranked] != sorted(responses, key=lambda text: -responses[text]))
        assert found.certified is None  # there is no proof for divided sums
    assert all(orders)  # the rule changes the order of every row


# EOS, 1, 2. The most likely response (1, EOS) has p = .495 * .32 = .158, yet its EOS ranks fifth among the extensions
# of its step: rules that keep EOS only among the first K or 2K candidates lose it while K is small.
CROWDED = [[0.01, 0.495, 0.495], [0.32, 0.34, 0.34], [1 / 3, 1 / 3, 1 / 3]]
LAST = 0.495 * 0.34 / 3


@pytest.mark.thin("all-1-1", "hf-5-4", "hf-5-5", "t5x-3-2", "t5x-3-3")  # on both sides of what is enough
@pytest.mark.parametrize("beams", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize(("rule", "enough"), [("all", 1), ("hf", 5), ("t5x", 3)])
def test_rules_for_ends_that_are_crowded_out(rule, enough, beams, search, table_lm):
    text, p = ((1, 0), 0.1584) if beams >= enough else ((1, 1, 0), LAST)
    found = search(table_lm(CROWDED), BeamOptions(beams, 3, (0,), eos_rule=rule), [[1]], width=1)
    assert tuple(found.tokens[0, 0, : found.lengths[0, 0]].tolist()) == text
    np.testing.assert_allclose(np.exp(found.logp[0, 0]), p, rtol=1e-5)
    assert found.finish[0, 0] == Finish.EOS and not (text == (1, 1, 0) and found.certified[0])


@pytest.mark.parametrize("rule", ["hf", "t5x", "all"])
def test_width_1_is_greedy_under_one_rule_only(rule, search, history_lm, history_next):
    options, equal = BeamOptions(1, 4, (0,), eos_rule=rule), []
    for seed in range(8):
        policy = history_lm(seed)
        found = search(policy, options)
        for row, prompt in enumerate(PROMPTS):
            logp, text = history_next(policy[1], prompt), ()
            while len(text) < 4 and (not text or text[-1] != 0):
                text = (*text, int(logp(text).argmax()))
            equal.append(tuple(found.tokens[row, 0, : found.lengths[row, 0]].tolist()) == text)
    assert all(equal) == (rule == "hf")


@pytest.mark.parametrize(
    ("beams", "rule", "truncated"),
    [(2, "all", "compete"), (3, "hf", "compete"), (3, "t5x", "drop"), (7, "all", "drop")],
)
def test_narrow_beams_equal_plain_lists(
    beams, rule, truncated, search, history_lm, history_next, plain_beam_search, every_response
):
    options, optimal, certified = BeamOptions(beams, 4, (0,), eos_rule=rule, truncated=truncated), [], []
    for seed in range(12):
        policy = history_lm(seed, scale=[0.3, 1.5, 5.0][seed % 3], bias=[-3.0, -3.0, 0.0][seed % 3])
        found = search(policy, options)
        for row, prompt in enumerate(PROMPTS):
            logp = history_next(policy[1], prompt)
            expected = plain_beam_search(logp, options)
            assert_same(found, row, [e[0] for e in expected], [e[1] for e in expected])
            # In these searches a certificate speaks of all responses, those that are dropped too.
            optimal.append(found.logp[row, 0] > max(every_response(logp, 4, (0,)).values()) - 2e-5)
            certified.append(found.certified[row])
    # A certificate is never wrong, and there are both: rows that have one, and rows that do not.
    assert not any(c and not o for c, o in zip(certified, optimal, strict=True))
    assert any(certified) and not all(certified) and not all(optimal)


def test_rows_do_not_depend_on_their_batch(search, history_lm, table_lm):
    policy, options = history_lm(0, bias=-2.0), BeamOptions(3, 4, (0,))
    together = search(policy, options)
    for row, prompt in enumerate(PROMPTS):
        alone = search(policy, options, [prompt])
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])
        np.testing.assert_allclose(alone.score[0], together.score[row], **CLOSE)
    assert len({tuple(row) for row in together.tokens[:, 0].tolist()}) > 1  # a mix-up would show
    # Two rows more, of which one is done at its first step and one never: more steps than one block of the loop has.
    sure, never = [0.98, 0.01, 0.01], [1e-6, 0.1, 0.9 - 1e-6]
    table = table_lm(np.array([[sure, sure, never]] * 2))
    options = BeamOptions(2, 11, (0,))
    for prompts in ([[1], [2]], [[2], [1]]):
        found = search(table, options, prompts, width=1)
        early, late = (0, 1) if prompts[0] == [1] else (1, 0)
        assert found.lengths[early, 0] == 1 and found.finish[early, 0] == Finish.EOS
        assert found.tokens[late, 0].tolist() == [2] * 11 and found.finish[late, 0] == Finish.LENGTH
        np.testing.assert_allclose(found.logp[late, 0], 11 * np.log(0.9), atol=1e-4)


def test_prompts_with_eos_in_them_begin_an_response_all_the_same(search, history_lm, history_next, plain_beam_search):
    # T5X's loop takes EOS in a prompt for a finished response with score 0, which nothing can beat.
    policy, options = history_lm(3), t5x_compat(3, 4, 0)
    found = search(policy, options)
    assert (found.lengths[:, 0] > 0).all() and (found.score[:, 0] < -0.01).all()
    for row, prompt in enumerate(PROMPTS):
        expected = plain_beam_search(history_next(policy[1], prompt), options, prompt_length=len(prompt))
        assert_same(found, row, [e[0] for e in expected], [e[1] for e in expected])


def test_beams_that_do_not_exist_are_no_responses(search, history_lm, history_next, every_response):
    # Three words, eight beams: fewer candidates than places at the first steps; and seven responses in all.
    policy, options = history_lm(1, 3, size=3), BeamOptions(8, 2, (0,))
    found = search(policy, options, [[1, 0, 2], [2]])
    for row, prompt in enumerate([[1, 0, 2], [2]]):
        responses = every_response(history_next(policy[1], prompt), 2, (0,))
        ranked = sorted(responses.items(), key=lambda item: -item[1])
        assert len(ranked) == 7
        assert_same(found, row, *map(list, zip(*ranked, strict=True)))
        assert found.finish[row].tolist().count(Finish.INVALID) == 1 and found.lengths[row, 7] == 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dead_ends(dtype, search, table_lm):
    # By the last token: 1 can only go on; 2 must end at the second step; 3 has nothing to say there, and 4 neither.
    table = np.zeros((2, 5, 5))
    table[:, 1, 1] = 1
    table[0, 2, 2] = table[1, 2, 0] = 1
    table[0, 3, [0, 3]] = 0.5
    table[0, 4, 4] = 1
    model, params = table_lm(table)
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    with jax.debug_nans(True):
        found = search((model, params), BeamOptions(3, 4, (0,)), [[1], [2], [3], [4]], width=1)
    assert found.score.dtype == jnp.float32
    assert found.lengths.tolist() == [[4, 0, 0], [2, 0, 0], [1, 0, 0], [0, 0, 0]]
    ways = [Finish.LENGTH, Finish.EOS, Finish.EOS, Finish.INVALID]
    assert found.finish[:, 0].tolist() == ways
    np.testing.assert_allclose(found.logp[:, 0], [0, 0, np.log(0.5), -np.inf], atol=4e-3)  # bfloat16 has 8 bits
    assert found.certified.tolist() == [True, True, True, False]


@pytest.mark.parametrize(("eos_ids", "room"), [((0,), 1), ((4,), 3), ((), 3)])
def test_limits_and_impossible_ends(eos_ids, room, search, history_lm, history_next, every_response):
    policy = history_lm(2, vocabulary=4)  # token 4 is impossible
    found = search(policy, BeamOptions(5, room, eos_ids))
    for row, prompt in enumerate(PROMPTS):
        responses = every_response(history_next(policy[1], prompt), room, eos_ids)
        assert max(responses, key=responses.get) == tuple(found.tokens[row, 0, : found.lengths[row, 0]].tolist())
        if room == 1:
            assert found.finish[row].tolist().count(Finish.EOS) == 1
        else:
            assert (found.finish[row] == Finish.LENGTH).all() and (found.lengths[row] == room).all()


def test_ties_are_broken_by_what_came_first(search, table_lm):
    policy, options = table_lm([[0.25] * 4] * 2), BeamOptions(9, 2, (0,))
    found = search(policy, options, [[1]], width=1)
    # Equal responses that ended come before those that were cut; each kind is in the order of its tokens.
    texts = [(0,), (1, 0), (2, 0), (3, 0), (1, 1), (1, 2), (1, 3), (2, 1), (2, 2)]
    assert_same(found, 0, texts, [np.log(0.25)] + 8 * [2 * np.log(0.25)])
    again = search(policy, options, [[1]], width=1)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_same_program_serves_all_batches_of_a_shape(search, history_lm):
    options, programs = BeamOptions(3, 4, (0,)), beam_search.__wrapped__
    search(history_lm(0), options)
    before = programs._cache_size()
    search(history_lm(1), BeamOptions(3, 4, (0,)), [[2, 2, 2], [1], [1]])
    assert programs._cache_size() == before
    search(history_lm(1), options, [[2, 2, 2]], width=29)  # another shape, which no other test has: the counter counts
    assert programs._cache_size() == before + 1


def test_ends_that_the_policy_does_not_know_are_ignored(search, history_lm):
    policy = history_lm(2)
    one, other = (search(policy, BeamOptions(4, 4, ends)) for ends in ((0,), (0, 7)))
    np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_array_equal(one.finish, other.finish)


@pytest.mark.parametrize("count", [5, 8, 40])
def test_candidates_with_equal_keys_keep_their_order(count):
    keys = np.random.default_rng(count).integers(0, 4, (2, 4, 32)).astype(np.float32)
    found = _top(jnp.asarray(keys), count)
    best, flat = jax.lax.top_k(keys.reshape(2, -1), count)
    np.testing.assert_array_equal(found.rank, best)
    np.testing.assert_array_equal(found.flat, flat)
