"""Dialogues with an environment, against full passes and against all dialogues that there are."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax.decoding.dialogues import Dialogue, DialogueOptions, converse

EOS = 2
PROMPT = (1, 0, 1)
OPTIONS = DialogueOptions(EOS, max_turns=3, max_turn_tokens=3, max_reply_tokens=2)


def environment(row, turns):
    """Ends after a turn that begins with EOS; replies depend on the row, the number of turns and the last of them."""
    if turns[-1][0] == EOS:
        return None
    return [(row + len(turns) + turns[-1][0]) % 4, 3][: 1 + (row + len(turns)) % 2]


def tokens_of(dialogue):
    """(all tokens, which of them are actions)."""
    pieces = itertools.zip_longest(dialogue.turns, dialogue.replies, fillvalue=())
    flat = [(token, n == 0) for pair in pieces for n, piece in enumerate(pair) for token in piece]
    return list(PROMPT) + [token for token, _ in flat], [False] * len(PROMPT) + [action for _, action in flat]


def logits_by_full_pass(model, params, dialogue):
    """Logits before each token but the first, and which of the tokens are actions."""
    tokens, actions = tokens_of(dialogue)
    logits = model.logits(params, jnp.asarray(tokens)[None])[0, :-1]
    return np.asarray(jax.nn.log_softmax(logits)), np.array(tokens[1:]), np.array(actions[1:])


@pytest.fixture(scope="module")
def lm(tiny_model, tiny_params):
    """The tiny model, made more decided, and so that a turn or a dialogue may end."""
    return tiny_model, jax.tree.map(lambda x: 2.0 * x, tiny_params)


@pytest.mark.parametrize("beams", [1, 3])
def test_scores_are_those_of_full_passes_over_the_policys_tokens(lm, beams):
    options = DialogueOptions(EOS, 3, 3, 2, beams=beams)
    for dialogues in converse(*lm, PROMPT, 3, environment, options):
        assert len(dialogues) == beams
        for dialogue in dialogues:
            logp, tokens, actions = logits_by_full_pass(*lm, dialogue)
            expected = logp[np.arange(len(tokens)), tokens][actions].sum()
            np.testing.assert_allclose(dialogue.logp, expected, rtol=1e-5)


def test_greedy_turns_are_the_most_likely_tokens_given_all_that_was_said(lm):
    for row, (dialogue,) in enumerate(converse(*lm, PROMPT, 3, environment, OPTIONS)):
        logp, tokens, actions = logits_by_full_pass(*lm, dialogue)
        np.testing.assert_array_equal(logp.argmax(-1)[actions], tokens[actions])
        for n, reply in enumerate(dialogue.replies):
            assert list(reply) == environment(row, dialogue.turns[: n + 1])


def test_samples_follow_the_policy_and_their_key(table_lm):
    policy, params = table_lm([[0.5, 0.2, 0.3]])
    options = DialogueOptions(EOS, max_turns=1, max_turn_tokens=1, max_reply_tokens=1, temperature=1.0)
    made = [converse(policy, params, PROMPT, 4000, lambda *_: None, options, jax.random.key(s)) for s in (0, 0, 1)]
    assert made[0] == made[1] != made[2]
    counts = np.bincount([dialogue.turns[0][0] for (dialogue,) in made[0]], minlength=3)
    np.testing.assert_allclose(counts / 4000, [0.5, 0.2, 0.3], atol=0.03)


def every_dialogue(row, limits):
    """All dialogues of a row, by enumeration."""
    turns = [t for n in range(1, limits.max_turn_tokens + 1) for t in itertools.product(range(3), repeat=n)]
    turns = [t for t in turns if EOS not in t[:-1] and (t[-1] == EOS or len(t) == limits.max_turn_tokens)]
    open_dialogues, complete = [Dialogue((), (), 0.0, False)], []
    for _ in range(limits.max_turns):
        longer = [((*d.turns, turn), d.replies) for d in open_dialogues for turn in turns]
        replies = [environment(row, turns) for turns, _ in longer]
        complete += [Dialogue(t, r, 0.0, True) for (t, r), reply in zip(longer, replies, strict=True) if reply is None]
        open_dialogues = [
            Dialogue(t, (*r, tuple(reply)), 0.0, False) for (t, r), reply in zip(longer, replies, strict=True) if reply
        ]
    return complete + open_dialogues


def test_beams_wide_enough_find_all_dialogues_in_order(history_lm, history_next):
    policy, params = history_lm(0, vocabulary=3)
    options = DialogueOptions(EOS, max_turns=2, max_turn_tokens=2, max_reply_tokens=2, beams=64)
    for row, dialogues in enumerate(converse(policy, params, PROMPT, 2, environment, options)):
        expected = []
        for dialogue in every_dialogue(row, options):
            tokens, actions = tokens_of(dialogue)
            logp = sum(float(history_next(params, tuple(tokens[:t]))(())[tokens[t]]) for t in np.flatnonzero(actions))
            expected.append((logp, dialogue.turns, dialogue.replies, dialogue.ended))
        expected.sort(key=lambda e: -e[0])
        found = [d for d in dialogues if np.isfinite(d.logp)]
        assert [(d.turns, d.replies, d.ended) for d in found] == [e[1:] for e in expected]
        np.testing.assert_allclose([d.logp for d in found], [e[0] for e in expected], rtol=1e-5)


def test_a_reply_that_is_too_long_and_sampled_beams_are_refused(lm):
    with pytest.raises(ValueError, match="a reply has 3 tokens; max_reply_tokens is 2"):
        converse(*lm, PROMPT, 1, lambda *_: [1, 1, 1], OPTIONS)
    with pytest.raises(ValueError, match="samples one dialogue; 2 beams"):
        DialogueOptions(EOS, 1, 1, 1, beams=2, temperature=1.0)
