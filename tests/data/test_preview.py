from qstar_jax.config import DataOptions
from qstar_jax.data.preview import preview
from qstar_jax.data.records import Record
from qstar_jax.data.tokenization import tokenize


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


def test_data_is_neither_markup_nor_a_terminal_command(plain_tokenizer):
    text = shown(plain_tokenizer, "[red]", "\x1b[2J")
    assert "[red]" in text.plain and "red" not in styles(text).values()
    assert "\x1b" not in text.plain and r"\x1b[2J" in text.plain
