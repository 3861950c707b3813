from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax.decoding import SampleOptions, sample
from qstar_jax.decoding.constraints import Constraints
from qstar_jax.decoding.objectives import ImplicitReward, Likelihood, LogitArithmetic
from qstar_jax.decoding.policies import Ensemble
from qstar_jax.decoding.responses import Finish
from qstar_jax.decoding.sampler import Sampler
from qstar_jax.decoding.sampling import restrict
from qstar_jax.decoding.stop_strings import StopStrings

PROMPTS = [[1, 2, 3, 4, 1], [3], [2, 0, 0]]  # the last one ends in EOS
WIDTH, LENGTH, EOS = 6, 5, (0,)


def padded(prompts, width=WIDTH, pad=0):
    rows = [prompt + [pad] * (width - len(prompt)) for prompt in prompts]
    return jnp.array(rows, jnp.int32), jnp.array([len(prompt) for prompt in prompts], jnp.int32)


def row_keys(rows, seed=0):
    return jax.random.split(jax.random.key(seed), rows)


def draw(
    model, params, *, prompts=PROMPTS, keys=None, pad=0, width=WIDTH, objective=Likelihood(), stop=None, **options
):
    options = SampleOptions(**{"max_new_tokens": LENGTH, "eos_ids": EOS, **options})
    keys = row_keys(len(prompts)) if keys is None and options.temperature else keys
    found = sample(model, params, *padded(prompts, width, pad), keys, options, objective=objective, stop_strings=stop)
    return jax.device_get(found)


def responses(found, row):
    return [found.tokens[row, n, : found.lengths[row, n]].tolist() for n in range(found.tokens.shape[1])]


# --- restrict ---


def restated(logits, top_k=0, top_p=1.0, min_p=0.0):
    """Sort, count, add up: in float64, one row at a time."""
    kept = np.full_like(logits, -np.inf)
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: top_k or None]
    probs = np.exp(logits[order] - logits[order].max())
    probs /= probs.sum()
    before = 0.0
    for token, p in zip(order, probs, strict=True):
        if before >= top_p and token != order[0]:
            break
        if p >= min_p * probs[0]:
            kept[token] = logits[token]
        before += p
    return kept


@pytest.mark.parametrize("top_k", [0, 1, 2, 5, 11, 12, 100])
@pytest.mark.parametrize(
    ("top_p", "min_p"), [(1.0, 0.0), (0.999, 0.05), (0.7, 0.0), (0.3, 0.5), (1e-6, 0.0), (1.0, 0.2)]
)
def test_restrict_equals_a_restatement(top_k, top_p, min_p):
    logits = np.random.default_rng(0).normal(size=(4, 12)).astype(np.float32) * 2
    logits[2, 3:7] = logits[2, 2]  # ties
    found = restrict(jnp.asarray(logits), top_k=top_k, top_p=top_p, min_p=min_p)
    expected = [restated(row, top_k, top_p, min_p) for row in logits.astype(np.float64)]
    np.testing.assert_array_equal(found, expected)


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
    # Of the two most likely, the first has 0.5 / 0.75 = 2/3 of what is left.
    assert kept([0.125, 0.5, 0.25, 0.125], top_k=2, top_p=0.6) == [1]
    assert kept([0.125, 0.5, 0.25, 0.125], top_k=2, top_p=0.7) == [1, 2]


def test_min_p_keeps_the_token_at_its_boundary():
    probabilities = [0.125, 0.5, 0.25, 0.125]
    assert kept(probabilities, min_p=0.5) == [1, 2]
    assert kept(probabilities, min_p=0.51) == [1]
    assert kept(probabilities, min_p=0.2) == [0, 1, 2, 3]
    assert kept(probabilities, min_p=1.0) == [1]
    # It asks for a fraction of the most likely, whatever top_p has left.
    assert kept(probabilities, top_p=0.75, min_p=0.2) == [1, 2]


def test_top_p_of_bfloat16_logits_is_summed_in_float32():
    rows, size, top_p = 1, 4096, 0.9
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(rows, size)) * 0.1, jnp.bfloat16)
    found = np.asarray(restrict(logits, top_p=top_p))
    assert found.dtype == np.float32
    expected = restated(np.asarray(logits[0], np.float64), top_p=top_p)
    # One token more or less where the two sums round differently at the boundary.
    assert ((found[0] > -np.inf) != (expected > -np.inf)).sum() <= 1
    # The defect this guards against: a sum in bfloat16 stops growing, and everything would be kept.
    ranked = jnp.sort(jax.nn.softmax(logits[0]))[::-1]
    total = jnp.bfloat16(0)
    for p in np.asarray(ranked, np.float32):
        total = jnp.bfloat16(total + jnp.bfloat16(p))
    assert total < top_p


def test_rows_without_a_token_stay_so():
    logits = jnp.full((1, 4), -jnp.inf)
    assert (np.asarray(restrict(logits, top_k=2, top_p=0.5, min_p=0.1)) == -np.inf).all()


# --- samples ---


@pytest.fixture(scope="module")
def single(history_lm):
    """(model, parameters) whose every next word depends on all before."""
    return history_lm(3)


@pytest.fixture(scope="module")
def pair(single, history_lm):
    """(ensemble, parameters) of it and a flatter reference."""
    model, params = single
    return Ensemble((model, model)), (params, history_lm(4, scale=0.7)[1])


@pytest.fixture(scope="module")
def next_logp(history_logp):
    """`next_logp(params, text)`: log pi of every next word [V] in float64, in plain Python."""
    return lambda params, text: history_logp(params, text, [])[-1]


def restated_sample(next_logp, params, prompt, key, options):
    """One response with its sums of log pi and log pi_ref, token by token over whole texts."""
    tokens, sums = [], np.zeros(2)
    for t in range(options.max_new_tokens):
        logp, ref_logp = (next_logp(p, prompt + tokens) for p in params)
        allowed = logp.copy()
        if t < options.constraints.min_new_tokens:
            allowed[list(options.eos_ids)] = -np.inf
        for token in set(prompt + tokens):
            allowed[token] *= options.constraints.repetition_penalty
        allowed = restated(allowed / options.temperature, options.top_k, options.top_p, options.min_p)
        noise = np.asarray(jax.random.gumbel(jax.random.fold_in(key, t), (len(logp),)))
        token = int(np.argmax(allowed + noise))
        tokens.append(token)
        sums += logp[token], ref_logp[token]
        if token in options.eos_ids:
            break
    return tokens, sums


OPTIONS = [
    {},
    {"temperature": 0.7, "top_k": 4, "top_p": 0.95, "min_p": 0.05},
    {"temperature": 1.5, "constraints": Constraints(min_new_tokens=3, repetition_penalty=1.3)},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_samples_equal_a_restatement_with_their_scores_under_both_policies(pair, next_logp, options):
    found = draw(*pair, num_samples=3, objective=ImplicitReward(0.5), **options)
    plain = SampleOptions(LENGTH, EOS, 3, **options)
    for row, prompt in enumerate(PROMPTS):
        for n in range(3):
            key = jax.random.fold_in(row_keys(len(PROMPTS))[row], n)
            tokens, (logp, ref_logp) = restated_sample(next_logp, pair[1], prompt, key, plain)
            assert responses(found, row)[n] == tokens
            # Of the whole distribution at temperature 1, although the tokens are drawn otherwise.
            np.testing.assert_allclose(found.logp[row, n], logp, atol=1e-4)
            np.testing.assert_allclose(found.ref_logp[row, n], ref_logp, atol=1e-4)
            np.testing.assert_allclose(found.score[row, n], 0.5 * (logp - ref_logp), atol=1e-4)
            assert found.finish[row, n] == (Finish.EOS if tokens[-1] == 0 else Finish.LENGTH)
            assert (found.tokens[row, n, len(tokens) :] == 0).all()
    assert len({tuple(a) for row in range(3) for a in responses(found, row)}) > 3
    assert len(set(found.finish.ravel().tolist())) == 2


def test_a_prompts_samples_depend_on_its_key_alone(micro, log_pi):
    together = draw(*micro, num_samples=4)
    keys = row_keys(len(PROMPTS))
    for row, prompt in enumerate(PROMPTS):
        alone = draw(*micro, prompts=[prompt], keys=keys[row : row + 1], num_samples=2, width=8, pad=3)
        assert responses(alone, 0) == responses(together, row)[:2]
        np.testing.assert_allclose(alone.logp[0], together.logp[row, :2], atol=1e-5)
        for n, response in enumerate(responses(together, row)):
            logp = log_pi(*micro, prompt, [response]).sum()  # by a full pass
            np.testing.assert_allclose(together.logp[row, n], logp, atol=1e-4)
    other = draw(*micro, num_samples=4, keys=row_keys(len(PROMPTS), seed=1))
    assert responses(other, 0) != responses(together, 0)


@pytest.mark.parametrize("pad", [0, 3])
def test_padding_is_not_read_even_where_it_is_eos(micro, pad):
    # Program and keys of the test above: one prompt contains EOS, and in one of the two cases padding is EOS.
    found, plain = draw(*micro, num_samples=4, pad=pad), draw(*micro, num_samples=4, pad=4)
    np.testing.assert_array_equal(found.tokens, plain.tokens)
    np.testing.assert_array_equal(found.logp, plain.logp)


@pytest.mark.parametrize("eos_ids", [(0,), (2, 4), ()])
def test_greedy_equals_the_naive_loop(single, next_logp, eos_ids):
    found = draw(*single, temperature=0.0, eos_ids=eos_ids)
    for row, prompt in enumerate(PROMPTS):
        tokens, score = [], 0.0
        while len(tokens) < LENGTH and (not tokens or tokens[-1] not in eos_ids):
            logp = next_logp(single[1], prompt + tokens)
            tokens.append(int(logp.argmax()))
            score += logp.max()
        assert responses(found, row) == [tokens]
        assert found.finished[row, 0] == (tokens[-1] in eos_ids)
        np.testing.assert_allclose(found.logp[row, 0], score, atol=1e-4)


def test_top_k_1_is_greedy(single):
    greedy, found = draw(*single, temperature=0.0), draw(*single, top_k=1)
    np.testing.assert_array_equal(found.tokens, greedy.tokens)


def test_greedy_takes_the_lowest_of_equals(table_lm):
    found = draw(*table_lm([[0.1, 0.2, 0.35, 0.35]] * 4), prompts=[[1]], temperature=0.0, max_new_tokens=3)
    assert responses(found, 0) == [[2, 2, 2]]


def test_samples_of_one_token(single, next_logp):
    found = draw(*single, num_samples=3, max_new_tokens=1)
    for row, prompt in enumerate(PROMPTS):
        first = found.tokens[row, :, 0]
        np.testing.assert_allclose(found.logp[row], next_logp(single[1], prompt)[first], atol=1e-4)
        assert (found.lengths[row] == 1).all()
        assert found.finished[row].tolist() == (first == 0).tolist()


def test_without_eos_every_response_has_full_length(single):
    found = draw(*single, num_samples=3, eos_ids=())
    assert (found.lengths == LENGTH).all() and (found.finish == Finish.LENGTH).all()


# --- frequencies ---

PROBABILITIES = np.array([0.05, 0.1, 0.4, 0.25, 0.2])
COUNT = 1000  # of each of four prompts


def chi_square(found, expected):
    """Statistic of responses against probabilities of all sequences of their length, [V] or [V, V]."""
    tokens = found.tokens.reshape(-1, expected.ndim)
    counts = np.zeros(expected.shape)
    np.add.at(counts, tuple(tokens.T), 1)
    assert counts[expected == 0].sum() == 0
    likely, total = expected > 0, len(tokens)
    return ((counts - total * expected)[likely] ** 2 / (total * expected[likely])).sum()


def draw_many(table_lm, steps, **options):
    options = {"prompts": [[1]] * 4, "num_samples": COUNT, "max_new_tokens": len(steps), "eos_ids": (), **options}
    return draw(*table_lm(steps), **options)


CASES = [
    ({}, PROBABILITIES),
    ({"temperature": 2.0}, PROBABILITIES**0.5),
    ({"temperature": 0.5}, PROBABILITIES**2),
    ({"top_k": 3}, PROBABILITIES * [0, 0, 1, 1, 1]),
    ({"top_p": 0.6}, PROBABILITIES * [0, 0, 1, 1, 0]),
    ({"min_p": 0.3}, PROBABILITIES * [0, 0, 1, 1, 1]),
    ({"top_k": 4, "top_p": 0.9, "temperature": 2.0}, PROBABILITIES**0.5 * [0, 1, 1, 1, 1]),
]


@pytest.mark.parametrize(("options", "weights"), CASES)
def test_frequencies_are_the_exact_probabilities(table_lm, options, weights):
    # 18.5 is the 99.9 % point of chi-square with four degrees of freedom; the seed is fixed, so the alarm is too.
    assert chi_square(draw_many(table_lm, [PROBABILITIES], **options), weights / weights.sum()) < 18.5


def test_the_frequency_test_can_fail(table_lm):
    assert chi_square(draw_many(table_lm, [PROBABILITIES], temperature=1.3), PROBABILITIES) > 18.5


def test_tokens_of_one_response_are_independent_draws(table_lm):
    second = PROBABILITIES[::-1]
    found = draw_many(table_lm, [PROBABILITIES, second])
    # 51.2 is the 99.9 % point with 24 degrees of freedom. If both tokens had one key, it would be in the thousands.
    assert chi_square(found, np.outer(PROBABILITIES, second)) < 51.2
    np.testing.assert_allclose(
        found.logp, np.log(PROBABILITIES)[found.tokens[..., 0]] + np.log(second)[found.tokens[..., 1]], atol=1e-5
    )


def test_logit_arithmetic_samples_from_the_combined_policy(table_lm):
    base, tuned, untuned = PROBABILITIES, PROBABILITIES[::-1].copy(), np.full(5, 0.2)
    made = [table_lm([p]) for p in (base, tuned, untuned)]
    model, params = Ensemble(tuple(m for m, _ in made)), tuple(p for _, p in made)
    options = {"prompts": [[1]] * 4, "num_samples": COUNT, "max_new_tokens": 1, "eos_ids": ()}
    found = draw(model, params, objective=LogitArithmetic((0.5,)), **options)
    weights = base * (tuned / untuned) ** 0.5
    assert chi_square(found, weights / weights.sum()) < 18.5
    assert chi_square(found, base) > 18.5
    np.testing.assert_allclose(found.ref_logp, np.log(base)[found.tokens[..., 0]], atol=1e-5)


# --- options, ends and errors ---


def test_limits_and_rules_change_the_result(table_lm):
    made = table_lm([PROBABILITIES] * 4)
    common = {"prompts": [[1], [2]], "num_samples": 8, "max_new_tokens": 4}
    plain = draw(*made, **common)
    np.testing.assert_array_equal(draw(*made, **common).tokens, plain.tokens)
    rules = Constraints(no_repeat_ngram_size=1)
    # What restricts the distribution is in the frequencies above.
    for change in ({"eos_ids": (2,)}, {"max_new_tokens": 3}, {"constraints": rules}):
        other = draw(*made, **common | change)
        assert [responses(other, row) for row in range(2)] != [responses(plain, row) for row in range(2)], change


def test_a_stop_string_ends_an_response(table_lm):
    # Words are their own letters; the string is "33".
    table = np.zeros((1, 3, 5), np.int32)
    table[0, 0, 3], table[0, 1, 3], table[0, 2] = 1, 2, 2
    stop = StopStrings(jnp.asarray(table), jnp.array([2]))
    common = {"prompts": [[3], [3]], "num_samples": 16, "max_new_tokens": 4}
    model, params = table_lm([[0.1, 0.2, 0.2, 0.5, 0.0]] * 4)
    plain, found = draw(model, params, **common), draw(model, params, stop=stop, **common)
    for row in range(2):
        for before, after, finish in zip(responses(plain, row), responses(found, row), found.finish[row], strict=True):
            text = "".join(map(str, before))
            cut = text.find("33")  # the prompt's own 3 does not count
            assert after == (before if cut < 0 else before[: cut + 2])
            assert (finish == Finish.STOP) == (cut >= 0)
    assert set(found.finish.ravel().tolist()) == {Finish.EOS, Finish.LENGTH, Finish.STOP}


def test_where_nothing_may_be_said_there_is_no_response(table_lm):
    # Two words, each of which may be said once, and no EOS: the prompt has said one, the response says the other.
    found = draw(
        *table_lm([[0.5, 0.5]] * 4),
        prompts=[[1]],
        eos_ids=(),
        max_new_tokens=3,
        num_samples=2,
        constraints=Constraints(no_repeat_ngram_size=1),
    )
    assert (found.finish == Finish.INVALID).all() and (found.lengths == 0).all() and (found.tokens == 0).all()
    assert (found.logp == -np.inf).all() and (found.score == -np.inf).all()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Passes:
    """Where each response ends, and how many passes there were."""

    ends: jax.Array
    count: jax.Array

    def reorder(self, slots):
        return self


@dataclass(frozen=True)
class Counting:
    """Says EOS at a place that the prompt names, and counts."""

    def prefill(self, params, prompts, prompt_lengths, slots):
        return self.logits(prompts[:, 0] == 1), Passes(prompts[:, 0], jnp.int32(0))

    def extend(self, params, memory, tokens, path, slot):
        logits = self.logits(path.sum(-1) + 1 == memory.ends[:, None])
        return logits, replace(memory, count=memory.count + 1)

    def logits(self, end):
        return jnp.where(end[..., None], jnp.array([0.0, -jnp.inf]), jnp.array([-jnp.inf, 0.0]))


def test_the_loop_ends_with_the_last_sample():
    prompts, lengths = padded([[2], [4]], width=1)
    options = SampleOptions(9, EOS)
    sampler = Sampler(Counting(), None, prompts, lengths, options, Likelihood())
    state = sampler.run(sampler.start(row_keys(2), 3, 8 * 3), 8, draw=1, slot=0)
    assert state.partial.lengths.tolist() == [[2] * 3, [4] * 3]
    assert state.memory.count == 3  # tokens before the last one of the longest
    # A pass over the last token is never made, and none at all for responses of one token.
    sampler = replace(sampler, prompts=jnp.ones_like(prompts))
    assert sampler.run(sampler.start(row_keys(2), 3, 8 * 3), 8, draw=1, slot=0).memory.count == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
        ({"num_samples": 0}, "num_samples 0"),
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_k": -1}, "top_k -1"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"min_p": 1.5}, "min_p 1.5"),
        ({"temperature": 0.0, "top_k": 3}, "does not sample"),
        ({"temperature": 0.0, "num_samples": 3}, "same response 3 times"),
        ({"constraints": Constraints(min_new_tokens=9)}, "min_new_tokens 9"),
        ({"eos_ids": (-1,)}, "eos_ids"),
    ],
)
def test_options_without_meaning_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SampleOptions(**{"max_new_tokens": 4, "eos_ids": EOS, **options})


def test_drawing_needs_keys(micro):
    with pytest.raises(ValueError, match="pass keys"):
        sample(*micro, *padded(PROMPTS), None, SampleOptions(4, EOS))
