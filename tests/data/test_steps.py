"""Where steps end, and which tokens belong to them."""

import re

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qstar_jax.data import patterns
from qstar_jax.data.steps import delimited_ends, find_steps, listed_ends, parse_delimiter, steps_of_tokens
from qstar_jax.errors import InputError
from qstar_jax.evaluation.pieces import token_pieces


def texts(option, text):
    """The texts of the steps."""
    ends = delimited_ends(text, parse_delimiter(option).pattern)
    return [text[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


@pytest.mark.parametrize(
    ("option", "text", "expected"),
    [
        (";", "7 + 5 = 12 ; 12 - 3 = 9 ; # 9", ["7 + 5 = 12 ;", " 12 - 3 = 9 ;", " # 9"]),
        (r"\n", "a\nb\nc", ["a\n", "b\n", "c"]),
        ("\n", "a\nb", ["a\n", "b"]),  # a line break as YAML writes it
        (r"\n\n", "a\nb\n\nc\n\n\nd", ["a\nb\n\n", "c\n\n", "\nd"]),
        (r"\\n", r"a\nb", ["a\\n", "b"]),  # an escaped backslash
        (".", "a.b.", ["a.", "b."]),  # a text, no regular expression
        (r"re:[.!]\s*", "One. Two!  Three", ["One. ", "Two!  ", "Three"]),
        (r"re:(?=Step \d+:)", "Step 1: a Step 2: b", ["Step 1: a ", "Step 2: b"]),
        # What is between two places that match without a character is a step.
        (r"re:\b(?=[A-Z])", "One Two.Three", ["One ", "Two.", "Three"]),
        (r"re:(?<=a)x*", "axxba b", ["axx", "ba", " b"]),
        # What is empty belongs to the step before it, or, at the beginning, to the first.
        (r"\n", "\n\na\n \n\nb\n", ["\n\na\n \n\n", "b\n"]),
        (";", "no delimiter", ["no delimiter"]),
        (";", ";;", [";;"]),
        (";", "", [""]),
    ],
)
def test_steps_of_a_text(option, text, expected):
    assert texts(option, text) == expected
    assert "".join(expected) == text


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("", "expected a text"),
        ("re:(", "no regular expression"),
        ("re:x*", "matches the empty text"),
        ("re:", "matches the empty text"),
        ("column:", "name of a column"),
    ],
)
def test_delimiters_that_cannot_be_used_are_refused(option, message):
    with pytest.raises(InputError, match=re.escape(f"--data.step_delimiter {option!r}: ") + f".*{message}"):
        parse_delimiter(option)


def test_a_pattern_without_an_end_is_refused_by_name(monkeypatch):
    # Patterns that are slow elsewhere: these need no limit.
    assert texts("re:(a+)+$", "a" * 60 + "b") == ["a" * 60 + "b"]
    monkeypatch.setattr(patterns, "MAX_SECONDS", 0.05)
    message = r"--data.step_delimiter 're:\(a\|aa\)\+\$': still searching after 0.05 s in a text of 61 characters"
    with pytest.raises(InputError, match=message):
        texts("re:(a|aa)+$", "a" * 60 + "b")


def test_listed_steps_spell_the_text_but_for_spaces():
    text = " First. \n\nSecond, then.\nThird "
    ends = listed_ends(text, ["First.", " Second, then.", "Third\n"], "row 1")
    assert [text[begin:end] for begin, end in zip([0, *ends], ends, strict=False)] == [
        " First. \n\n", "Second, then.\n", "Third "
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (["First.", "Third"], "step 2, 'Third', does not stand .* goes on with 'Second"),
        (["First.", "Second", "Third", "Fourth"], "step 4"),
        (["First.", "Second"], "goes on after the last step, with 'Third'"),
        (["First.", ""], "none of them empty"),
        ("First.", "expected a list"),
        (None, "expected a list"),
    ],
)
def test_listed_steps_that_do_not_spell_the_text_are_refused(steps, message):
    with pytest.raises(InputError, match=f"row 1: .*{message}"):
        listed_ends("First. Second Third", steps, "row 1")


def test_a_token_that_straddles_belongs_to_the_earlier_step():
    assert steps_of_tokens(["a", ".\n", "b"], [3, 4]) == [0, 0, 1]
    assert steps_of_tokens(["a", ".\nb", "c"], [3, 5]) == [0, 0, 1]
    assert steps_of_tokens(["a;b;", "c"], [2, 4, 5]) == [0, 2]  # a step without tokens keeps its number
    assert steps_of_tokens(["a;", "", "é", "b"], [2, 4]) == [0, 1, 1, 1]  # parts of a character
    # The space of a word's token does not count, even where it is a part of the delimiter.
    assert steps_of_tokens(["One.", " Two.", "\n", "\n3", " ", "4"], [5, 11, 14]) == [0, 1, 1, 1, 2, 2]
    assert steps_of_tokens([], [0]) == []


@pytest.fixture(scope="module")
def merging():
    """A byte-level tokenizer, as GPT-2's, that merges ends of lines: Ċ is a line break."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), (".", "Ċ"), (".", "ĊĊ"), (";", "Ġ")]
    vocab = {piece: index for index, piece in enumerate([*alphabet, "ĊĊ", ".Ċ", ".ĊĊ", ";Ġ"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def spelled(tokenizer, text, option, eos=True):
    """The text of each step, as its tokens spell it."""
    ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] * eos
    pieces = token_pieces(ids, tokenizer)
    special = {place for place, token in enumerate(ids) if token in tokenizer.all_special_ids}
    steps = find_steps(pieces, [0] * len(ids), parse_delimiter(option), closing=special)
    assert list(steps) == sorted(steps)
    return ["".join(p for p, s in zip(pieces, steps, strict=True) if s == step) for step in sorted(set(steps))]


def test_merges_of_a_delimiter_belong_to_the_earlier_step(merging):
    assert ".ĊĊ" in merging.tokenize("a.\n\nb")
    assert spelled(merging, "a.\n\nb", r"\n\n") == ["a.\n\n", "b<|end|>"]
    assert spelled(merging, "a.\n\nb", r"\n") == ["a.\n\n", "b<|end|>"]
    assert spelled(merging, "a.\nb.\nc", r"\n") == ["a.\n", "b.\n", "c<|end|>"]
    # The space after ; is a part of its token, so it does not begin the next step.
    assert spelled(merging, "a; b; c", ";") == ["a; ", "b; ", "c<|end|>"]


def test_eos_after_the_last_delimiter_is_no_step_of_its_own(merging):
    assert spelled(merging, "a;b;", ";") == ["a;", "b;<|end|>"]
    assert spelled(merging, "a;b;\n", ";") == ["a;", "b;\n<|end|>"]
    assert spelled(merging, "a;b", ";", eos=False) == ["a;", "b"]
    assert spelled(merging, "", ";") == ["<|end|>"]


def test_a_turn_ends_a_step_and_only_actions_belong_to_steps():
    pieces = ["a;", "b", "<end>", "user; said;", "c;", "d", "<end>"]
    found = find_steps(pieces, [0, 0, 0, -1, 1, 1, 1], parse_delimiter(";"), closing={2, 6})
    assert found == (0, 1, 1, -1, 2, 3, 3)
    with pytest.raises(InputError, match="several turns"):
        find_steps(pieces, [0, 0, 0, -1, 1, 1, 1], parse_delimiter("column:steps"), listed=["a;"], where="row 1")


def test_a_special_token_may_end_steps():
    found = find_steps(["a", "<sep>", "b", "<sep>", "<end>"], [0] * 5, parse_delimiter("<sep>"), closing={1, 3, 4})
    assert found == (0, 0, 1, 1, 1)
