"""Rules on what has been said, against plain Python, by themselves and inside a search that moves its beams about."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax.decoding.constraints import Constraints
from qstar_jax.decoding.responses import Finish
from qstar_jax.decoding.search.beam import beam_search
from qstar_jax.decoding.search.beam_options import BeamOptions

PROMPTS = [[1, 0, 3], [4], [2, 0]]


def plain(rules, text, new, row, eos_ids):
    """The scores `row` [V] behind the tokens `text`, of which the last `new` are the response's."""
    row, size = np.array(row, np.float64), rules.no_repeat_ngram_size
    if new < rules.min_new_tokens:
        row[list(eos_ids)] = -np.inf
    for token in set(text):
        row[token] = row[token] / rules.repetition_penalty if row[token] > 0 else row[token] * rules.repetition_penalty
    for start in range(len(text) - size + 1) if size else ():
        if text[start : start + size - 1] == text[len(text) - size + 1 :]:
            row[text[start + size - 1]] = -np.inf
    return row


RULES = [
    Constraints(),
    Constraints(min_new_tokens=3),
    Constraints(repetition_penalty=1.7),
    Constraints(repetition_penalty=0.6),
    Constraints(no_repeat_ngram_size=1),
    Constraints(no_repeat_ngram_size=2),
    Constraints(no_repeat_ngram_size=3),
    Constraints(min_new_tokens=2, repetition_penalty=1.2, no_repeat_ngram_size=2),
]


@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("rubbish", [0, 3])
def test_rules_equal_plain_python(rules, rubbish):
    rng = np.random.default_rng(0)
    changed, paths = 0, 40
    lengths, sizes = rng.integers(0, 6, (2, paths)), np.array([4, 1])
    prompts, history = rng.integers(0, 4, (2, 4)), rng.integers(0, 4, (2, paths, 6))
    for b in range(2):
        prompts[b, sizes[b] :] = rubbish
        for k in range(paths):
            history[b, k, lengths[b, k] :] = rubbish
    scores = rng.standard_normal((2, paths, 5)).astype(np.float32)  # of both signs, as logits have
    arguments = map(jnp.asarray, (scores, history, lengths, prompts, sizes))
    found = np.asarray(rules.apply(*arguments, (0, 4)))
    for b in range(2):
        for k in range(paths):
            text = [*prompts[b, : sizes[b]].tolist(), *history[b, k, : lengths[b, k]].tolist()]
            expected = plain(rules, text, lengths[b, k], scores[b, k], (0, 4))
            np.testing.assert_allclose(found[b, k], expected, rtol=1e-6)
            changed += not np.array_equal(expected, scores[b, k])
    assert changed == 0 if rules == Constraints() else changed > 5


def test_one_length_may_stand_for_all():
    scores, history = jnp.zeros((1, 2, 5)), jnp.array([[[1, 0, 0], [2, 0, 0]]])
    prompt = jnp.array([[3]]), jnp.array([1])
    rules = Constraints(no_repeat_ngram_size=1, min_new_tokens=2)
    one = rules.apply(scores, history, jnp.int32(1), *prompt, (4,))
    np.testing.assert_array_equal(one, rules.apply(scores, history, jnp.ones((1, 2), int), *prompt, (4,)))
    np.testing.assert_array_equal(one == -jnp.inf, [[[0, 1, 0, 1, 1], [0, 0, 1, 1, 1]]])


IN_SEARCH = [
    (Constraints(repetition_penalty=1.8), (0,)),
    (Constraints(no_repeat_ngram_size=2), (0,)),
    (Constraints(no_repeat_ngram_size=1), (0,)),  # nothing is said twice, and soon there is nothing left to say
    (Constraints(min_new_tokens=3), (0, 3, 4)),
    (Constraints(min_new_tokens=5), (0, 1, 2, 4)),  # as long as responses may be
]


@pytest.mark.parametrize(("rules", "eos_ids"), IN_SEARCH, ids=str)
def test_a_search_sees_the_history_of_each_of_its_beams(
    rules, eos_ids, padded, history_lm, history_next, plain_beam_search, read_responses
):
    options, other_responses, blind_responses = BeamOptions(3, 5, eos_ids, constraints=rules), 0, 0
    for seed in range(6):
        policy = history_lm(seed, bias=-1.0)
        found = jax.device_get(beam_search(*policy, *padded(PROMPTS), options))
        for row, prompt in enumerate(PROMPTS):
            logp = history_next(policy[1], prompt)

            def change(text, scores, prompt=prompt):
                return plain(rules, [*prompt, *text], len(text), scores, eos_ids)

            def change_blindly(text, scores):
                return plain(rules, [*text], len(text), scores, eos_ids)

            expected = plain_beam_search(logp, options, change=change)
            texts = [text for text, *_ in expected]
            assert read_responses(found, row) == texts
            scores = [score for _, score, *_ in expected]
            # Sums of at most five numbers below 20 in float32.
            np.testing.assert_allclose(found.score[row, : len(texts)], scores, rtol=0, atol=5e-5)
            # What is reported beside the score is the policy's own log-probability, which no rule changes.
            own = [sum(logp(text[:t])[token] for t, token in enumerate(text)) for text in texts]
            np.testing.assert_allclose(found.logp[row, : len(texts)], own, rtol=0, atol=5e-5)
            other_responses += texts != [text for text, *_ in plain_beam_search(logp, options)]
            blind_responses += texts != [text for text, *_ in plain_beam_search(logp, options, change=change_blindly)]
            assert all(len(text) >= rules.min_new_tokens for text in texts)
            if rules.no_repeat_ngram_size == 1:
                assert all(not set(text) & set(prompt) and len(set(text)) == len(text) for text in texts)
                # Where the prompt has said EOS, a response cannot end, nor be five words long: there is none.
                assert bool(texts) == (0 not in prompt) and (found.finish[row, len(texts) :] == Finish.INVALID).all()
    assert other_responses > 6  # the rule has an effect, and so do prompts where it looks at them
    assert not rules.read_history or rules.no_repeat_ngram_size == 1 or blind_responses > 3


def test_numbers_without_a_meaning_are_refused():
    for changes in ({"min_new_tokens": -1}, {"no_repeat_ngram_size": -1}, {"repetition_penalty": 0.0}):
        (name, value), *_ = changes.items()
        with pytest.raises(ValueError, match=f"{name} {value}"):
            Constraints(**changes)
