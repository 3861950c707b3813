import numpy as np
import pytest

from qstar_jax.data.arranging import fill_up, with_mismatches
from qstar_jax.data.batches import make_batch
from qstar_jax.data.packing import Shapes
from qstar_jax.data.tokenization import Example, Response
from qstar_jax.errors import InputError


def example(prompt, *responses, row=0, **outcome):
    ids = [np.array(ids, np.int32) for ids in (prompt, *responses)]
    arrays = {name: np.asarray(value, np.float32) for name, value in outcome.items()}
    return Example(ids[0], False, tuple(Response(r, False) for r in ids[1:]), row, arrays)


def test_shorter_rankings_are_filled_up():
    filled = fill_up([example([1], [2], [3], [4]), example([1], [2], [3])])
    assert [[len(r.ids) for r in e.responses] for e in filled] == [[1, 1, 1], [1, 1, 0]]
    batch = make_batch(filled, Shapes.of(filled, batch_size=2))
    np.testing.assert_array_equal(batch.response_lengths, [[1, 1, 1], [1, 1, 0]])
    assert (batch.branches > 0).sum() == 5


def test_rewards_of_the_reference_are_filled_up():
    one, two = fill_up([example([1], [2], reference_rewards=[1, 2, 3]), example([1], [2], reference_rewards=[4])])
    batch = make_batch([one, two], Shapes.of([one, two], batch_size=2), fill_to=4)
    expected = [[1, 2, 3], *[[4, np.nan, np.nan]] * 3]
    np.testing.assert_array_equal(batch.outcome["reference_rewards"], expected)


def test_mismatches_are_responses_to_the_next_other_prompt():
    prompts = [[1], [1], [2], [3], [1]]
    examples = [example(prompt, [10 + i, 9]) for i, prompt in enumerate(prompts)]
    mismatched = with_mismatches(examples, 3, "data")
    assert [int(e.responses[1].ids[0]) - 10 for e in mismatched] == [2, 2, 3, 4, 2]
    assert [e.responses[0] for e in mismatched] == [e.responses[0] for e in examples]
    [long, _] = with_mismatches([example([1, 1], [5]), example([2], [6, 7, 8])], 4, "data")
    assert long.responses[1].ids.tolist() == [6, 7] and long.responses[1].truncated
    with pytest.raises(InputError, match="data: all examples have the same prompt"):
        with_mismatches(examples[:2], 3, "data")
