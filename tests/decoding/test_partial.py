import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax.decoding.objectives import StepScores
from qstar_jax.decoding.partial import Partial
from qstar_jax.decoding.responses import Finish
from qstar_jax.decoding.stop_strings import StopStrings

EOS = (0,)
# Token 1 spells "a", token 2 "b"; the stop string is "ab".
AB = StopStrings(jnp.array([[[0, 1, 0], [0, 1, 2], [2, 2, 2]]]), jnp.array([2]))


def scores(*numbers, value=None):
    """Scores of one token for each of the responses to one prompt; the reference's are twice as low."""
    numbers = jnp.array([numbers], jnp.float32)
    value = None if value is None else jnp.array([value], jnp.float32)
    return StepScores(numbers, value, numbers, 2 * numbers)


def start(count, max_new_tokens=3, stop_strings=None):
    zeros = jnp.zeros((1, count, 3))
    return Partial.start(StepScores(zeros, None, zeros, zeros), max_new_tokens, stop_strings)


def append(partial, tokens, step, where=True, **more):
    where = jnp.broadcast_to(jnp.asarray(where), (1, len(tokens)))
    return partial.append(jnp.array([tokens]), step, where, eos_ids=EOS, **more)


def test_appended_tokens_add_up_and_end_responses():
    partial = append(start(2), [1, 2], scores(-1.0, -2.0))
    assert partial.growing.tolist() == [[True, True]]
    partial = append(partial, [2, 0], scores(-0.5, -0.25))
    assert partial.tokens.tolist() == [[[1, 2, 0], [2, 0, 0]]] and partial.lengths.tolist() == [[2, 2]]
    assert partial.total.tolist() == partial.score.tolist() == partial.logp.tolist() == [[-1.5, -2.25]]
    assert partial.ref_logp.tolist() == [[-3.0, -4.5]]
    assert partial.finish.tolist() == [[Finish.LENGTH, Finish.EOS]] and partial.growing.tolist() == [[True, False]]


def test_the_limit_ends_growth():
    partial = append(start(1, max_new_tokens=1), [2], scores(-1.0))
    assert partial.finish.tolist() == [[Finish.LENGTH]] and partial.growing.tolist() == [[False]]


def test_only_some_responses_get_their_token():
    before = append(start(2), [1, 1], scores(-1.0, -1.0))
    after = append(before, [2, 2], scores(-1.0, -np.inf), where=[True, False])
    assert after.tokens.tolist() == [[[1, 2, 0], [1, 0, 0]]]
    assert after.total.tolist() == [[-2.0, -1.0]] and after.lengths.tolist() == [[2, 1]]


def test_only_the_last_value_counts():
    partial = append(start(1), [1], scores(-1.0, value=[5.0]))
    assert partial.score.tolist() == [[4.0]]
    partial = append(partial, [2], scores(-1.0, value=[0.5]))
    assert partial.total.tolist() == [[-2.0]] and partial.score.tolist() == [[-1.5]]


def test_stop_strings_end_responses():
    partial = start(2, stop_strings=AB)
    for tokens in ([1, 2], [2, 1]):
        partial = append(partial, tokens, scores(-1.0, -1.0), stop_strings=AB)
    assert partial.finish.tolist() == [[Finish.STOP, Finish.LENGTH]]  # "ab" and "ba"


def test_eos_comes_before_a_stop_string():
    zero_spells_b = StopStrings(jnp.array([[[0, 1, 0], [2, 1, 2], [2, 2, 2]]]), jnp.array([2]))
    partial = append(start(1, stop_strings=AB), [1], scores(-1.0), stop_strings=zero_spells_b)
    partial = append(partial, [0], scores(-1.0), stop_strings=zero_spells_b)
    assert partial.finish.tolist() == [[Finish.EOS]]


def test_the_best_come_first_and_of_equals_the_earlier():
    partial = append(start(4), [1, 2, 0, 1], scores(-3.0, -1.0, -2.0, -1.0))
    best = partial.best(3)
    assert best.tokens[0, :, 0].tolist() == [2, 1, 0] and best.score.tolist() == [[-1.0, -1.0, -2.0]]
    assert best.joined(partial.take(jnp.array([[0]]))).score.tolist() == [[-1.0, -1.0, -2.0, -3.0]]


def test_pruned_responses_do_not_exist():
    partial = append(start(2), [1, 2], scores(-1.0, -2.0)).without(jnp.array([[True, False]]))
    assert partial.exists.tolist() == [[False, True]] and partial.growing.tolist() == [[False, True]]
    responses = partial.best(2).responses()
    assert responses.tokens.tolist() == [[[2, 0, 0], [0, 0, 0]]] and responses.lengths.tolist() == [[1, 0]]
    assert responses.finish.tolist() == [[Finish.LENGTH, Finish.INVALID]]
    for numbers, expected in [(responses.score, -2.0), (responses.logp, -2.0), (responses.ref_logp, -4.0)]:
        assert numbers.tolist() == [[expected, -np.inf]]
    np.testing.assert_array_equal(responses.rewards(0.5), [[1.0, np.nan]])


@pytest.mark.parametrize("reference", [True, False])
def test_without_a_reference_there_is_no_ref_logp(reference):
    zeros = jnp.zeros((1, 1, 3))
    partial = Partial.start(StepScores(zeros, None, zeros, zeros if reference else None), 2)
    assert (partial.responses().ref_logp is not None) == reference
