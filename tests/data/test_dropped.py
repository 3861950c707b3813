import pytest

from qstar_jax.data.dropped import (
    Dropped,
    check_bad_rows,
    counted_reasons,
    first_rows,
    reasons_with_rows,
    rows_by_reason,
)
from qstar_jax.errors import InputError


def test_reasons_with_most_rows_come_first():
    dropped = [Dropped(4, "b"), Dropped(1, "a"), Dropped(2, "b")]
    assert list(rows_by_reason(dropped).items()) == [("b", [2, 4]), ("a", [1])]
    assert counted_reasons(dropped) == "2 b, 1 a"
    assert reasons_with_rows(dropped) == "2 b (row 3, 5), 1 a (row 2)"


def test_only_the_first_rows_and_reasons_are_named():
    assert first_rows([4]) == "row 5"
    assert first_rows([4, 16, 22, 40]) == "row 5, 17, 23, ..."
    many = [Dropped(row, f"reason {min(row, 9)}") for row in range(12)]
    assert reasons_with_rows(many).startswith("3 reason 9 (row 10, 11, 12), 1 reason 0 (row 1), ")
    assert reasons_with_rows(many).endswith("1 reason 6 (row 7), 2 for 2 other reasons")


TIES = [Dropped(row, "chosen equals rejected") for row in range(6)]


@pytest.mark.parametrize(
    ("bad", "total", "policy"), [(1, 10, "drop"), (2, 20, "drop"), (0, 10, "drop"), (0, 10, "stop")]
)
def test_a_tenth_may_be_bad_and_ties_do_not_count(bad, total, policy):
    check_bad_rows([*TIES, *[Dropped(7, "b", "b: x")] * bad], total, policy, "data.jsonl")


def test_too_many_bad_rows():
    dropped = [*TIES, Dropped(7, "b", "b: x"), Dropped(9, "c", "c")]
    with pytest.raises(InputError) as caught:
        check_bad_rows(dropped, 19, "drop", "data.jsonl")
    assert str(caught.value) == (
        "data.jsonl: too many bad rows to drop (2 of 19; at most a tenth may be bad): 1 b (row 8), 1 c (row 10); "
        "row 8: b: x; fix these rows or remove them from the file"
    )


def test_stop():
    with pytest.raises(InputError) as caught:
        check_bad_rows([*TIES, Dropped(7, "b", "b: x")], 1000, "stop", "data.jsonl")
    assert str(caught.value) == "data.jsonl row 8: b: x; fix the row, or drop bad rows with --data.bad_rows drop"
