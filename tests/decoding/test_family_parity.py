"""Greedy answers and beams of every family against `generate` of torch transformers."""

from types import SimpleNamespace

import numpy as np
import pytest

pytestmark = pytest.mark.parity

ROOM = 24
EOS = (2,)


@pytest.fixture(scope="module")
def prompts(families):
    """One shorter than the windows, one longer, and answers that leave the prompt's windows behind."""
    return [row[:length].tolist() for row, length in zip(families.rows(), (3, 14, 6), strict=True)]


@pytest.mark.thin("5-gemma3", "1-gpt2")
@pytest.mark.parametrize("beams", [1, 5])
def test_answers_are_those_of_torch(beams, family, beam_parity, open_family, torch_family, prompts):
    model, params = open_family(family)
    ours = SimpleNamespace(ours=(SimpleNamespace(model=model), model.unstack(params)))
    found = beam_parity.beams_of_ours(ours, prompts, EOS, 14, beams, 1.0, False, ROOM)
    # One prompt at a time, so that the oracle pads none.
    alone = [
        beam_parity.beams_of_torch(torch_family(family), [prompt], EOS, beams, 1.0, False, ROOM) for prompt in prompts
    ]
    expected = [answers for searched in alone for answers in searched.exact]
    assert max(len(text) for answers in expected for text, _ in answers) == ROOM
    assert [[text for text, _ in answers] for answers in found] == [[text for text, _ in row] for row in expected]
    scores = [[[score for _, score in answers] for answers in rows] for rows in (found, expected)]
    np.testing.assert_allclose(*scores, rtol=1e-5, atol=1e-4)
