"""Greedy answers and beams of every family against `generate` of torch transformers."""

from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.parity

ROOM = 24
EOS = (2,)


@pytest.fixture(scope="module")
def prompts(families):
    """One shorter than the windows, one longer, and answers that leave the prompt's windows behind."""
    return [row[:length].tolist() for row, length in zip(families.rows(), (3, 14, 6), strict=True)]


@pytest.mark.thin("gemma3-5", "gpt2-1")
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
    different = beam_parity.differences(found, expected, [gap for searched in alone for gap in searched.narrowest])
    assert all(difference["tied"] for difference in different)
    assert len({difference["row"] for difference in different}) <= 1  # ties are rare
    for own, other in zip(found, expected, strict=True):
        for (text, score), (their_text, their_score) in zip(own, other, strict=True):
            assert text != their_text or abs(score - their_score) < 1e-4
