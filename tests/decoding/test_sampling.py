import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax.decoding import sample
from qstar_jax.decoding.sampling import restrict

PROMPTS, LENGTHS = jnp.array([[1, 20, 7, 33], [1, 5, 0, 0]]), jnp.array([4, 2])


def restated(logits, top_k, top_p):
    """Sort, count, add up: in float64, one row at a time."""
    kept = np.full_like(logits, -np.inf)
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: top_k or None]
    probs = np.exp(logits[order] - logits[order].max())
    probs /= probs.sum()
    before = 0.0
    for token, p in zip(order, probs, strict=True):
        if before >= top_p and token != order[0]:
            break
        kept[token] = logits[token]
        before += p
    return kept


@pytest.mark.parametrize("top_k", [0, 1, 2, 5, 11, 12, 100])
@pytest.mark.parametrize("top_p", [1.0, 0.999, 0.7, 0.3, 1e-6])
def test_restrict_equals_a_restatement(top_k, top_p):
    logits = np.random.default_rng(0).normal(size=(4, 12)).astype(np.float32) * 2
    found = restrict(jnp.asarray(logits), top_k=top_k, top_p=top_p)
    np.testing.assert_array_equal(found, [restated(row, top_k, top_p) for row in logits.astype(np.float64)])


def kept(probabilities, **options):
    found = np.asarray(restrict(jnp.log(jnp.array(probabilities)), **options))
    return np.flatnonzero(found > -np.inf).tolist()


def test_top_p_keeps_the_token_that_reaches_the_sum():
    probabilities = [0.125, 0.5, 0.25, 0.125]  # exact in binary
    assert kept(probabilities, top_p=0.4) == [1]
    assert kept(probabilities, top_p=0.5) == [1]  # reached exactly: nothing more
    assert kept(probabilities, top_p=0.51) == [1, 2]
    assert kept(probabilities, top_p=0.75) == [1, 2]
    assert kept(probabilities, top_p=0.8) == [0, 1, 2]  # of equals, the lower id
    assert kept(probabilities, top_p=1.0) == [0, 1, 2, 3]


def test_top_k_ties_go_to_the_lower_id():
    assert kept([0.2, 0.3, 0.2, 0.3], top_k=1) == [1]
    assert kept([0.2, 0.3, 0.2, 0.3], top_k=3) == [0, 1, 3]


def test_top_p_counts_within_top_k():
    # Of the two likeliest, the first has 0.5 / 0.75 = 2/3 of what is left.
    assert kept([0.125, 0.5, 0.25, 0.125], top_k=2, top_p=0.6) == [1]
    assert kept([0.125, 0.5, 0.25, 0.125], top_k=2, top_p=0.7) == [1, 2]


def draw(model, params, *, seed=0, prompts=PROMPTS, lengths=LENGTHS, eos_ids=(2,), max_new_tokens=8, **options):
    key = jax.random.key(seed)
    found = sample(model, params, prompts, lengths, key, eos_ids=eos_ids, max_new_tokens=max_new_tokens, **options)
    return jax.device_get(found)


@pytest.fixture(scope="module")
def logits_of(tiny_model):
    return jax.jit(tiny_model.logits)


@pytest.mark.parametrize("eos_ids", [(2,), (2, 12), (46,)])
def test_greedy_equals_the_naive_loop(tiny_model, tiny_params, logits_of, eos_ids):
    found = draw(tiny_model, tiny_params, eos_ids=eos_ids)
    for row, length in enumerate(LENGTHS):
        tokens, score = PROMPTS[row, :length].tolist(), 0.0
        for _ in range(8):
            padded = jnp.zeros((1, 16), jnp.int32).at[0, : len(tokens)].set(jnp.array(tokens))
            logp = jax.nn.log_softmax(logits_of(tiny_params, padded, jnp.array([len(tokens)]))[0, len(tokens) - 1])
            tokens.append(int(logp.argmax()))
            score += float(logp.max())
            if tokens[-1] in eos_ids:
                break
        answer = tokens[int(length) :]
        assert found.tokens[row, 0, : found.lengths[row, 0]].tolist() == answer
        assert found.finished[row, 0] == (answer[-1] in eos_ids)
        np.testing.assert_allclose(found.logp[row, 0], score, atol=1e-4)


def test_scores_are_sums_of_log_pi_whatever_the_sampling(tiny_model, tiny_params, log_pi):
    # At temperature 1 and over the whole vocabulary, although the tokens are drawn otherwise.
    found = draw(tiny_model, tiny_params, num_samples=3, temperature=0.7, top_k=30, top_p=0.9, eos_ids=(2, 9, 14))
    assert found.tokens.shape == (2, 3, 8)
    for row, length in enumerate(LENGTHS):
        for n in range(3):
            answer = found.tokens[row, n, : found.lengths[row, n]]
            expected = log_pi(tiny_model, tiny_params, np.asarray(PROMPTS[row, :length]), [answer]).sum()
            np.testing.assert_allclose(found.logp[row, n], expected, atol=1e-4)
            assert found.finished[row, n] == (answer[-1] in (2, 9, 14))
            assert found.finished[row, n] or len(answer) == 8


def test_samples_of_one_prompt_differ_and_come_from_their_own_prompt(tiny_model, tiny_params):
    found = draw(tiny_model, tiny_params, num_samples=8, temperature=1.0)
    assert len({tuple(answer) for answer in found.tokens[0].tolist()}) > 1
    assert found.tokens[0].tolist() != found.tokens[1].tolist()


COUNT = 4000
PROBABILITIES = np.array([0.05, 0.1, 0.4, 0.25, 0.2])


def chi_square(table_lm, probabilities, expected, **options):
    """Statistic of many first tokens; fixed seed, so the test gives the same answer each time."""
    model, params = table_lm([probabilities])
    options = {"temperature": 1.0, "max_new_tokens": 1, "num_samples": COUNT, **options}
    found = draw(model, params, prompts=jnp.array([[1]]), lengths=jnp.array([1]), eos_ids=(0,), **options)
    counts = np.bincount(found.tokens[0, :, 0], minlength=len(expected))
    assert counts[expected == 0].sum() == 0
    likely = expected > 0
    return ((counts - COUNT * expected)[likely] ** 2 / (COUNT * expected[likely])).sum()


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({}, PROBABILITIES),
        ({"temperature": 2.0}, PROBABILITIES**0.5),
        ({"temperature": 0.5}, PROBABILITIES**2),
        ({"top_k": 3}, PROBABILITIES * [0, 0, 1, 1, 1]),
        ({"top_p": 0.6}, PROBABILITIES * [0, 0, 1, 1, 0]),
        ({"top_k": 4, "top_p": 0.9, "temperature": 2.0}, PROBABILITIES**0.5 * [0, 1, 1, 1, 1]),
    ],
)
def test_frequencies_are_the_exact_probabilities(table_lm, options, weights):
    # 18.5 is the 99.9 % point of chi-square with four degrees of freedom.
    assert chi_square(table_lm, PROBABILITIES, weights / weights.sum(), **options) < 18.5


def test_the_frequency_test_can_fail(table_lm):
    assert chi_square(table_lm, PROBABILITIES, PROBABILITIES, temperature=1.3) > 18.5


def test_every_option_changes_the_result(table_lm):
    model, params = table_lm([PROBABILITIES])
    prompt = {"prompts": jnp.array([[1], [2]]), "lengths": jnp.array([1, 1]), "temperature": 1.0, "num_samples": 8}
    plain = draw(model, params, **prompt).tokens
    np.testing.assert_array_equal(draw(model, params, **prompt).tokens, plain)
    for change in ({"seed": 1}, {"temperature": 0.3}, {"top_k": 2}, {"top_p": 0.2}):
        assert (draw(model, params, **prompt | change).tokens != plain).any(), change


def test_top_k_1_is_greedy(tiny_model, tiny_params):
    greedy = draw(tiny_model, tiny_params)
    found = draw(tiny_model, tiny_params, temperature=1.0, top_k=1)
    np.testing.assert_array_equal(found.tokens, greedy.tokens)


def test_a_greedy_row_alone_equals_the_row_in_a_batch(tiny_model, tiny_params):
    together = draw(tiny_model, tiny_params, max_new_tokens=6)
    for row in range(2):
        prompt, length = PROMPTS[row : row + 1], LENGTHS[row : row + 1]
        alone = draw(tiny_model, tiny_params, prompts=prompt, lengths=length, max_new_tokens=6)
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])


def test_rows_end_one_by_one_and_nothing_counts_after_the_end(table_lm):
    # After token 1 comes EOS; token 2 repeats itself.
    model, _ = table_lm([[0.5, 0.5]])
    table = np.full((1, 3, 3), 1e-9)
    table[0, 0], table[0, 1, 0], table[0, 2, 2] = 1 / 3, 1.0, 1.0
    params = {"logits": jnp.log(jnp.asarray(table, jnp.float32))}
    found = draw(
        model, params, prompts=jnp.array([[1], [2]]), lengths=jnp.array([1, 1]), eos_ids=(0,), max_new_tokens=5
    )
    assert found.lengths[:, 0].tolist() == [1, 5] and found.finished[:, 0].tolist() == [True, False]
    assert found.tokens[0, 0, 0] == 0 and found.tokens[1, 0].tolist() == [2] * 5
    np.testing.assert_allclose(found.logp[:, 0], [0, 0], atol=1e-6)
