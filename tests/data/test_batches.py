import jax
import numpy as np
import pytest

from qstar_jax.data.batches import Batch, eval_batches, make_batch, padded_lengths, step_indices
from qstar_jax.data.tokenization import Example, Response

EOS = 2


def example(prompt, *answers, row=0):
    responses = tuple(Response(np.asarray(a, np.int32), a[-1] != EOS) for a in answers)
    return Example(np.asarray(prompt, np.int32), False, responses, row)


PAIRS = [example([5, 6], [7, 2], [8, 9, 8]), example([5], [7, 2, 7, 2], [2])]


def test_make_batch():
    batch = make_batch(PAIRS, length=6, response_length=4, pad_id=0)
    np.testing.assert_array_equal(
        batch.tokens, [[[5, 6, 7, 2, 0, 0], [5, 6, 8, 9, 8, 0]], [[5, 7, 2, 7, 2, 0], [5, 2, 0, 0, 0, 0]]]
    )
    np.testing.assert_array_equal(batch.targets, [[[7, 2, 0, 0], [8, 9, 8, 0]], [[7, 2, 7, 2], [2, 0, 0, 0]]])
    np.testing.assert_array_equal(batch.prompt_lengths, [2, 1])
    np.testing.assert_array_equal(batch.response_lengths, [[2, 3], [4, 1]])
    np.testing.assert_array_equal(batch.truncated, [[False, True], [False, False]])
    np.testing.assert_array_equal(batch.weights, [1, 1])
    assert batch.ref_logp is None
    types = [np.asarray(leaf).dtype.name for leaf in jax.tree.leaves(batch)]
    assert types == ["int32", "int32", "int32", "int32", "bool", "float32"]


@pytest.mark.parametrize("pad_id", [0, EOS, 7])
def test_the_mask_does_not_depend_on_the_pad_id(pad_id):
    batch = make_batch(PAIRS, length=6, response_length=4, pad_id=pad_id)
    expected = [[[1, 1, 0, 0], [1, 1, 1, 0]], [[1, 1, 1, 1], [1, 0, 0, 0]]]
    np.testing.assert_array_equal(batch.response_mask, np.array(expected, bool))


def test_batch_is_a_pytree_with_a_mask_under_jit():
    batch = make_batch(PAIRS, length=6, response_length=4, pad_id=EOS)
    same, mask = jax.jit(lambda b: (b, b.response_mask))(batch)
    assert isinstance(same, Batch)
    np.testing.assert_array_equal(mask, batch.response_mask)


def test_fill_rows_repeat_the_first_with_weight_zero():
    batch = make_batch(PAIRS, length=6, response_length=4, pad_id=0, fill_to=4)
    np.testing.assert_array_equal(batch.weights, [1, 1, 0, 0])
    np.testing.assert_array_equal(batch.tokens[2:], batch.tokens[[0, 0]])
    np.testing.assert_array_equal(batch.response_lengths[2:], batch.response_lengths[[0, 0]])


def test_one_answer():
    assert make_batch([example([1], [3, 2])], length=4, response_length=2, pad_id=0).tokens.shape == (1, 1, 4)


@pytest.mark.parametrize(("length", "response_length"), [(4, 4), (6, 3)])
def test_examples_that_do_not_fit(length, response_length):
    with pytest.raises(ValueError, match="row 1: a prompt of 1 and an answer of 4 tokens do not fit"):
        make_batch(PAIRS[1:], length=length, response_length=response_length, pad_id=0)


def test_examples_with_other_numbers_of_answers():
    for pair in ([PAIRS[0], example([1], [2])], [example([1], [2]), PAIRS[0]]):
        with pytest.raises(ValueError):
            make_batch(pair, length=6, response_length=4, pad_id=0)


def test_padded_lengths():
    assert padded_lengths(PAIRS, multiple=1) == (5, 4)
    assert padded_lengths(PAIRS, multiple=4) == (8, 4)
    assert padded_lengths(PAIRS) == (32, 32)


@pytest.mark.parametrize(("n", "batch_size"), [(10, 3), (7, 7), (3, 8), (1, 2)])
def test_every_epoch_sees_every_row_once(n, batch_size):
    stream = np.concatenate([step_indices(0, step, n, batch_size) for step in range(4 * n)])
    epochs = stream[: len(stream) // n * n].reshape(-1, n)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(n), (len(epochs), 1)))


def test_step_indices_is_a_function_of_seed_and_step():
    first = [step_indices(3, step, 100, 8) for step in range(30)]
    again = [step_indices(3, step, 100, 8) for step in reversed(range(30))][::-1]
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first[0], step_indices(4, 0, 100, 8))


def test_epochs_are_shuffled_apart():
    orders = [tuple(step_indices(0, epoch, 50, 50)) for epoch in range(3)]
    assert len({*orders, tuple(range(50))}) == 4


def test_order_is_pinned():
    """A changed order would break exact resume of runs that are under way."""
    assert step_indices(0, 0, 8, 8).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]


def test_eval_batches():
    assert [b.tolist() for b in eval_batches(5, 2)] == [[0, 1], [2, 3], [4]]
