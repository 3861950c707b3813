import numpy as np
import pytest

from qstar_jax.data.mismatches import with_mismatches
from qstar_jax.data.ragged import Lengths
from qstar_jax.data.tokenization import Example, Response
from qstar_jax.errors import InputError


def example(prompt, *responses, row=0):
    ids = [np.array(ids, np.int32) for ids in (prompt, *responses)]
    return Example(ids[0], False, tuple(Response(r, False) for r in ids[1:]), row)


def test_mismatches_are_responses_to_the_next_other_prompt():
    prompts = [[1], [1], [2], [3], [1]]
    examples = [example(prompt, [10 + i, 9]) for i, prompt in enumerate(prompts)]
    mismatched = with_mismatches(examples, 3, "data")
    assert [int(e.responses[1].ids[0]) - 10 for e in mismatched] == [2, 2, 3, 4, 2]
    assert [e.responses[0] for e in mismatched] == [e.responses[0] for e in examples]
    [*lists] = mismatched
    for name in ("rows", "prompts", "responses", "actions", "turns", "truncated"):
        np.testing.assert_array_equal(getattr(mismatched.lengths, name), getattr(Lengths.of(lists), name))
    [long, _] = shortened = with_mismatches([example([1, 1], [5]), example([2], [6, 7, 8])], 4, "data")
    assert long.responses[1].ids.tolist() == [6, 7] and long.responses[1].truncated
    assert shortened.lengths.truncated.tolist() == [[False, False, True], [False, False, False]]
    assert shortened.lengths.actions.tolist() == [[1, 2], [3, 1]]
    with pytest.raises(InputError, match="data: all examples have the same prompt"):
        with_mismatches(examples[:2], 3, "data")
