"""What each objective adds up, and what searches over it find."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax.decoding.objectives import (
    ImplicitReward,
    JudgedReference,
    Likelihood,
    LogitArithmetic,
    RegularisedReward,
    TableReward,
)
from qstar_jax.decoding.policies import Ensemble
from qstar_jax.decoding.responses import Finish
from qstar_jax.decoding.search.beam import beam_search
from qstar_jax.decoding.search.beam_options import BeamOptions

PROMPTS = [[1, 0, 3], [4], [2, 0]]
CLOSE = {"rtol": 0, "atol": 2e-5}  # float32 sums of a few numbers of at most ten
OPTIONS = BeamOptions(3, 4, (0,))


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)


@pytest.fixture(scope="module")
def logits():
    """Of three models, [2, 3, 7] each; two words are impossible, one to the first model and one to the last."""
    found = np.random.default_rng(0).normal(0, 2, (3, 2, 3, 7))
    found[0, ..., 5] = found[2, ..., 6] = -np.inf
    return tuple(jnp.asarray(x, jnp.float32) for x in found)


@pytest.fixture(scope="module")
def pair(history_lm):
    """`pair(seed)`: policy and reference, as an ensemble and its parameters."""

    def make(*seeds, bias=-2.0):
        models, params = zip(*[history_lm(seed, bias=bias) for seed in seeds], strict=True)
        return Ensemble(models), params

    return make


@pytest.fixture(scope="module")
def search(padded):
    def run(policy, options=OPTIONS, prompts=PROMPTS, **keywords):
        return jax.device_get(beam_search(*policy, *padded(prompts), options, **keywords))

    return run


def test_likelihood_is_the_first_policys(logits):
    for given in (logits[0], logits[:1], logits[:2]):
        step = Likelihood()(given)
        np.testing.assert_allclose(step.score, log_softmax(logits[0]), **CLOSE)
        np.testing.assert_array_equal(step.score, step.logp)
        assert step.value is None and (step.ref_logp is None) == (not isinstance(given, tuple) or len(given) == 1)
    np.testing.assert_allclose(step.ref_logp, log_softmax(logits[1]), **CLOSE)
    half = Likelihood()(logits[0].astype(jnp.bfloat16))
    assert half.score.dtype == half.logp.dtype == jnp.float32


def test_rewards_by_hand(logits):
    (logp, ref_logp), possible = (log_softmax(x) for x in logits[:2]), np.arange(7) != 5
    for objective, expected in (
        (RegularisedReward(0.3), 0.3 * logp),
        (ImplicitReward(0.3), 0.3 * (logp - ref_logp)),
    ):
        step = objective(logits[:2])
        np.testing.assert_allclose(step.score[..., possible], expected[..., possible], **CLOSE)
        assert (step.score[..., 5] == -jnp.inf).all()
        np.testing.assert_allclose(step.logp, logp, **CLOSE)
        np.testing.assert_allclose(step.ref_logp, ref_logp, **CLOSE)
        for wrong in (logits[0], logits):
            with pytest.raises(ValueError, match=r"reads an Ensemble of 2 policies, found [13]"):
                objective(wrong)


def test_a_judged_reference_draws_and_the_policy_rewards(logits):
    logp, ref_logp = map(log_softmax, logits[:2])
    found = JudgedReference(0.3)(logits[:2])
    possible = np.isfinite(logp)  # what the policy rules out has a reward of minus infinity, and is not drawn
    np.testing.assert_allclose(found.score[possible], 0.3 * (logp - ref_logp)[possible], **CLOSE)
    assert np.isneginf(found.score[~possible]).all()
    np.testing.assert_allclose(found.logp, ref_logp, **CLOSE)
    assert found.ref_logp is None and found.value is None
    impossible = JudgedReference(0.3)(logits[1::-1])  # now to the writer: it would be infinitely good
    assert np.isneginf(impossible.score[..., 5]).all()


def test_tables_by_hand():
    reward, ref_logp, value = (jnp.asarray(x, jnp.float32) for x in np.random.default_rng(1).normal(size=(3, 2, 4)))
    step = TableReward(0.5)((reward, ref_logp, value))
    np.testing.assert_allclose(step.score, reward + 0.5 * ref_logp, **CLOSE)
    np.testing.assert_array_equal(step.value, value)
    without = TableReward(0.0, use_values=False)((reward, ref_logp, value))
    np.testing.assert_array_equal(without.score, reward)
    assert without.value is None


def test_arithmetic_by_hand(logits):
    base, tuned, untuned = (log_softmax(x) for x in logits)
    possible = np.arange(7) < 5  # what any of the three rules out stays ruled out
    for weight in (0.7, -0.4, 1.0):
        expected = log_softmax((base + weight * (tuned - untuned))[..., possible])
        step = LogitArithmetic((weight,))(logits)
        np.testing.assert_allclose(step.score[..., possible], expected, **CLOSE)
        assert (step.score[..., ~possible] == -jnp.inf).all()
        np.testing.assert_allclose(step.ref_logp, base, **CLOSE)
    both = LogitArithmetic((0.7, -0.4))((*logits, logits[1], logits[0]))
    expected = base + 0.7 * (tuned - untuned) - 0.4 * (tuned - base)
    np.testing.assert_allclose(both.score[..., possible], log_softmax(expected[..., possible]), **CLOSE)


def test_arithmetic_that_changes_nothing_or_all(logits):
    base, tuned, _ = logits
    off = LogitArithmetic((0.0,))(logits)
    np.testing.assert_allclose(off.score, log_softmax(base), **CLOSE)  # also where the pair rules something out
    swapped = LogitArithmetic((1.0,))((tuned, base, tuned))  # the base is the untuned model: the tuned one is left
    possible = np.arange(7) != 5
    np.testing.assert_allclose(swapped.score[..., possible], log_softmax(base)[..., possible], **CLOSE)
    # A constant on any row of any model's logits is no news; raw differences would move these scores by the constant.
    shifts = np.random.default_rng(2).normal(0, 5, (3, 2, 3, 1)).astype(np.float32)
    shifted = tuple(x + shift for x, shift in zip(logits, shifts, strict=True))
    objective = LogitArithmetic((0.7,))
    np.testing.assert_allclose(objective(shifted).score, objective(logits).score, **CLOSE)
    raw = [np.asarray(b + 0.7 * (t - u))[..., :5] for b, t, u in (logits, shifted)]
    assert np.abs(raw[0] - raw[1]).max() > 1


def test_vocabularies_must_agree_or_be_cut(logits):
    longer = (jnp.pad(logits[0], ((0, 0), (0, 0), (0, 2)), constant_values=9.0), *logits[1:])
    with pytest.raises(ValueError, match=r"vocabularies of 7 and 9 tokens; .* vocabulary=7"):
        LogitArithmetic((1.0,))(longer)
    cut = LogitArithmetic((1.0,), vocabulary=7)(longer)
    np.testing.assert_array_equal(cut.score, LogitArithmetic((1.0,))(logits).score)
    with pytest.raises(ValueError, match="vocabulary 8 is larger than that of a model, 7 tokens"):
        LogitArithmetic((1.0,), vocabulary=8)(longer)
    for wrong in (logits[:2], logits[0]):
        with pytest.raises(ValueError, match=r"reads an Ensemble of 3 policies, found [12]"):
            LogitArithmetic((1.0,))(wrong)


def test_reports_of_a_search_with_a_reference(search, pair, history_next, read_responses):
    policy = pair(0, 1)
    found = search(policy)
    for row, prompt in enumerate(PROMPTS):
        logp, ref_logp = (history_next(params, prompt) for params in policy[1])
        for k, text in enumerate(read_responses(found, row)):
            own, ref = (sum(f(text[:t])[v] for t, v in enumerate(text)) for f in (logp, ref_logp))
            np.testing.assert_allclose(found.logp[row, k], own, **CLOSE)
            np.testing.assert_allclose(found.ref_logp[row, k], ref, **CLOSE)
            np.testing.assert_allclose(found.score[row, k], own, **CLOSE)
            np.testing.assert_allclose(found.rewards(0.1)[row, k], 0.1 * (own - ref), **CLOSE)
    assert np.abs(found.logp - found.ref_logp).min() > 1e-3


def test_policies_that_are_combined_are_searched_like_one(
    search, pair, history_next, plain_beam_search, read_responses
):
    weights, options, others = (0.7, -0.4), OPTIONS, 0
    for seed in range(0, 20, 5):
        policy = pair(*range(seed, seed + 5))
        found = search(policy, options, objective=LogitArithmetic(weights))
        for row, prompt in enumerate(PROMPTS):
            base, *pairs = (history_next(params, prompt) for params in policy[1])

            def raw(text, base=base, pairs=pairs):
                tuned = zip(weights, pairs[::2], pairs[1::2], strict=True)
                return base(text) + sum(weight * (one(text) - other(text)) for weight, one, other in tuned)

            expected = plain_beam_search(lambda text, raw=raw: log_softmax(raw(text)), options)
            assert read_responses(found, row) == [text for text, *_ in expected]
            np.testing.assert_allclose(found.score[row], [e[1] for e in expected], **CLOSE)
            others += read_responses(found, row) != [text for text, *_ in plain_beam_search(raw, options)]
    assert others > 3  # sums that are not normalised again at every step find something else


@dataclass(frozen=True)
class Valued:
    """Likelihood, and a value behind each word: of where a path has led, so only its last one counts."""

    values = (0.0, 1.0, -2.0, 0.5, 3.0)
    monotone = False
    comparable_across_lengths = False

    def __call__(self, logits):
        step = Likelihood()(logits)
        return replace(step, value=jnp.broadcast_to(jnp.array(self.values), step.score.shape))


def test_paths_are_compared_with_the_value_of_where_they_have_led(
    search, history_lm, history_next, plain_beam_search, read_responses
):
    others = 0
    for seed in range(6):
        policy = history_lm(seed, bias=-2.0)
        found = search(policy, objective=Valued())
        for row, prompt in enumerate(PROMPTS):
            logp = history_next(policy[1], prompt)

            def shaped(text, logp=logp):
                # Summed over a text, all values but the last cancel.
                return logp(text) + np.array(Valued.values) - (Valued.values[text[-1]] if text else 0.0)

            expected = plain_beam_search(shaped, OPTIONS, stops=False)
            assert read_responses(found, row) == [text for text, *_ in expected]
            np.testing.assert_allclose(found.score[row], [e[1] for e in expected], **CLOSE)
            others += read_responses(found, row) != [text for text, *_ in plain_beam_search(logp, OPTIONS)]
    assert others > 9


def test_search_for_reward_with_its_price_is_search_for_likelihood(search, pair, read_responses):
    policies = [pair(seed, seed + 100) for seed in range(6)]
    plain = [search(policy) for policy in policies]
    priced = [search(policy, objective=RegularisedReward(0.3)) for policy in policies]
    unpriced = [search(policy, objective=ImplicitReward(0.3)) for policy in policies]
    same, other = 0, 0
    for likely, reward, bare in zip(plain, priced, unpriced, strict=True):
        np.testing.assert_allclose(reward.score, 0.3 * likely.score, **CLOSE)
        np.testing.assert_allclose(bare.score, bare.rewards(0.3), **CLOSE)
        np.testing.assert_array_equal(reward.certified, likely.certified)
        assert bare.certified is None
        for row in range(len(PROMPTS)):
            same += read_responses(reward, row) == read_responses(likely, row)
            other += read_responses(bare, row) != read_responses(likely, row)
    assert same == 18 and other > 12


def test_a_reward_that_can_rise_is_searched_to_the_end(search, table_lm):
    # EOS has the better reward at first, .92 to -.47; every word behind the other token brings .68. A search that takes
    # its first full set of responses for the best stops too early.
    model, tuned = table_lm([[0.5, 0.5], [0.01, 0.99]])
    _, untuned = table_lm([[0.2, 0.8], [0.5, 0.5]])
    policy = Ensemble((model, model)), (tuned, untuned)
    patient, hasty = (BeamOptions(1, 4, (0,), early_stopping=rule) for rule in ("never", False))
    found = search(policy, patient, [[1]], objective=ImplicitReward(1.0))
    assert found.tokens[0, 0].tolist() == [1] * 4 and found.finish[0, 0] == Finish.LENGTH
    np.testing.assert_allclose(found.score[0, 0], np.log(0.5 / 0.8) + 3 * np.log(0.99 / 0.5), **CLOSE)
    found = search(policy, hasty, [[1]], objective=ImplicitReward(1.0))
    assert found.lengths[0, 0] == 1 and found.finish[0, 0] == Finish.EOS
