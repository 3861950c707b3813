import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax import mdp
from qstar_jax.decoding import ChunkOptions, SampleOptions, best_of_n, chunk_beam_search
from qstar_jax.decoding.constraints import Constraints
from qstar_jax.decoding.objectives import ImplicitReward, Likelihood
from qstar_jax.decoding.policies import Ensemble
from qstar_jax.decoding.responses import Finish

PROMPTS = jnp.array([[1, 2, 3, 4], [3, 0, 0, 0]], jnp.int32)
LENGTHS = jnp.array([4, 1], jnp.int32)
ROOM, BETA, REWARD = 6, 0.5, ImplicitReward(0.5)
OPTIONS = ChunkOptions(ROOM, (0,), beams=2, samples=2, chunk_length=2, delimiter_ids=(3,))


def keys_of(seed):
    return jax.random.split(jax.random.key(seed), 2)


@pytest.fixture(scope="module")
def pair(history_lm):
    """(ensemble, parameters) of a policy whose every next word depends on all before, and of a flatter reference."""
    model, params = history_lm(3)
    return Ensemble((model, model)), (params, history_lm(4, scale=0.7)[1])


def search(pair, options=OPTIONS, *, seed=0, objective=REWARD, rows=slice(None)):
    arguments = PROMPTS[rows], LENGTHS[rows], keys_of(seed)[rows]
    return jax.device_get(chunk_beam_search(*pair, *arguments, options, objective=objective))


def responses(found, row):
    """Those that exist."""
    return [
        tuple(found.tokens[row, n, : found.lengths[row, n]].tolist())
        for n in range(found.tokens.shape[1])
        if found.finish[row, n] != Finish.INVALID
    ]


@pytest.fixture(scope="module")
def next_logps(pair, history_logp):
    """`next_logps(row, tokens)`: log pi and log pi_ref of every next word [2, V], in plain Python."""

    @functools.cache
    def compute(row, tokens):
        text = PROMPTS[row, : LENGTHS[row]].tolist() + list(tokens)
        return np.stack([history_logp(params, text, [])[-1] for params in pair[1]])

    return compute


@pytest.fixture(scope="module")
def sums(next_logps):
    """`sums(row, response)`: log pi and log pi_ref of its tokens [2, T]."""
    return lambda row, response: np.stack([next_logps(row, response[:t])[:, a] for t, a in enumerate(response)], axis=1)


def restated(next_logps, row, key, options, score, *, copying=False, monotone=False, drawn=None):
    """The search in plain Python, with the program's keys: responses of one prompt, best first.

    `copying` is the other program's way: a finished response stays a beam, and takes part as often as it is copied.
    Tokens are appended to the list `drawn` as they are drawn.
    """
    parents, ended, chunk = [()] * (options.beams * options.samples), [], 0
    keys = [jax.random.fold_in(key, j) for j in range(len(parents))]

    def over(tokens):
        return len(tokens) == options.max_new_tokens or (tokens and tokens[-1] in options.eos_ids)

    while parents:
        children = []
        for tokens, key in zip(parents, keys, strict=True):
            for s in range(options.chunk_length):
                if over(tokens):
                    break
                noise = jax.random.gumbel(jax.random.fold_in(key, chunk * options.chunk_length + s), (5,))
                tokens += (int(np.argmax(next_logps(row, tokens)[0] + np.asarray(noise))),)
                if drawn is not None:
                    drawn.append(tokens[-1])
                if tokens[-1] in options.delimiter_ids:
                    break
            children.append(tokens)
        chunk += 1
        if copying:
            best = sorted(children, key=lambda tokens: -score(row, tokens))[: options.beams]
            if all(map(over, best)):
                return best
        else:
            ended = list(dict.fromkeys(ended + [tokens for tokens in children if over(tokens)]))
            ended = sorted(ended, key=lambda tokens: -score(row, tokens))[: options.beams]
            live = dict.fromkeys(tokens for tokens in children if not over(tokens))
            best = sorted(live, key=lambda tokens: -score(row, tokens))[: options.beams]
            full = len(ended) == options.beams
            if not best or (monotone and full and score(row, best[0]) <= score(row, ended[-1])):
                return ended
        parents = [best[j % len(best)] for j in range(len(keys))]


@pytest.fixture(scope="module")
def reward(sums):
    """`reward(row, response)`."""
    return lambda row, response: BETA * float(np.subtract(*sums(row, response)).sum())


@pytest.mark.thin("reward")
@pytest.mark.parametrize("name", ["reward", "likelihood"])
def test_equals_a_restatement_with_its_scores(pair, next_logps, sums, reward, name):
    likely = name == "likelihood"
    score = (lambda row, response: float(sums(row, response)[0].sum())) if likely else reward
    finishes = set()
    for seed in range(6):
        found = search(pair, seed=seed, objective=Likelihood() if likely else REWARD)
        for row in range(2):
            drawn = []
            expected = restated(next_logps, row, keys_of(seed)[row], OPTIONS, score, monotone=likely, drawn=drawn)
            assert responses(found, row) == expected
            assert found.drawn[row] == len(drawn)  # those of prefixes that did not go on included
            for n, response in enumerate(expected):
                np.testing.assert_allclose(found.score[row, n], score(row, response), atol=1e-4)
                both = found.logp[row, n], found.ref_logp[row, n]
                np.testing.assert_allclose(both, sums(row, response).sum(1), atol=1e-4)
                assert found.finish[row, n] == (Finish.EOS if response[-1] == 0 else Finish.LENGTH)
        finishes |= set(found.finish.ravel().tolist())
    assert {Finish.EOS, Finish.LENGTH} <= finishes


def test_one_beam_and_one_chunk_are_best_of_n(pair):
    options = ChunkOptions(ROOM, (0,), beams=1, samples=5, chunk_length=ROOM)
    for seed in range(4):
        found = search(pair, options, seed=seed)
        drawing = SampleOptions(ROOM, (0,), 5)
        best = jax.device_get(best_of_n(*pair, PROMPTS, LENGTHS, keys_of(seed), drawing, objective=REWARD))
        for row in range(2):
            assert responses(found, row) == responses(best, row)[:1]
            assert found.drawn[row] == best.drawn[row] == best.lengths[row].sum()
        np.testing.assert_allclose(found.score[:, 0], best.score[:, 0], atol=1e-5)


def test_a_row_alone_equals_the_row_in_a_batch(pair):
    for seed in range(2):
        together = search(pair, seed=seed)
        for row in range(2):
            alone = search(pair, seed=seed, rows=slice(row, row + 1))
            assert responses(alone, 0) == responses(together, row)
            np.testing.assert_allclose(alone.score[0], together.score[row], atol=1e-5)


def test_finished_responses_are_not_copied(pair, next_logps, reward):
    # As many samples as beams, so that copies of one good finished response could fill all beams.
    options = replace(OPTIONS, beams=3, samples=3)
    collapsed = 0
    for seed in range(10):
        found = search(pair, options, seed=seed)
        for row in range(2):
            got = responses(found, row)
            assert len(got) == len(set(got)) > 1
            copying = restated(next_logps, row, keys_of(seed)[row], options, reward, copying=True)
            collapsed += len(set(copying)) == 1
    # The control: the rule that copies, with the same keys, ends with one response three times.
    assert collapsed >= 4


def test_rows_of_what_has_ended_go_to_what_has_not(table_lm):
    # Four first words, two of which are EOS: the others must share all eight rows, and every row draws a second word.
    model, params = table_lm([[0.25, 0.25, 0.25, 0.25, 0.0], [0.0, 0.0, 0.3, 0.3, 0.4]])
    options = ChunkOptions(2, (0, 1), beams=8, samples=1, chunk_length=1)
    for seed in range(8):
        keys = jax.random.split(jax.random.key(seed), 1)
        found = jax.device_get(
            chunk_beam_search(model, params, jnp.array([[1]]), jnp.array([1]), keys, options, objective=Likelihood())
        )
        got = responses(found, 0)
        first = [int(t) for t in restated_first(keys[0], 8)]
        live = list(dict.fromkeys(token for token in first if token > 1))
        second = [jnp.log(jnp.array([0.0, 0.0, 0.3, 0.3, 0.4])) + noise(keys[0], j, 1) for j in range(8)]
        expected = {(token,) for token in first if token <= 1}
        if live:
            # All first words are equally likely, so the live ones keep the order of their rows.
            expected |= {(live[j % len(live)], int(jnp.argmax(second[j]))) for j in range(8)}
        assert set(got) == expected and len(got) == len(expected)
        assert (found.finish[0, len(got) :] == Finish.INVALID).all()
        assert (found.score[0, len(got) :] == -np.inf).all()


def noise(key, row, draw):
    return jax.random.gumbel(jax.random.fold_in(jax.random.fold_in(key, row), draw), (5,))


def restated_first(key, rows):
    logp = jnp.log(jnp.array([0.25, 0.25, 0.25, 0.25, 0.0]))
    return [jnp.argmax(logp + noise(key, row, 0)) for row in range(rows)]


def test_a_chunk_adds_its_step_reward(pair, sums):
    # One beam with one sample has no choice, so limits at the ends of its chunks show the score after each of them.
    room = 3
    options = ChunkOptions(room, (), beams=1, samples=1, chunk_length=2, delimiter_ids=(1, 3))
    found = {end: search(pair, replace(options, max_new_tokens=end), seed=2) for end in range(1, room + 1)}
    delimited = False
    for row in range(2):
        (response,) = responses(found[room], row)
        ends, begin = [], 0
        for t, token in enumerate(response):
            if token in (1, 3) or t + 1 - begin == 2 or t + 1 == room:
                ends.append(t + 1)
                begin = t + 1
        step_ids = np.searchsorted(ends, np.arange(room), side="right")
        logp, ref_logp = jnp.asarray(sums(row, response), jnp.float32)
        mask = jnp.ones(room, bool)
        rewards = mdp.TokenScores(logp, ref_logp, None, mask).rewards(BETA)
        steps = mdp.step_rewards(rewards, mask, jnp.asarray(step_ids), num_steps=len(ends))
        after = []
        for end in ends:
            assert responses(found[end], row) == [response[:end]]
            after.append(found[end].score[row, 0])
        np.testing.assert_allclose(np.diff([0, *after]), steps, atol=1e-4)
        delimited |= ends == [1, 3]
    assert delimited  # has ended a chunk of one token


def test_a_transformer(micro, log_pi):
    model, params = micro
    reference = jax.tree.map(lambda x: 0.7 * x, params)
    found = search((Ensemble((model, model)), (params, reference)))
    for row in range(2):
        assert responses(found, row)
        for n, response in enumerate(responses(found, row)):
            prompt = PROMPTS[row, : LENGTHS[row]].tolist()
            logp, ref_logp = (log_pi(model, p, prompt, [response]).sum() for p in (params, reference))
            np.testing.assert_allclose([found.logp[row, n], found.ref_logp[row, n]], [logp, ref_logp], atol=1e-4)
            np.testing.assert_allclose(found.score[row, n], BETA * (logp - ref_logp), atol=1e-4)


@pytest.mark.thin("change1", "change3")
@pytest.mark.parametrize("change", [{"beams": 1}, {"samples": 4}, {"chunk_length": 3}, {"delimiter_ids": ()}])
def test_every_option_changes_the_result(pair, next_logps, reward, change):
    options = replace(OPTIONS, **change)
    plain, other = search(pair, seed=1), search(pair, options, seed=1)
    assert [responses(plain, row) for row in range(2)] != [responses(other, row) for row in range(2)]
    for row in range(2):
        assert responses(other, row) == restated(next_logps, row, keys_of(1)[row], options, reward)


def test_options_of_sampling_reach_the_sampler():
    rules = Constraints(no_repeat_ngram_size=2)
    options = ChunkOptions(7, (0, 1), 2, 3, 4, (), 0.7, 5, 0.9, 0.1, rules)
    assert options.sampling == SampleOptions(
        7, (0, 1), num_samples=6, temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, constraints=rules
    )


def test_a_rule_holds_across_chunks(pair):
    # No word twice, the prompt's included, although its first ones were said in an earlier chunk.
    rules = Constraints(no_repeat_ngram_size=1)
    found = search(pair, replace(OPTIONS, constraints=rules), rows=slice(1, 2))
    for response in responses(found, 0):
        assert len(set(response)) == len(response) and 3 not in response
    assert any(0 not in response[:-1] and len(response) > 2 for response in responses(found, 0))


def test_responses_of_one_token(pair, next_logps):
    found = search(pair, replace(OPTIONS, max_new_tokens=1))
    for row in range(2):
        got = responses(found, row)
        assert 0 < len(got) == len(set(got))
        expected = [BETA * np.subtract(*next_logps(row, ())[:, token]) for (token,) in got]
        np.testing.assert_allclose(found.score[row, : len(got)], expected, atol=1e-4)
        assert (np.diff(expected) <= 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beams": 0}, "beams 0"),
        ({"samples": 0}, "samples 0"),
        ({"chunk_length": 0}, "chunk_length 0"),
        ({"delimiter_ids": (0,)}, "delimiter_ids"),
        ({"top_p": 2.0}, "top_p 2.0"),
        ({"temperature": 0.0}, "same response 4 times"),
    ],
)
def test_options_without_meaning_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        replace(OPTIONS, **options)
