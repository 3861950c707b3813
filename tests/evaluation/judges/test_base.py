import numpy as np
import pytest

from qstar_jax.evaluation.judges import Verdict, WinRate, win_rate


def test_undecided_comparisons_are_in_no_other_number():
    wins = [1.0, 1.0, 0.5, 0.0, 1.0]
    found = win_rate([Verdict(win) for win in wins] + [Verdict(None)] * 2)
    assert (found.wins, found.ties, found.losses, found.undecided) == (3, 1, 1, 2)
    assert found.rate == pytest.approx(np.mean(wins))
    assert found.stderr == pytest.approx(np.std(wins, ddof=1) / np.sqrt(5))


def test_without_decisions_there_is_no_rate():
    assert win_rate([]) == WinRate(None, None, 0, 0, 0, 0)
    assert win_rate([Verdict(None)]) == WinRate(None, None, 0, 0, 0, 1)
    assert win_rate([Verdict(1.0)]) == WinRate(1.0, None, 1, 0, 0, 0)
