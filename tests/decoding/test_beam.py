import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax.decoding import beam_search, sample

LENGTH = 4
PROMPTS = [[1, 2, 3, 4, 1], [3], [2, 4, 4]]


def padded(prompts, pad=0):
    rows = [prompt + [pad] * (5 - len(prompt)) for prompt in prompts]  # one width: one program
    return jnp.array(rows, jnp.int32), jnp.array([len(prompt) for prompt in prompts], jnp.int32)


def search(micro, prompts=PROMPTS, *, beams, eos_ids=(0,), length=LENGTH, pad=0):
    model, params = micro
    options = {"beams": beams, "max_new_tokens": length, "eos_ids": eos_ids}
    return jax.device_get(beam_search(model, params, *padded(prompts, pad), **options))


def answers(found, row):
    """(tokens, score) of the answers that exist."""
    return [
        (tuple(found.tokens[row, k, : found.lengths[row, k]].tolist()), found.logp[row, k])
        for k in range(found.logp.shape[1])
        if found.logp[row, k] > -np.inf
    ]


@pytest.mark.parametrize(("eos_ids", "count"), [((0,), 341), ((0, 3), 161)])
def test_a_beam_wider_than_the_tree_finds_every_answer_in_order(micro, all_answers, eos_ids, count):
    found = search(micro, beams=350, eos_ids=eos_ids)
    for row, prompt in enumerate(PROMPTS):
        expected = all_answers(prompt, LENGTH, eos_ids)
        got = answers(found, row)
        assert len(expected) == len(got) == count
        np.testing.assert_allclose([s for _, s in got], [s for _, s in expected], rtol=1e-5, atol=1e-5)
        # Scores closer than rounding may change places; the answers must be the same to the last one.
        assert dict(got).keys() == dict(expected).keys()
        scores = dict(expected)
        for (tokens, score), (other, other_score) in zip(got, expected, strict=True):
            assert abs(score - scores[tokens]) < 1e-4 and (tokens == other or abs(score - other_score) < 1e-4)
        # Probabilities of all answers add up to 1: they are a partition.
        np.testing.assert_allclose(np.exp(found.logp[row]).sum(), 1, atol=1e-4)
        assert (found.logp[row, count:] == -np.inf).all() and (found.lengths[row, count:] == 0).all()
        assert not found.finished[row, count:].any()
        ends_in_eos = [tokens[-1] in eos_ids for tokens, _ in got]
        assert found.finished[row, :count].tolist() == ends_in_eos


def test_top_answer_of_a_wide_beam_is_the_best_of_all(micro, all_answers):
    # 64 live prefixes are all that four words have before the last token.
    found = search(micro, beams=74)
    for row, prompt in enumerate(PROMPTS):
        tokens, score = all_answers(prompt, LENGTH, (0,))[0]
        assert answers(found, row)[0][0] == tokens and abs(found.logp[row, 0] - score) < 2e-5


@pytest.mark.parametrize("beams", [1, 2, 3, 7])
def test_narrow_beams_equal_a_plain_restatement(micro, prefix_scores, beams):
    found = search(micro, beams=beams)
    for row, prompt in enumerate(PROMPTS):
        score_of = prefix_scores(prompt)
        live, ended = [((), 0.0)], []
        for _ in range(LENGTH):
            extended = [((*tokens, v), score_of[*tokens, v]) for tokens, _ in live for v in range(5)]
            ended = best(ended + [item for item in extended if item[0][-1] == 0], beams)
            live = best([item for item in extended if item[0][-1] != 0], beams)
        expected = best(ended + live, beams)
        got = answers(found, row)
        assert [tokens for tokens, _ in got] == [tokens for tokens, _ in expected]
        np.testing.assert_allclose([s for _, s in got], [s for _, s in expected], rtol=0, atol=2e-5)


def best(items, count):
    return sorted(items, key=lambda item: -item[1])[:count]


@pytest.mark.parametrize("beams", [1, 2, 3, 4])
def test_an_unlikely_eos_is_not_crowded_out(table_lm, beams):
    # EOS, 1, 2. The likeliest answer (1, EOS) has p = .495 * .32 = .158, yet its EOS ranks last among the
    # extensions of each prefix: rules that keep EOS only among the first K or 2K candidates lose it.
    model, params = table_lm([[0.01, 0.495, 0.495], [0.32, 0.34, 0.34], [1 / 3, 1 / 3, 1 / 3]])
    prompt = jnp.array([[1]]), jnp.array([1])
    found = beam_search(model, params, *prompt, beams=beams, max_new_tokens=3, eos_ids=(0,))
    assert found.tokens[0, 0, :2].tolist() == [1, 0] and found.lengths[0, 0] == 2
    np.testing.assert_allclose(np.exp(found.logp[0, 0]), 0.495 * 0.32, rtol=1e-5)
    assert found.finished[0, 0]


def test_the_limit_cuts_answers_that_compete_on_equal_terms(table_lm):
    model, params = table_lm([[0.1, 0.9], [0.1, 0.9]])
    found = beam_search(model, params, jnp.array([[1]]), jnp.array([1]), beams=3, max_new_tokens=2, eos_ids=(0,))
    np.testing.assert_allclose(np.exp(found.logp[0]), [0.81, 0.1, 0.09], rtol=1e-5)
    assert found.finished[0].tolist() == [False, True, True] and found.lengths[0].tolist() == [2, 1, 2]


def test_one_new_token(micro, all_answers):
    found = search(micro, beams=5, length=1)
    for row, prompt in enumerate(PROMPTS):
        assert [tokens for tokens, _ in answers(found, row)] == [t for t, _ in all_answers(prompt, 1, (0,))]


@pytest.mark.parametrize("beams", [1, 4])
def test_scores_are_sums_of_log_pi_over_the_returned_tokens(tiny_model, tiny_params, log_pi, beams):
    prompts = [[1, 20, 7, 33], [1, 5]]
    found = search((tiny_model, tiny_params), prompts, beams=beams, eos_ids=(2, 9), length=10)
    for row, prompt in enumerate(prompts):
        got = answers(found, row)
        assert len(got) == beams == len({tokens for tokens, _ in got})  # no answer is found twice
        scores = [score for _, score in got]
        assert scores == sorted(scores, reverse=True)
        for k, (tokens, score) in enumerate(got):
            np.testing.assert_allclose(score, log_pi(tiny_model, tiny_params, prompt, [tokens]).sum(), atol=1e-4)
            assert found.finished[row, k] == (tokens[-1] in (2, 9))
            assert not set(tokens[:-1]) & {2, 9} and (found.finished[row, k] or len(tokens) == 10)


def test_width_1_is_never_worse_than_greedy(micro):
    # With EOS split off, width 1 follows greedy's path and keeps the best end that it passes.
    found = search(micro, beams=1)
    model, params = micro
    options = {"max_new_tokens": LENGTH, "eos_ids": (0,)}
    greedy = sample(model, params, *padded(PROMPTS), jax.random.key(0), **options)
    assert (found.logp[:, 0] >= np.asarray(greedy.logp[:, 0]) - 1e-5).all()


def test_wider_beams_do_not_lose_score_here(micro):
    # Not a theorem for every model, but true for this one: a search that mixes up its rows breaks it at once.
    tops = [search(micro, beams=beams).logp[:, 0] for beams in (1, 7, 64)]
    assert (np.diff(tops, axis=0) >= -1e-5).all()


def test_a_row_alone_equals_the_row_in_a_batch(micro):
    together = search(micro, beams=7)
    for row, prompt in enumerate(PROMPTS):
        alone = search(micro, [prompt], beams=7)
        assert [tokens for tokens, _ in answers(alone, 0)] == [tokens for tokens, _ in answers(together, row)]
        np.testing.assert_allclose(alone.logp[0], together.logp[row], rtol=0, atol=1e-5)


def test_padding_of_prompts_has_no_effect(micro):
    for name in ("tokens", "lengths", "finished"):
        one, other = (getattr(search(micro, beams=7, pad=pad), name) for pad in (0, 4))
        np.testing.assert_array_equal(one, other)


def test_a_prompt_that_holds_eos_is_not_finished(micro, all_answers):
    prompt = [0, 2, 0]
    found = search(micro, [prompt], beams=7)
    tokens, score = all_answers(prompt, LENGTH, (0,))[0]
    assert answers(found, 0)[0][0] == tokens and abs(found.logp[0, 0] - score) < 2e-5


def test_a_row_that_is_done_early_waits_for_the_others(table_lm):
    # Position, last token -> next token: a prompt ending in 1 stops at once, one ending in 2 never does.
    model, _ = table_lm([[0.5, 0.5]])
    sure, never = np.log([0.98, 0.01, 0.01]), np.log([1e-6, 0.1, 0.9 - 1e-6])
    table = jnp.asarray(np.stack([[sure, sure, never]] * 3), jnp.float32)
    prompts, lengths = jnp.array([[1], [2]]), jnp.array([1, 1])
    found = beam_search(model, {"logits": table}, prompts, lengths, beams=2, max_new_tokens=5, eos_ids=(0,))
    assert found.tokens[0, 0, 0] == 0 and found.lengths[0, 0] == 1
    assert found.tokens[1, 0].tolist() == [2] * 5 and not found.finished[1, 0]
    np.testing.assert_allclose(found.logp[1, 0], 5 * np.log(0.9), atol=1e-4)
