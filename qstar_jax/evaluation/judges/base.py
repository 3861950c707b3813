"""Judges: comparisons of two responses in, verdicts out, and their win rate."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Comparison:
    """Two responses to the prompt of a row, as plain text: the one that is judged, and the baseline."""

    row: int
    prompt: str
    answer: str
    baseline: str


@dataclass(frozen=True)
class Verdict:
    """Which response of a comparison is better.

    Args:
        win: 1.0 where the response wins, 0.5 for a tie, 0.0 where the baseline wins; None where there is no decision,
            which is not a tie.
        answer_score: Reward of the response, from judges that compare rewards; None if it has none.
        baseline_score: The same for the baseline.
        note: How the verdict came about, for people.
    """

    win: float | None
    answer_score: float | None = None
    baseline_score: float | None = None
    note: str = ""


class Judge(Protocol):
    """Decides which of two responses is better."""

    name: str

    def __call__(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """Returns one verdict per comparison, in order."""
        ...


@dataclass(frozen=True)
class WinRate:
    """A summary of verdicts.

    Args:
        rate: Mean of `win` over the decided comparisons, so a tie is half a win; None where none is decided.
        stderr: Standard error of that mean; None below two decided comparisons.
        wins: Comparisons that the response wins.
        ties: Comparisons that nobody wins.
        losses: Comparisons that the baseline wins.
        undecided: Comparisons without a decision; they are in none of the other numbers.
    """

    rate: float | None
    stderr: float | None
    wins: int
    ties: int
    losses: int
    undecided: int


def win_rate(verdicts: Sequence[Verdict]) -> WinRate:
    """Counts verdicts of comparisons that do not depend on each other."""
    decided = [verdict.win for verdict in verdicts if verdict.win is not None]
    n = len(decided)
    rate = sum(decided) / n if n else None
    stderr = math.sqrt(sum((win - rate) ** 2 for win in decided) / (n - 1) / n) if n > 1 else None
    wins, losses = sum(win > 0.5 for win in decided), sum(win < 0.5 for win in decided)
    return WinRate(rate, stderr, wins, n - wins - losses, losses, len(verdicts) - n)
