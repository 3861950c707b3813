import pytest

from qstar_jax.errors import InputError
from qstar_jax.evaluation.judges.prompts import TEMPLATES, load_template

TLDR, HH = TEMPLATES["tldr"], TEMPLATES["hh"]


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("Comparison: A says more.\nPreferred: A", "A"),
        ('Comparison: B is clear.\nPreferred: "B"', "B"),
        ("Comparison: fine.\nPreferred: <B>", "B"),
        ("**Comparison:** Summary A is vague.\n\n**Preferred:** B", "B"),
        ("Comparison: x\n**Preferred**: **A**", "A"),
        ("Comparison: x\npreferred: Summary B.", "B"),
        ("- Preferred: 'A'", "A"),
        ("Preferred: B\n\nI hope that this helps.", "B"),
        ("Summary A is better.\nA", "A"),
        ('It is hard to say.\n"B".\n', "B"),
        ("Preferred: A\nPreferred: A", "A"),
        ("Preferred: A or B", None),
        ('Preferred: <"A" or "B">', None),
        ("Preferred: A clear and short summary", None),  # an article, no choice
        ("Preferred: a", None),
        ("Preferred: C", None),
        ("Preferred: neither", None),
        ("Preferred: A\nNo, wait.\nPreferred: B", None),
        ("A\nis the better one", None),
        ("Comparison: I prefer A.", None),
        ("More helpful: A", None),  # another question's label
        ("Not Preferred: A", None),
        ("", None),
    ],
)
def test_letters_of_written_replies(reply, letter):
    assert TLDR.parse(reply) == letter


def test_each_question_has_its_own_label():
    assert HH.parse("Comparison: one sentence.\nMore helpful: B") == "B"
    assert HH.parse("**More helpful:** Response A") == "A"
    assert HH.parse("Preferred: A") is None


def test_rendering_fills_each_field_once_and_drops_outer_space():
    found = TLDR.render(" a post with {b} and {x} \n", " first {prompt}", "second ")
    assert "Post:\na post with {b} and {x}\n\nSummary A:\nfirst {prompt}\n\nSummary B:\nsecond\n\n" in found
    assert found.endswith('Comparison: <one sentence of comparison, with the reason>\nPreferred: <"A" or "B">')
    assert "{a}" not in HH.render("p", "a", "b")


def test_own_file(tmp_path):
    path = tmp_path / "own.txt"
    path.write_text('{"json": "{prompt}"}\n1: {a}\n2: {b}\nWinner: A or B?', encoding="utf-8")
    own = load_template(str(path))
    assert own.render("p", "x", "y") == '{"json": "p"}\n1: x\n2: y\nWinner: A or B?'
    assert own.parse("Winner: B") == "B" and own.parse("B") == "B" and own.parse("Worse: A\nBetter: B") is None
    path.write_text("{prompt} {a}")
    with pytest.raises(InputError, match=r"no \{b\} in it"):
        load_template(str(path))
    with pytest.raises(InputError, match=r"'none\.txt': expected tldr, hh or a text file"):
        load_template("none.txt")


def test_reminder_shows_what_the_parser_takes():
    assert TLDR.reminder.endswith('either Preferred: "A" or Preferred: "B".')
    assert TLDR.parse('Preferred: "A"') == "A"
