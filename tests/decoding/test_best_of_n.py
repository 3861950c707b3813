import math
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax.decoding import Rejection, SampleOptions, best_of_n, sample
from qstar_jax.decoding.objectives import ImplicitReward, Likelihood, StepScores
from qstar_jax.decoding.policies import Ensemble
from qstar_jax.decoding.responses import Finish

PROMPTS = jnp.array([[1, 2, 3, 4], [3, 0, 0, 0]], jnp.int32)
LENGTHS = jnp.array([4, 1], jnp.int32)
ROOM, COUNT, BETA = 6, 6, 0.5
OPTIONS = SampleOptions(ROOM, (0,), COUNT)
KEYS = jax.random.split(jax.random.key(0), 2)


@pytest.fixture(scope="module")
def pair(history_lm):
    """(ensemble, parameters) of a policy whose every next word depends on all before, and of a flatter reference."""
    model, params = history_lm(3)
    return Ensemble((model, model)), (params, history_lm(4, scale=0.7)[1])


@pytest.fixture(scope="module")
def drawn(pair):
    """The samples before anything is chosen."""
    return jax.device_get(sample(*pair, PROMPTS, LENGTHS, KEYS, OPTIONS, objective=ImplicitReward(BETA)))


def choose(pair, objective=ImplicitReward(BETA), options=OPTIONS, **more):
    return jax.device_get(best_of_n(*pair, PROMPTS, LENGTHS, KEYS, options, objective=objective, **more))


def responses(found, row):
    return [found.tokens[row, n, : found.lengths[row, n]].tolist() for n in range(found.tokens.shape[1])]


@pytest.fixture(scope="module")
def token_logps(pair, history_logp):
    """`token_logps(row, response)`: log pi and log pi_ref of each token [2, T], in plain Python."""

    def compute(row, response):
        prompt, steps = PROMPTS[row, : LENGTHS[row]].tolist(), np.arange(len(response))
        return np.stack([history_logp(params, prompt, response)[steps, response] for params in pair[1]])

    return compute


@pytest.mark.parametrize("objective", [ImplicitReward(BETA), Likelihood()])
def test_all_samples_come_back_best_first_with_their_scores(pair, drawn, token_logps, objective):
    found = choose(pair, objective)
    for row in range(2):
        assert sorted(responses(found, row)) == sorted(responses(drawn, row))
        scores = []
        for n, response in enumerate(responses(found, row)):
            logp, ref_logp = token_logps(row, response).sum(1)
            scores.append(BETA * (logp - ref_logp) if isinstance(objective, ImplicitReward) else logp)
            np.testing.assert_allclose([found.logp[row, n], found.ref_logp[row, n]], [logp, ref_logp], atol=1e-4)
            assert found.finish[row, n] == (Finish.EOS if response[-1] == 0 else Finish.LENGTH)
        np.testing.assert_allclose(found.score[row], scores, atol=1e-4)
        assert (np.diff(found.score[row]) <= 0).all()
    # Some responses were cut; they compete with the others. And the order is not that of drawing.
    assert set(found.finish.ravel().tolist()) == {Finish.EOS, Finish.LENGTH}
    assert responses(found, 0) != responses(drawn, 0)


def test_objectives_rank_differently(pair):
    assert responses(choose(pair), 0) != responses(choose(pair, Likelihood()), 0)


def test_implicit_rewards_of_whole_responses_are_the_scores(pair):
    found = choose(pair)
    np.testing.assert_allclose(found.rewards(BETA), found.score, atol=1e-5)


@pytest.mark.thin("rejection0")
@pytest.mark.parametrize("rejection", [Rejection(2, 0.5), Rejection(1, 0.7), Rejection(4, 0.1)])
def test_rejection_keeps_what_a_restatement_keeps(pair, drawn, token_logps, rejection):
    found = choose(pair, rejection=rejection)
    for row in range(2):
        all_responses = responses(drawn, row)
        sums = []
        for response in all_responses:
            logp, ref_logp = token_logps(row, response)
            sums.append(np.cumsum(BETA * (logp - ref_logp)))
        alive, count = list(range(COUNT)), [len(response) for response in all_responses]
        for length in range(rejection.interval, ROOM, rejection.interval):
            so_far = {n: sums[n][:length][-1] for n in alive}
            fewer = math.ceil(round(len(alive) * rejection.keep, 6))
            kept = sorted(sorted(alive, key=lambda n, so_far=so_far: -so_far[n])[:fewer])
            count = [min(c, length) if n in {*alive} - {*kept} else c for n, c in enumerate(count)]
            alive = kept
        best = sorted(alive, key=lambda n, sums=sums: -sums[n][-1])
        assert responses(found, row) == [all_responses[n] for n in best]
        np.testing.assert_allclose(found.score[row], [sums[n][-1] for n in best], atol=1e-4)
        assert found.drawn[row] == sum(count)
    assert found.tokens.shape[1] == len(best) < COUNT


def test_keeping_all_rejects_nothing(pair):
    found, plain = choose(pair, rejection=Rejection(2, 1.0)), choose(pair)
    for name in ("tokens", "lengths", "logp", "ref_logp", "score", "finish"):
        np.testing.assert_array_equal(getattr(found, name), getattr(plain, name))


@pytest.mark.parametrize(
    ("rejection", "stages"),
    [
        (Rejection(2, 0.5), [(6, 2), (3, 4), (2, 6)]),
        (Rejection(1, 0.5), [(6, 1), (3, 2), (2, 3), (1, 6)]),
        (Rejection(6, 0.5), [(6, 6)]),
        (Rejection(2, 0.9), [(6, 6)]),  # five and a half are six
    ],
)
def test_stages(rejection, stages):
    assert rejection.stages(6, 6) == stages
    assert Rejection(1, 0.07).stages(100, 2) == [(100, 1), (7, 2)]
    assert Rejection(1, 1e-8).stages(8, 2) == [(8, 1), (1, 2)]


@dataclass(frozen=True, eq=False)
class Watched:
    """A policy that writes down the shapes it is compiled for: samples and slots of each pass."""

    inner: Ensemble
    passes: dict = field(default_factory=dict)

    def prefill(self, *arguments):
        return self.inner.prefill(*arguments)

    def extend(self, params, memory, tokens, path, slot):
        self.passes[tokens.shape[1]] = path.shape[2]
        return self.inner.extend(params, memory, tokens, path, slot)


def test_rejected_samples_leave_the_program(pair):
    model, params = pair
    flops = {}
    for name, rejection in (("plain", None), ("rejecting", Rejection(2, 0.5))):
        watched = Watched(model)
        arguments = (watched, params, PROMPTS, LENGTHS, KEYS, OPTIONS)
        lowered = best_of_n.lower(*arguments, objective=ImplicitReward(BETA), rejection=rejection)
        flops[name] = watched.passes, lowered.cost_analysis()["flops"]
    # Samples -> slots of a pass: fewer rows, over a pool that has room for what they have said so far and no more.
    assert flops["plain"][0] == {6: 5 * 6}
    assert flops["rejecting"][0] == {6: 1 * 6, 3: 3 * 3, 2: 5 * 2}
    # The cost analysis counts each loop's body once: a pass of 6, one of 3 and one of 2 cost less than two of 6.
    assert flops["rejecting"][1] < 2 * flops["plain"][1]


@dataclass(frozen=True)
class Valued:
    """Likelihood, and a value of 2 behind the word 4."""

    monotone = False
    comparable_across_lengths = False

    def __call__(self, logits):
        logp = jax.nn.log_softmax(logits)
        return StepScores(logp, jnp.broadcast_to(2.0 * (jnp.arange(logp.shape[-1]) == 4), logp.shape), logp, None)


def test_the_value_of_where_an_response_has_led_counts(pair, token_logps):
    found = choose((pair[0].members[0], pair[1][0]), Valued())
    for row in range(2):
        expected = [token_logps(row, a)[0].sum() + 2.0 * (a[-1] == 4) for a in responses(found, row)]
        np.testing.assert_allclose(found.score[row], expected, atol=1e-4)
        assert (np.diff(found.score[row]) <= 0).all()
    assert any(a[-1] == 4 for row in range(2) for a in responses(found, row))


@pytest.mark.slow
def test_a_transformer_with_rejection(micro, log_pi):
    model, params = micro
    reference = jax.tree.map(lambda x: 0.7 * x, params)
    found = choose((Ensemble((model, model)), (params, reference)), rejection=Rejection(2, 0.5))
    assert found.tokens.shape[1] == 2
    for row in range(2):
        for n, response in enumerate(responses(found, row)):
            prompt = PROMPTS[row, : LENGTHS[row]].tolist()
            logp, ref_logp = (log_pi(model, p, prompt, [response]).sum() for p in (params, reference))
            np.testing.assert_allclose([found.logp[row, n], found.ref_logp[row, n]], [logp, ref_logp], atol=1e-4)
            np.testing.assert_allclose(found.score[row, n], BETA * (logp - ref_logp), atol=1e-4)


def test_one_token(pair):
    found = choose(pair, options=SampleOptions(1, (0,), COUNT), rejection=Rejection(1, 0.5))
    assert found.tokens.shape == (2, COUNT, 1) and (found.lengths == 1).all()


@pytest.mark.parametrize(("interval", "keep"), [(0, 0.5), (2, 0.0), (2, 1.5)])
def test_rejections_without_meaning_are_refused(interval, keep):
    with pytest.raises(ValueError, match=f"interval {interval} .* keep {keep}"):
        Rejection(interval, keep)
