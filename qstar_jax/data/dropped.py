"""Rows that could not be used: which, and why."""

from collections.abc import Sequence
from dataclasses import dataclass


class DroppedRow(Exception):
    """The row cannot be used; the message is the reason under which it is counted."""


@dataclass(frozen=True)
class Dropped:
    """One row that could not be used.

    Args:
        row: Index of the row, counted from 0.
        reason: Why, in words that rows of the same kind share.
    """

    row: int
    reason: str


def rows_by_reason(dropped: Sequence[Dropped]) -> dict[str, list[int]]:
    """The rows (from 0, in order) of each reason; the reason with the most rows comes first."""
    found: dict[str, list[int]] = {}
    for one in sorted(dropped, key=lambda one: one.row):
        found.setdefault(one.reason, []).append(one.row)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def counted_reasons(dropped: Sequence[Dropped]) -> str:
    """Such as "2 empty prompt, 1 chosen equals rejected"."""
    return ", ".join(f"{len(rows):,} {reason}" for reason, rows in rows_by_reason(dropped).items())
