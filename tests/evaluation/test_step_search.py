import numpy as np
import pytest

from qstar_jax.evaluation.step_search import compare_at_equal_tokens
from qstar_jax.evaluation.votes import Candidates, accuracies


def setting(rng, questions=8, responses=6):
    candidates, lengths = [], []
    for _ in range(questions):
        correct = rng.random(responses) < 0.4
        answers = [str(int(right)) for right in correct]
        candidates.append(Candidates(correct, answers, {"sum": rng.normal(size=responses) + correct}))
        lengths.append(rng.integers(5, 50, responses))
    return candidates, lengths


@pytest.mark.parametrize("ratio", [1.0, 3.0, 3.25, 6.0])
def test_samples_have_the_tokens_of_the_search(ratio):
    candidates, lengths = setting(rng := np.random.default_rng(0))
    total = ratio * sum(several.mean() for several in lengths)
    tokens = np.full(len(candidates), total / len(candidates))
    correct = rng.random(len(candidates)) < 0.5
    found = compare_at_equal_tokens(correct, np.rint(tokens).astype(int), candidates, lengths, beams=2, samples=3)
    assert found.equal_samples == pytest.approx(ratio, abs=0.05) and found.name == "2 beams of 3"
    assert found.tokens == pytest.approx(np.rint(tokens).mean()) and found.accuracy.mean == correct.mean()
    below = int(found.equal_samples)
    values = accuracies(candidates, [max(below, 1), min(max(below, 1) + 1, 6)])
    share = found.equal_samples - below if below else 0.0
    # Drawing `below` or one more sample, at random, has exactly the tokens of the search on average.
    per_sample = sum(several.mean() for several in lengths)
    if below:
        assert ((1 - share) * below + share * (below + 1)) * per_sample == pytest.approx(np.rint(tokens).sum())
    if found.equal_samples > 6:
        assert not found.sampled and not found.gains
        return
    assert list(found.sampled) == ["majority", "best by sum", "vote by sum", "oracle"]
    for name, interval in found.sampled.items():
        expected = (1 - share) * values[name][:, 0] + share * values[name][:, 1]
        assert interval.mean == pytest.approx(expected.mean(), abs=1e-9)
        assert found.gains[name].mean == pytest.approx((correct - expected).mean(), abs=1e-9)


def test_a_search_with_more_tokens_than_all_samples_has_nothing_to_be_compared_with():
    candidates, lengths = setting(np.random.default_rng(1))
    tokens = np.full(len(candidates), 1000)
    found = compare_at_equal_tokens(np.ones(8, bool), tokens, candidates, lengths, beams=1, samples=9)
    assert found.equal_samples > 6 and found.sampled == found.gains == {}
    assert "too few samples" in found.in_words() and found.name == "1 beam of 9"
