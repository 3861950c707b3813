"""Rows that cannot be used: which and why, and whether there are too many of them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from qstar_jax.errors import InputError

_MAX_BAD_SHARE = 0.1  # with more bad rows, something is wrong with the file as a whole, and the run stops
_ROWS, _REASONS = 3, 8  # how many to list

Item, Used = TypeVar("Item"), TypeVar("Used")


class DroppedRow(Exception):
    """A row is well formed but useless (two equal responses, say); the message is the reason it is counted under."""

    fault = ""


class BadRow(DroppedRow):
    """A row is malformed, or the model cannot represent it.

    Args:
        reason: Shared by rows of the same kind, which are counted under it.
        more: Specific to this row: where it is, what was found, what was expected, the fix.
    """

    def __init__(self, reason: str, more: str = ""):
        super().__init__(reason)
        self.fault = reason + more


@dataclass(frozen=True)
class Dropped:
    """One row that cannot be used.

    Attributes:
        row: Index of the row, from 0.
        reason: Why, shared by rows of the same kind.
        fault: Full description of what is wrong with a bad row; empty if the row is well formed but useless.
    """

    row: int
    reason: str
    fault: str = field(default="", compare=False)


@dataclass(frozen=True)
class Again(Generic[Item]):
    """What is read or computed anew each time that it is iterated, because it may be too large to be kept.

    Attributes:
        start: Begins an iteration.
    """

    start: Callable[[], Iterator[Item]]

    def __iter__(self) -> Iterator[Item]:
        """Begins an iteration."""
        return self.start()


def kept_like(source: Iterable, items: Again[Item]) -> Iterable[Item]:
    """Keeps items if what they are made of is kept: makes a list of what comes from a list."""
    return list(items) if isinstance(source, list) else items


def used_or_dropped(items: Iterable[tuple[int, Item]], use: Callable[[Item], Used]) -> "Iterator[Used | Dropped]":
    """Applies a function to items.

    Args:
        items: (index of the row, item) pairs.
        use: Raises DroppedRow or BadRow if an item cannot be used.

    Yields:
        For each item, in order: the result, or why the row is dropped.
    """
    for row, item in items:
        try:
            yield use(item)
        except DroppedRow as error:
            yield Dropped(row, str(error), error.fault)


def separate(items: Iterable[Used | Dropped]) -> tuple[list[Used], list[Dropped]]:
    """Separates results from dropped rows, both in order."""
    used, dropped = [], []
    for item in items:
        (dropped if isinstance(item, Dropped) else used).append(item)
    return used, dropped


def rows_by_reason(dropped: Sequence[Dropped]) -> dict[str, list[int]]:
    """Returns the rows (from 0, in order) of each reason, the most frequent reason first."""
    rows: dict[str, list[int]] = {}
    for entry in sorted(dropped, key=lambda entry: entry.row):
        rows.setdefault(entry.reason, []).append(entry.row)
    return dict(sorted(rows.items(), key=lambda item: -len(item[1])))


def counted_reasons(dropped: Sequence[Dropped]) -> str:
    """Formats reasons as "2 empty prompt, 1 chosen equals rejected"."""
    return ", ".join(f"{len(rows):,} {reason}" for reason, rows in rows_by_reason(dropped).items())


def reasons_with_rows(dropped: Sequence[Dropped]) -> str:
    """Formats reasons as "2 empty prompt (row 3, 8), 1 chosen equals rejected (row 5)"; rows count from 1."""
    reasons = list(rows_by_reason(dropped).items())
    parts = [f"{len(rows):,} {reason} ({first_rows(rows)})" for reason, rows in reasons[:_REASONS]]
    if rest := reasons[_REASONS:]:
        parts.append(f"{sum(len(rows) for _, rows in rest):,} for {len(rest):,} other reasons")
    return ", ".join(parts)


def first_rows(rows: Sequence[int]) -> str:
    """Formats the indices 4, 16, 22, 40 as "row 5, 17, 23, ..."."""
    return "row " + ", ".join([f"{row + 1}" for row in rows[:_ROWS]] + ["..."] * (len(rows) > _ROWS))


def check_some_left(dropped: Sequence[Dropped], total: int, source: str):
    """Raises an error if all rows were dropped, naming the fault if they share one (a missing column, say).

    Raises:
        InputError: No row is left.
    """
    if len(dropped) < total:
        return
    if total and len({entry.reason for entry in dropped}) == 1 and dropped[0].fault:
        more = f"; the same in all {total:,} rows" if total > 1 else ""
        raise InputError(f"{source} row {dropped[0].row + 1}: {dropped[0].fault}{more}")
    reasons = reasons_with_rows(dropped) or "there are none"
    first = next((f"; row {entry.row + 1}: {entry.fault}" for entry in dropped if entry.fault), "")
    raise InputError(f"{source}: none of its {total:,} rows can be used ({reasons}){first}")


def check_bad_rows(dropped: Sequence[Dropped], total: int, bad_rows: Literal["drop", "stop"], source: str):
    """Raises an error if there are more bad rows than allowed: none with `stop`, a tenth with `drop`.

    Rows dropped for other reasons do not count.

    Raises:
        InputError: There are too many; names the first one, what is wrong with it, and the fix.
    """
    bad = [entry for entry in dropped if entry.fault]
    if not bad:
        return
    first = f"row {bad[0].row + 1}: {bad[0].fault}"
    if bad_rows == "stop":
        raise InputError(f"{source} {first}; fix the row, or drop bad rows with --data.bad_rows drop")
    if len(bad) > _MAX_BAD_SHARE * total:
        raise InputError(
            f"{source}: too many bad rows to drop ({len(bad):,} of {total:,}; at most a tenth may be bad): "
            f"{reasons_with_rows(bad)}; {first}; fix these rows or remove them from the file"
        )
