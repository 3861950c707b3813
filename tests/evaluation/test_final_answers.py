import pytest

from qstar_jax.data import patterns
from qstar_jax.errors import InputError
from qstar_jax.evaluation.final_answers import EXTRACTORS, final_answer, normalize, pattern_extractor, right_answer


@pytest.mark.parametrize(
    ("how", "text", "answer"),
    [
        ("hash", "5 + 2 = 7 ; # 7", "7"),
        ("hash", "#1 is wrong\n#### $1,200.00\nand more", "1200"),
        ("hash", "7", None),
        ("hash", "7 #", None),
        ("boxed", r"so \boxed{3} or rather \boxed{\frac{1}{2}}.", "1/2"),
        ("boxed", r"\boxed{\text{a}_{b}}", r"\text{a}_{b}"),
        ("boxed", r"\boxed{3", None),
        ("boxed", "3", None),
        ("marked", r"\boxed{3} # 4", "4"),
        ("marked", r"# 4 and \boxed{3}", "3"),
        ("marked", r"# 4 and \boxed{3", "4 and " + r"\boxed{3"),
        ("marked", "it is 3", None),
        ("number", "A: 18", "18"),
        ("number", "16-3=13, thus 16-3", "3"),
        ("number", "from 5 to -2.50!", "-5/2"),
        ("number", "half, 2/4 (see .5)", "1/2"),
        ("number", "in 1,000,000, no more.", "1000000"),
        ("number", "none", None),
    ],
)
def test_answers_are_found(how, text, answer):
    assert final_answer(text, EXTRACTORS[how]) == answer


def test_equal_numbers_are_written_alike_and_others_are_not():
    for one in ("1,200", "$1200", "1200.00", "1200.", " 1200 % ", r"\$1,200", "+1200", "2400/2"):
        assert normalize(one) == "1200"
    for other in ("1,20", "1200x", "12e2", "1 + 1199", "1200/0", "120", "-1200"):
        assert normalize(other) != "1200"
    assert normalize("two   words .") == "two words"
    digits = "1" * 5000  # more than Python turns into an int
    assert normalize(digits) == digits
    assert normalize("$") == "" and final_answer("# $", EXTRACTORS["hash"]) is None


def test_a_pattern_finds_what_its_group_matches_last():
    extract = pattern_extractor(r"^A: (.+)$")
    assert final_answer("A: 3\nA: 18 \nB: 5", extract) == "18"
    assert final_answer("B: 5", extract) is None


@pytest.mark.parametrize("pattern", ["A: .+", "(A): (.+)", "A: (.+"])
def test_a_pattern_has_one_group(pattern):
    with pytest.raises(InputError, match=r"^--pattern .*(expected one|no regular expression)"):
        pattern_extractor(pattern)


def test_the_right_answer_may_be_a_whole_solution():
    names = {"where": "rows.jsonl row 1", "option": "--right"}
    for value, how, answer in (
        ("He has 9 * 2 = 18\n#### 18", "marked", "18"),
        ("18.0", "marked", "18"),
        (18, "marked", "18"),
        (0.5, "marked", "1/2"),
        ("blue", "number", "blue"),
        (10**400, "number", str(10**400)),
    ):
        assert right_answer({"a": value}, "a", EXTRACTORS[how], **names) == answer


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, True, "", " ", "$", [18], {"a": 18}])
def test_what_is_no_right_answer_is_refused(value):
    """Responses would be compared with the text "nan", or with one that no response can give."""
    message = r"row 1: column 'a' holds .*; expected the right answer, a text or a finite number, .* --right names"
    with pytest.raises(InputError, match=message):
        right_answer({"a": value}, "a", EXTRACTORS["marked"], where="row 1", option="--right")
    with pytest.raises(InputError, match=r"column 'b' is missing \(found: 'a'\)"):
        right_answer({"a": 1}, "b", EXTRACTORS["marked"], where="row 1", option="--right")


def test_a_pattern_without_an_end_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(patterns, "MAX_SECONDS", 0.05)
    with pytest.raises(InputError, match=r"^--pattern .*still searching after 0.05 s"):
        pattern_extractor("((?:a|aa)+)$")("a" * 60 + "b")
    assert pattern_extractor("(x)?$")("a") is None  # a group that matched nothing
