"""Rows that could not be used: which and why, and when there are too many of them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from qstar_jax.errors import InputError

MOST_BAD = 0.1  # the share of bad rows above which a run ends: there are more than a few slips in such a file
_ROWS, _REASONS = 3, 8  # how many are named

Item, Used = TypeVar("Item"), TypeVar("Used")


class DroppedRow(Exception):
    """A row is well formed, but of no use (two equal answers, say); the message is the reason it is counted under."""

    fault = ""


class BadRow(DroppedRow):
    """A row is malformed, or the model has no place for it.

    Args:
        reason: What rows of the same kind share; it is counted under it.
        more: What this row adds: where it is, what was found, what was expected, the fix.
    """

    def __init__(self, reason: str, more: str = ""):
        super().__init__(reason)
        self.fault = reason + more


@dataclass(frozen=True)
class Dropped:
    """One row that could not be used.

    Args:
        row: Index of the row, counted from 0.
        reason: Why, in words that rows of the same kind share.
        fault: Of a bad row, what is wrong with it in full; empty where a row is well formed but of no use.
    """

    row: int
    reason: str
    fault: str = field(default="", compare=False)


def sift(items: Iterable[tuple[int, Item]], use: Callable[[Item], Used]) -> tuple[list[Used], list[Dropped]]:
    """Uses items one by one.

    Args:
        items: (index of the row, item).
        use: Raises DroppedRow or BadRow where an item cannot be used.

    Returns:
        What became of the others, and the rows that were dropped, both in order.
    """
    used, dropped = [], []
    for row, item in items:
        try:
            used.append(use(item))
        except DroppedRow as error:
            dropped.append(Dropped(row, str(error), error.fault))
    return used, dropped


def rows_by_reason(dropped: Sequence[Dropped]) -> dict[str, list[int]]:
    """The rows (from 0, in order) of each reason; the reason with the most rows comes first."""
    found: dict[str, list[int]] = {}
    for one in sorted(dropped, key=lambda one: one.row):
        found.setdefault(one.reason, []).append(one.row)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def counted_reasons(dropped: Sequence[Dropped]) -> str:
    """Such as "2 empty prompt, 1 chosen equals rejected"."""
    return ", ".join(f"{len(rows):,} {reason}" for reason, rows in rows_by_reason(dropped).items())


def reasons_with_rows(dropped: Sequence[Dropped]) -> str:
    """Such as "2 empty prompt (row 3, 8), 1 chosen equals rejected (row 5)"; rows count from 1, as in the file."""
    reasons = list(rows_by_reason(dropped).items())
    parts = [f"{len(rows):,} {reason} ({first_rows(rows)})" for reason, rows in reasons[:_REASONS]]
    if rest := reasons[_REASONS:]:
        parts.append(f"{sum(len(rows) for _, rows in rest):,} for {len(rest):,} other reasons")
    return ", ".join(parts)


def first_rows(rows: Sequence[int]) -> str:
    """Such as "row 5, 17, 23, ..." for the indices 4, 16, 22, 40."""
    return "row " + ", ".join([f"{row + 1}" for row in rows[:_ROWS]] + ["..."] * (len(rows) > _ROWS))


def check_some_left(dropped: Sequence[Dropped], total: int, source: str):
    """Raises an error if all rows were dropped; where one fault is behind it, it names that, such as a missing column.

    Args:
        dropped: The rows that were dropped.
        total: How many rows the source has.
        source: Path or hub name.

    Raises:
        InputError: No row is left.
    """
    if len(dropped) < total:
        return
    if total and len({one.reason for one in dropped}) == 1 and dropped[0].fault:
        more = f"; so it is in all {total:,} rows" if total > 1 else ""
        raise InputError(f"{source} row {dropped[0].row + 1}: {dropped[0].fault}{more}")
    reasons = reasons_with_rows(dropped) or "there are none"
    first = next((f"; row {one.row + 1}: {one.fault}" for one in dropped if one.fault), "")
    raise InputError(f"{source}: none of its {total:,} rows can be used ({reasons}){first}")


def check_bad_rows(dropped: Sequence[Dropped], total: int, bad_rows: Literal["drop", "stop"], source: str):
    """Raises an error if there are more bad rows than the options allow. Rows dropped for other reasons do not count.

    Args:
        dropped: The rows that were dropped.
        total: How many rows the source has.
        bad_rows: `stop` allows none, `drop` a tenth.
        source: Path or hub name.

    Raises:
        InputError: There are too many; it names the first one, what is wrong with it, and the fix.
    """
    bad = [one for one in dropped if one.fault]
    if not bad:
        return
    first = f"row {bad[0].row + 1}: {bad[0].fault}"
    if bad_rows == "stop":
        raise InputError(f"{source} {first}; mend the row, or leave bad rows out with --data.bad_rows drop")
    if len(bad) > MOST_BAD * total:
        raise InputError(
            f"{source}: too many bad rows to leave out ({len(bad):,} of {total:,}; at most a tenth may be bad): "
            f"{reasons_with_rows(bad)}; {first}; mend these rows or take them out of the file"
        )
