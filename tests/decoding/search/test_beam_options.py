"""Every option of beam search against a restatement in plain Python, or against numbers worked out by enumeration."""

import inspect
import itertools
from dataclasses import dataclass, field, fields, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax.decoding.constraints import Constraints
from qstar_jax.decoding.objectives import ImplicitReward, LogitArithmetic, RegularisedReward
from qstar_jax.decoding.responses import Finish
from qstar_jax.decoding.search.beam import BLOCK, beam_search, block_size
from qstar_jax.decoding.search.beam_options import BeamOptions, hf_compat, t5x_compat
from qstar_jax.decoding.stop_strings import StopStrings

PROMPTS = [[1, 0, 3], [4], [2, 0]]
CLOSE = {"rtol": 0, "atol": 2e-5}  # sums of at most five float32 log-probabilities of at most 10 nats


@pytest.fixture(scope="module")
def search(padded):
    def run(policy, options, prompts=PROMPTS, **keywords):
        return jax.device_get(beam_search(*policy, *padded(prompts), options, **keywords))

    return run


def assert_same(found, row, expected, read_responses):
    """Against what `plain_beam_search` returns."""
    assert read_responses(found, row) == [text for text, *_ in expected]
    np.testing.assert_allclose(found.score[row, : len(expected)], [e[1] for e in expected], **CLOSE)
    np.testing.assert_allclose(found.logp[row, : len(expected)], [e[2] for e in expected], **CLOSE)


STOPPING = BeamOptions(2, 5, (0,), eos_rule="hf", length_rule="hf", length_penalty=1.0)


def counted(logp):
    """The same function, and a list that grows with every call: how far a search goes."""
    calls = []

    def compute(text):
        calls.append(text)
        return logp(text)

    return compute, calls


@pytest.mark.thin("-1.0", "0.6")
@pytest.mark.parametrize("penalty", [-1.0, 0.0, 0.6, 1.0, 2.0])
def test_stopping_never_too_early_is_running_to_the_limit(
    penalty, search, history_lm, history_next, plain_beam_search, read_responses
):
    rule = "hf" if penalty else "none"
    options = replace(STOPPING, length_rule=rule, length_penalty=penalty, early_stopping="never")
    early = 0
    for seed in range(9):
        policy = history_lm(seed, scale=[0.5, 1.5, 4.0][seed % 3])
        if seed == 8:  # texts that end for certain, or by a toss: worth stopping for even where length pays much
            ends = np.array([[0, -30, -30, -30, -30], [0, 0, -30, -30, -30]])[np.arange(997) // 3 % 2]
            policy = policy[0], {"logits": jnp.asarray(ends + 0.1 * policy[1]["logits"], jnp.float32)}
        found = search(policy, options)
        for row, prompt in enumerate(PROMPTS):
            (stopping, calls), (going, all_calls) = (counted(history_next(policy[1], prompt)) for _ in range(2))
            to_the_limit = plain_beam_search(going, options, stops=False)
            assert_same(found, row, to_the_limit, read_responses)
            assert [e[0] for e in plain_beam_search(stopping, options)] == [e[0] for e in to_the_limit]
            early += len(calls) < len(all_calls)
    assert early  # there was something to save


@dataclass(frozen=True, eq=False)
class Counting:
    """A policy that counts its steps when they run."""

    inner: Any
    steps: list = field(default_factory=list)

    def prefill(self, *arguments):
        return self.inner.prefill(*arguments)

    def extend(self, params, memory, tokens, path, slot):
        jax.debug.callback(lambda slot: self.steps.append(int(slot)), slot)
        return self.inner.extend(params, memory, tokens, path, slot)


def test_a_batch_that_is_done_takes_no_further_block_of_steps(search, table_lm):
    ending = [[0.02, 0.49, 0.49], [0.98, 0.01, 0.01]]
    for table, blocks in ((ending, 1), ([[0.0, 0.5, 0.5]], 2)):
        model, params = table_lm(table)
        policy = Counting(model)
        search((policy, params), BeamOptions(2, 2 * BLOCK, (0,)), [[1]])
        jax.effects_barrier()
        assert len(policy.steps) == blocks * BLOCK


def test_blocks_waste_one_step_of_many_at_most():
    sizes = {1: 1, 2: 2, 3: 3, 4: 4, 5: 1, 6: 3, 8: 4, 31: 1, 32: 4, 33: 3, 48: 4, 67: 4, 127: 4, 128: 4}
    assert {steps: block_size(steps) for steps in sizes} == sizes
    assert all(-steps % block_size(steps) <= 1 < block_size(steps) for steps in range(64, 300))


@pytest.mark.thin("5", "31")
@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 5, 7, 31])
def test_a_step_past_the_limit_changes_nothing(max_new_tokens, padded, history_lm, monkeypatch):
    policy, options = history_lm(1, bias=-12.0), BeamOptions(3, max_new_tokens, (0,))

    def search():
        fresh = jax.jit(lambda params, *prompts: inspect.unwrap(beam_search)(policy[0], params, *prompts, options))
        return jax.device_get(fresh(policy[1], *padded(PROMPTS)))

    monkeypatch.setattr("qstar_jax.decoding.search.beam.block_size", lambda steps: BLOCK)
    in_blocks = search()
    monkeypatch.setattr("qstar_jax.decoding.search.beam.block_size", lambda steps: 1)
    one_by_one = search()
    for one, other in zip(jax.tree.leaves(in_blocks), jax.tree.leaves(one_by_one), strict=True):
        np.testing.assert_array_equal(one, other)
    assert (in_blocks.lengths == max_new_tokens).any()  # some have reached the limit


def test_the_three_rules_for_stopping_differ(search, history_lm, history_next, plain_beam_search, read_responses):
    # A table picked so that each rule finds another response; and others, for the rest of what is returned.
    firsts, others = [], 0
    for early_stopping in (True, False, "never"):
        options = replace(STOPPING, early_stopping=early_stopping)
        for seed in (1404, 0, 1, 2, 3, 4):
            policy = history_lm(seed, bias=-1.0)
            found = search(policy, options)
            for row, prompt in enumerate(PROMPTS):
                logp = history_next(policy[1], prompt)
                expected = plain_beam_search(logp, options)
                assert_same(found, row, expected, read_responses)
                others += expected != plain_beam_search(logp, options, stops=False)
            if seed == 1404:
                firsts.append(read_responses(found, 1)[0])
    assert firsts == [(0,), (1, 2, 0), (3, 2, 1, 2, 3)]
    assert others >= 3  # True and False both lose responses that running to the limit has


def t5x_restated(logp, beams, prompt_length, room, eos, alpha):
    """T5X's loop after its prompt, one row, in its own terms: arrays of fixed size, -1e7 for what is not there.

    `scores` of finished sequences are divided by ((5 + i) / 6) ** alpha, i counting the prompt and EOS.
    """
    void, limit = -1e7, prompt_length + room

    def penalty(length):
        return ((5 + length) / 6) ** alpha

    live = [((), 0.0)] + [(None, void)] * (beams - 1)
    finished = [(None, void)] * beams
    index = prompt_length
    while index < limit and not finished[-1][1] > live[0][1] / penalty(limit):
        flat = [
            ((*text, v), score + logp(text)[v]) if text is not None else (None, void)
            for text, score in live
            for v in range(len(logp(())))
        ]
        top = sorted(flat, key=lambda item: -item[1])[: 2 * beams]
        ended = [text is not None and text[-1] == eos for text, _ in top]
        live = sorted(((t, void if e else s) for (t, s), e in zip(top, ended, strict=True)), key=lambda x: -x[1])
        live = live[:beams]
        new = [(t, s / penalty(index + 1) if e else void) for (t, s), e in zip(top, ended, strict=True)]
        finished = sorted(finished + new, key=lambda item: -item[1])[:beams]
        index += 1
    return [item for item in finished if item[1] > void / 2], [item for item in live if item[1] > void / 2]


@pytest.mark.thin("2-0.6")
@pytest.mark.parametrize(("beams", "alpha"), [(2, 0.6), (4, 2.0), (1, 0.0)])
def test_t5x_options_do_what_t5x_does(beams, alpha, search, history_lm, history_next, read_responses):
    # Same responses and scores where a row has finished ones. Where it has none, T5X returns sums that are not divided;
    # here they are divided as all others are, and the responses and their order are the same.
    options, unfinished, changed = t5x_compat(beams, 4, 0, alpha=alpha), 0, 0
    for seed in range(8):
        policy = history_lm(seed, bias=-7.0 if seed % 2 else -1.0)
        found = search(policy, options)
        for row, prompt in enumerate(PROMPTS):
            logp, size = history_next(policy[1], prompt), len(prompt)
            finished, live = t5x_restated(logp, beams, size, 4, 0, alpha)
            if not finished:
                unfinished += 1
                finished = [(text, score / ((5 + size + 4) / 6) ** alpha) for text, score in live]
            assert read_responses(found, row) == [text for text, _ in finished]
            np.testing.assert_allclose(found.score[row, : len(finished)], [s for _, s in finished], **CLOSE)
            # Another prompt length or alpha would give another number: both are in the score.
            own_length = found.logp[row, 0] / ((5 + found.lengths[row, 0]) / 6) ** alpha
            changed += abs(found.score[row, 0] - own_length) > 1e-3
    assert (3 < unfinished < 21 or beams == 4) and changed == (24 if alpha else 0)


def test_presets_set_what_they_say():
    def changes(options):
        plain = BeamOptions(4, 7, (2,))
        return {f.name: v for f in fields(options) if (v := getattr(options, f.name)) != getattr(plain, f.name)}

    hf = {"eos_rule": "hf", "length_rule": "hf", "length_penalty": 1.0, "early_stopping": False}
    assert changes(hf_compat(4, 7, (2,))) == hf
    assert changes(hf_compat(4, 7, (2,), length_penalty=0.0, early_stopping="never")) == {"eos_rule": "hf"}
    limited = Constraints(min_new_tokens=2)
    assert changes(hf_compat(4, 7, (2,), constraints=limited)) == hf | {"constraints": limited}
    t5x = {"eos_rule": "t5x", "truncated": "drop"}
    gnmt = {"length_rule": "gnmt", "length_penalty": 0.6, "count_prompt": True}
    assert changes(t5x_compat(4, 7, 2)) == t5x | gnmt
    assert changes(t5x_compat(4, 7, 2, alpha=0.0)) == t5x


def plain_diverse_search(logp, options):
    """Diverse beam search, one row, in lists: [(text, sum)], best first."""
    width = options.beams // options.groups
    lives = [[((), 0.0)] for _ in range(options.groups)]
    endeds = [[] for _ in lives]
    for t in range(options.max_new_tokens):
        said = np.zeros(5)
        for g, live in enumerate(lives):
            found = [
                (score + logp(text)[v] - options.diversity * said[v], score + logp(text)[v], (*text, v))
                for text, score in live
                for v in range(5)
            ]
            found.sort(key=lambda c: -c[0])
            endeds[g] = sorted(endeds[g] + [(c[2], c[1]) for c in found if c[2][-1] == 0], key=lambda e: -e[1])[:width]
            lives[g] = [(c[2], c[1]) for c in found if c[2][-1] != 0][:width]
            np.add.at(said, [text[t] for text, _ in lives[g]], 1)
            if len(endeds[g]) == width and max((s for _, s in lives[g]), default=-np.inf) <= endeds[g][-1][1]:
                lives[g] = []
    groups = [sorted(e + live, key=lambda x: -x[1])[:width] for e, live in zip(endeds, lives, strict=True)]
    return sorted(itertools.chain(*groups), key=lambda x: -x[1])


def test_diverse_beams_equal_plain_lists_and_keep_true_scores(search, history_lm, history_next):
    options, changed = BeamOptions(4, 4, (0,), groups=2, diversity=1.5), 0
    for seed in range(8):
        policy = history_lm(seed, bias=-2.0)
        found = search(policy, options)
        assert found.certified is None
        np.testing.assert_allclose(found.score, found.logp, **CLOSE)  # what diversity costs counts for choices alone
        for row, prompt in enumerate(PROMPTS):
            logp = history_next(policy[1], prompt)
            expected = plain_diverse_search(logp, options)
            got = [tuple(t[:n].tolist()) for t, n in zip(found.tokens[row], found.lengths[row], strict=True)]
            assert sorted(got) == sorted(text for text, _ in expected)  # two groups may find the same response
            np.testing.assert_allclose(found.score[row], [score for _, score in expected], **CLOSE)
            changed += sorted(got) != sorted(t for t, _ in plain_diverse_search(logp, replace(options, diversity=0.1)))
    assert changed > 8


def test_groups_avoid_what_earlier_ones_say(search, history_lm):
    # No end is likely, and each group is one beam wide: at every step, each says something else.
    policy = history_lm(5, bias=-50.0)
    found = search(policy, BeamOptions(3, 4, (0,), groups=3, diversity=100.0))
    assert (found.finish == Finish.LENGTH).all()
    for row, step in itertools.product(range(3), range(4)):
        assert len(set(found.tokens[row, :, step].tolist())) == 3
    plain = search(policy, BeamOptions(3, 4, (0,)))
    assert any(len(set(plain.tokens[row, :, 0].tolist())) < 3 for row in range(3))  # beams by themselves do not


def inclusion(probabilities, count):
    """Of `count` draws without replacement: how likely each item is among them, and is the first, exactly."""
    p, among = np.asarray(probabilities), np.zeros(len(probabilities))
    for order in itertools.permutations(range(len(p)), count):
        left, chance = 1.0, 1.0
        for item in order:
            chance, left = chance * p[item] / left, left - p[item]
        among[list(order)] += chance
    return among


def test_stochastic_beams_are_a_sample_without_replacement(search, history_lm, history_next, every_response):
    policy, prompt = history_lm(3, vocabulary=3, bias=-0.5, scale=1.0), [1, 2]
    options, rows = BeamOptions(3, 2, (0,), stochastic=True), 500
    responses = every_response(history_next(policy[1], prompt), 2, (0,))
    names, logp = list(responses), np.array(list(responses.values()))
    among, first, draws = np.zeros(7), np.zeros(7), 8 * rows
    assert len(names) == 7
    for seed in range(8):
        found = search(policy, options, [prompt] * rows, key=jax.random.key(seed))
        assert (np.diff(found.score, axis=1) <= 0).all() and found.certified is None
        for row in range(rows):
            texts = [tuple(t[:n].tolist()) for t, n in zip(found.tokens[row], found.lengths[row], strict=True)]
            index = [names.index(text) for text in texts]
            assert len(set(index)) == 3  # without replacement
            among[index] += 1
            first[index[0]] += 1
            if seed == 0:
                np.testing.assert_allclose(found.logp[row], logp[index], **CLOSE)

    def deviation(counts, p):
        return np.abs(counts - draws * p) / np.sqrt(draws * p * (1 - p))

    # 14 counts within 4.5 standard deviations each: a right sampler fails for one choice of seeds in 10,000.
    p = np.exp(logp)
    assert deviation(among, inclusion(p, 3)).max() < 4.5 and deviation(first, p).max() < 4.5
    assert deviation(among, 1 - (1 - p) ** 3).max() > 9  # draws with replacement are told apart
    again = search(policy, options, [prompt] * rows, key=jax.random.key(7))
    np.testing.assert_array_equal(found.tokens, again.tokens)
    # The beam that is not perturbed: the same three responses for all rows.
    plain = search(policy, BeamOptions(3, 2, (0,)), [prompt] * rows)
    assert len(np.unique(plain.tokens, axis=0)) == 1 < len(np.unique(found.tokens, axis=0))


# 1 says "a", 2 says "b", 3 says "ab", 4 something else and 0, the end, nothing. Stop strings: "ab", and "bb".
STOPS = StopStrings(
    jnp.array([[[0, 1, 0, 2, 0], [1, 1, 2, 2, 0], [2] * 5], [[0, 0, 1, 1, 0], [1, 0, 2, 1, 0], [2] * 5]]),
    jnp.array([2, 2]),
)


def ends_by_spelling(text):
    said = "".join(["", "a", "b", "ab", "-"][token] for token in text)
    return text[-1] == 0 or "ab" in said or "bb" in said


@pytest.mark.thin("hf")
@pytest.mark.parametrize("rule", ["all", "hf"])
def test_stop_strings_end_responses(rule, search, history_lm, history_next, plain_beam_search, read_responses):
    options, reasons = BeamOptions(3, 4, (0,), eos_rule=rule), []
    for seed in range(8):
        policy = history_lm(seed, bias=-2.0)
        found = search(policy, options, stop_strings=STOPS)
        for row, prompt in enumerate(PROMPTS):
            expected = plain_beam_search(history_next(policy[1], prompt), options, ends=ends_by_spelling)
            assert_same(found, row, expected, read_responses)
            ways = [Finish.EOS if t[-1] == 0 else Finish.STOP if e else Finish.LENGTH for t, _, _, e in expected]
            assert found.finish[row, : len(ways)].tolist() == ways
            assert found.finished[row, : len(ways)].tolist() == [way != Finish.LENGTH for way in ways]
            reasons += ways
    assert set(reasons) == {Finish.EOS, Finish.STOP, Finish.LENGTH}
    assert max(map(len, read_responses(found, 0))) > 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beams": 0}, "beams 0"),
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
        ({"groups": 0}, "groups 0: at least 1"),
        ({"beams": 3, "groups": 2, "diversity": 1.0}, "beams 3 cannot be split into 2 groups"),
        ({"groups": 2}, "groups 2 with diversity 0.0"),
        ({"diversity": 1.0}, "groups 1 with diversity 1.0"),
        ({"length_penalty": 1.0}, "length_penalty 1.0 has no effect with length_rule none"),
        ({"count_prompt": True}, "no effect with length_rule none"),
        ({"length_rule": "gnmt"}, "length_rule gnmt has no effect with length_penalty 0"),
        ({"early_stopping": True}, "early_stopping True with eos_rule all would stop at once"),
        ({"stochastic": True, "length_rule": "hf", "length_penalty": 1.0}, "a sample, which no groups, rules"),
        ({"stochastic": True, "groups": 2, "diversity": 1.0}, "a sample, which no groups"),
        ({"stochastic": True, "early_stopping": False}, "a sample, which no .* early stopping may change"),
        ({"stochastic": True, "truncated": "drop"}, "a sample, which no"),
        ({"stochastic": True, "eos_rule": "hf"}, "a sample, which no"),
        ({"stochastic": True, "constraints": Constraints(min_new_tokens=2)}, "a sample, which no .* constraints"),
        ({"constraints": Constraints(min_new_tokens=6)}, "min_new_tokens 6 is above max_new_tokens 5"),
        ({"eos_ids": (0, -1)}, r"eos_ids \(0, -1\): expected token ids, from 0 on"),
    ],
)
def test_options_that_mean_nothing_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        BeamOptions(**{"beams": 4, "max_new_tokens": 5, "eos_ids": (0,)} | changes)


def test_options_that_do_not_go_with_their_objective_are_refused(search, history_lm):
    policy, plain = history_lm(0), BeamOptions(2, 4, (0,))
    divided, sampled = replace(plain, length_rule="hf", length_penalty=1.0), replace(plain, stochastic=True)
    for objective in (RegularisedReward(0.1), ImplicitReward(0.1)):
        with pytest.raises(ValueError, match="differ by a constant, which is no longer one when divided by lengths"):
            search(policy, divided, objective=objective)
        repeating = replace(plain, constraints=Constraints(repetition_penalty=2.0))
        with pytest.raises(ValueError, match=r"repetition_penalty 2\.0 .* a reward near 0 would be no worse for it"):
            search(policy, repeating, objective=objective)
    with pytest.raises(ValueError, match="their objective is Likelihood, not LogitArithmetic"):
        search(policy, sampled, objective=LogitArithmetic((1.0,)), key=jax.random.key(0))
    for options, key in ((sampled, None), (plain, jax.random.key(0))):
        with pytest.raises(ValueError, match="a key is for stochastic beams, and they need one"):
            search(policy, options, key=key)
