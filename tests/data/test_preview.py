import copy

import numpy as np
from tokenizers import decoders

from qstar_jax.config import DataOptions
from qstar_jax.data.preview import preview
from qstar_jax.data.records import Record
from qstar_jax.data.tokenization import Example, Response, tokenize


def shown(tokenizer, prompt, *responses):
    options = DataOptions(max_length=12, max_prompt_length=6)
    [example], _ = tokenize([Record(prompt, responses, 0)], tokenizer, options)
    return preview(example, tokenizer)


def styles(text):
    return {text.plain[span.start : span.end]: str(span.style) for span in text.spans}


def test_pair_as_plain_text(plain_tokenizer):
    assert shown(plain_tokenizer, "ab", "cd", "e").plain == (
        "prompt (2 tokens, not in the loss)\nab\n\nchosen (3 tokens, in the loss)\ncd[E]\n\n"
        "rejected (2 tokens, in the loss)\ne[E]"
    )


def test_colours(plain_tokenizer):
    style = styles(shown(plain_tokenizer, "ab", "cd", "e"))
    assert (style["ab"], style["cd"], style["e"]) == ("dim", "green", "red")
    assert "reverse" in style["[E]"]


def test_one_response_and_none(plain_tokenizer):
    assert "\n\nresponse (3 tokens, in the loss)\ncd[E]" in shown(plain_tokenizer, "ab", "cd").plain
    assert shown(plain_tokenizer, "ab").plain == "prompt (2 tokens, not in the loss)\nab"


def test_truncation_is_shown(plain_tokenizer):
    plain = shown(plain_tokenizer, "abcdefgh", "ijklmnop", "q").plain
    assert "prompt (6 tokens, not in the loss; truncated at the beginning)\ncdefgh\n" in plain
    assert "chosen (6 tokens, in the loss; truncated at the end, without EOS)\nijklmn\n" in plain
    assert "rejected (2 tokens, in the loss)\nq[E]" in plain


def test_steps_are_not_called_truncated(plain_tokenizer):
    [example], _ = tokenize([Record("ab", ("cd", "e"), 0, open_end=True)], plain_tokenizer, DataOptions())
    plain = preview(example, plain_tokenizer, of_steps=True).plain
    assert "chosen (2 tokens, in the loss; a step, without EOS)\ncd" in plain and "truncated" not in plain


def test_data_is_neither_markup_nor_a_terminal_command(plain_tokenizer):
    text = shown(plain_tokenizer, "[red]", "\x1b[2J")
    assert "[red]" in text.plain and "red" not in styles(text).values()
    assert "\x1b" not in text.plain and "␛[2J" in text.plain


def test_what_the_environment_says_is_dim(plain_tokenizer):
    ids = np.array(plain_tokenizer("abcde").input_ids, np.int32)
    response = Response(ids, True, np.array([True, True, False, False, True]), np.array([0, 0, -1, -1, 1]))
    text = preview(Example(ids[:1], False, (response,), 0), plain_tokenizer)
    assert "response (3 actions of 5 tokens in 2 turns, in the loss; truncated" in text.plain
    assert text.plain.endswith("ab⟨cd⟩e")
    found = styles(text)
    assert found["a"] == found["e"] == "green" and found["b"] == "green reverse" and found["⟨cd⟩"] == "dim"


def test_rankings_and_outcomes(plain_tokenizer):
    ids = [np.array(plain_tokenizer(text).input_ids, np.int32) for text in "abc"]
    ranking = Example(ids[0], False, tuple(Response(x, True) for x in (*ids, ids[0][:0])), 0)
    plain = preview(ranking, plain_tokenizer).plain
    assert "place 1 (1 token," in plain and "place 3 (1 token," in plain and "place 4" not in plain
    single = Example(ids[0], False, (Response(ids[1], True),) * 2, 0, {"labels": np.asarray(True)})
    plain = preview(single, plain_tokenizer).plain
    assert "response to another prompt (1 token," in plain and plain.endswith("labels: True")


def test_spaces_between_turns_are_kept(plain_tokenizer):
    """A decoder that strips the first space of a text would lose those where turns begin."""
    tokenizer = copy.deepcopy(plain_tokenizer)
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    ids = np.array(plain_tokenizer("a b c d").input_ids, np.int32)
    turns = np.array([0, -1, -1, 1, 1, 1])
    response = Response(ids[1:], True, turns >= 0, turns)
    assert preview(Example(ids[:1], False, (response,), 0), tokenizer).plain.endswith(" ⟨b ⟩c d")
