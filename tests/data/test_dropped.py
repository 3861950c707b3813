from qstar_jax.data.dropped import Dropped, counted_reasons, rows_by_reason


def test_reasons_with_most_rows_come_first():
    dropped = [Dropped(4, "b"), Dropped(1, "a"), Dropped(2, "b")]
    assert list(rows_by_reason(dropped).items()) == [("b", [2, 4]), ("a", [1])]
    assert counted_reasons(dropped) == "2 b, 1 a"
