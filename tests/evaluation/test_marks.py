import numpy as np
import pytest

from qstar_jax.errors import InputError
from qstar_jax.evaluation.marks import marked_tokens, read_marks

RESPONSE = " The pay is 250K a year."


def test_marks_are_ranges_or_texts():
    assert read_marks([[12, 16], "year"], RESPONSE, "f row 1") == [(12, 16), (19, 23)]


@pytest.mark.parametrize(
    ("marks", "message"),
    [
        (None, "found None as marks; expected a list of"),
        ([], "found \\[\\] as marks"),
        ("250K", "found '250K' as marks"),
        (["300K"], "'300K' occurs 0 times in the response; expected once"),
        (["a"], "'a' occurs 3 times"),
        ([[3, 3]], r"range \[3, 3\] lies outside the response's 24 characters"),
        ([[0, 99]], r"range \[0, 99\] lies outside"),
        ([[True, 2]], r"found the mark \[True, 2\]"),
        ([{"start": 1}], "found the mark {'start': 1}"),
        ([""], "found the mark ''"),
    ],
)
def test_other_marks_are_refused(marks, message):
    with pytest.raises(InputError, match=f"f row 1: .*{message}"):
        read_marks(marks, RESPONSE, "f row 1")


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([" The", " pay", " is", " 250", "K", " a", " year", ".", "<eos>"], [0, 0, 0, 1, 1, 0, 0, 0, 0]),
        ([" The pay is", " 2", "", "5", "0K a", " year."], [0, 1, 0, 1, 1, 0]),
        (["The", " pay", " is", " ", "250K", " a year.", "<|im_end|>"], [0, 0, 0, 0, 1, 0, 0]),  # a chat: stripped
        ([" The", " pay", " is", " 250K"], [0, 0, 0, 1]),  # truncated after the mark
    ],
)
def test_tokens_that_cover_a_mark(pieces, expected):
    (covered,) = marked_tokens(pieces, RESPONSE, [(12, 16)], "f row 1")
    assert covered.tolist() == [bool(x) for x in expected]


def test_each_mark_has_its_tokens_and_spaces_have_none():
    pieces = [" The", " pay", " is", " 250", "K", " a", " year", "."]
    covered = marked_tokens(pieces, RESPONSE, [(0, 4), (15, 23)], "f row 1")
    assert [np.flatnonzero(marked).tolist() for marked in covered] == [[0], [4, 5, 6]]
    with pytest.raises(InputError, match=r"the mark \[0, 1\) covers no word"):
        marked_tokens(pieces, RESPONSE, [(0, 1)], "f row 1")


def test_a_mark_that_was_truncated_is_refused():
    with pytest.raises(InputError, match=r"do not spell the response up to its last mark .* a longer data\.max_length"):
        marked_tokens([" The", " pay", " is"], RESPONSE, [(12, 16)], "f row 1")
