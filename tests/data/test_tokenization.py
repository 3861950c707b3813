import copy

import numpy as np
import pytest
from tokenizers import processors

from qstar_jax.config import DataOptions
from qstar_jax.data.dropped import Dropped
from qstar_jax.data.records import Record
from qstar_jax.data.tokenization import tokenize
from qstar_jax.errors import InputError


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


def one(tokenizer, prompt, *responses, max_length=100, max_prompt_length=50):
    """Tokenizes one record, and decodes its prompt and responses."""
    options = DataOptions(max_length=max_length, max_prompt_length=max_prompt_length)
    [example], dropped = tokenize([Record(prompt, responses, 7)], tokenizer, options)
    assert not dropped
    return example, [tokenizer.decode(ids) for ids in (example.prompt, *(r.ids for r in example.responses))]


def dropped_reason(tokenizer, prompt, *responses, **lengths):
    examples, dropped = tokenize([Record(prompt, responses, 0)], tokenizer, DataOptions(**lengths))
    assert examples == []
    [dropped_row] = dropped
    assert dropped_row.row == 0
    return dropped_row.reason


def test_text_is_tokenized_and_ends_with_eos(plain_tokenizer):
    records = [Record(prompt="ab", responses=("cd", "e"), row=0)]
    [example], dropped = tokenize(records, plain_tokenizer, DataOptions(max_length=8, max_prompt_length=4))
    assert plain_tokenizer.decode(example.prompt) == "ab"
    assert [plain_tokenizer.decode(response.ids) for response in example.responses] == ["cd[E]", "e[E]"]
    assert dropped == []


def test_text_ends_with_one_eos(plain_tokenizer):
    example, texts = one(plain_tokenizer, "ab", "cde", "f[E]")
    assert texts == ["ab", "cde[E]", "f[E]"]
    assert [len(r.ids) for r in example.responses] == [4, 2]
    assert not example.prompt_truncated and not any(r.truncated for r in example.responses)
    assert example.row == 7
    assert example.prompt.dtype == example.responses[0].ids.dtype == np.int32


def test_only_eos_follows_a_text(tiny_tokenizer):
    """Some tokenizers end every text with EOS or with another token."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS] [UNK]", special_tokens=[("[BOS]", 1), ("[EOS]", 2), ("[UNK]", 3)]
    )
    assert tokenizer("w1").input_ids == [1, 5, 2, 3]
    records = [Record("w1 w2", ("w3", "w4 w5"), 0)]
    (example,), _ = tokenize(records, tokenizer, DataOptions())
    assert example.prompt.tolist() == [1, 5, 6]
    assert [response.ids.tolist() for response in example.responses] == [[7, 2], [8, 9, 2]]
    (example,), _ = tokenize([Record("", ("w3",), 0)], tokenizer, DataOptions())
    assert (example.prompt.tolist(), example.responses[0].ids.tolist()) == ([1], [7, 2])


def test_several_eos_become_one(plain_tokenizer):
    assert one(plain_tokenizer, "ab", "c[E][E]")[1][1] == "c[E]"


def test_prompt_keeps_the_tokenizers_bos_and_loses_its_eos(character_tokenizer):
    tokenizer = character_tokenizer(bos="[B]", before="[B]", after="[E]")
    assert one(tokenizer, "ab", "c")[1] == ["[B]ab", "c[E]"]
    assert one(tokenizer, "ab[E][E]", "c", "d")[1] == ["[B]ab", "c[E]", "d[E]"]
    tokenizer = character_tokenizer(bos="[E]", before="[E]")  # as GPT-2, whose one special token is both
    assert one(tokenizer, "", "c")[1] == ["[E]", "c[E]"]


def test_no_token_spans_the_boundary(character_tokenizer):
    tokenizer = character_tokenizer(merges=["bc"])
    assert len(tokenizer("abcd").input_ids) == 3
    example, _ = one(tokenizer, "ab", "cd")
    assert len(example.prompt) == 2
    assert example.responses[0].ids.tolist() == [*tokenizer.convert_tokens_to_ids(["c", "d"]), tokenizer.eos_token_id]


def test_chat_response_is_what_the_template_adds(chat_tokenizer):
    _, texts = one(chat_tokenizer, user("ab"), assistant("c"), assistant("d"))
    assert texts == ["[B]<user>ab[E]\n<assistant>", "c[E]", "d[E]"]


def test_chat_whose_template_ends_turns_without_eos_gets_one(character_tokenizer, chat_tokenizer):
    template = chat_tokenizer.chat_template.replace("{{ eos_token }}", "|")
    tokenizer = character_tokenizer(bos="[B]", chat_template=template)
    assert one(tokenizer, user("ab"), assistant("c"))[1] == ["[B]<user>ab|\n<assistant>", "c|\n[E]"]


def test_template_that_refuses_the_messages(chat_tokenizer):
    prompt = [{"role": "banned", "content": "x"}]
    assert dropped_reason(chat_tokenizer, prompt) == "the chat template refuses the messages (no such role)"


def test_missing_chat_template(plain_tokenizer):
    with pytest.raises(InputError, match="no chat template; use the tokenizer of an instruction-tuned model"):
        tokenize([Record("a", (), 0), Record(user("a"), (), 1)], plain_tokenizer, DataOptions())


def test_missing_eos(character_tokenizer):
    with pytest.raises(InputError, match=r"no EOS token.*eos_token"):
        tokenize([Record("a", ("b",), 0)], character_tokenizer(eos=None), DataOptions())


def test_prompt_limit_must_be_positive(plain_tokenizer):
    with pytest.raises(InputError, match="max_prompt_length is 0; expected at least 1"):
        tokenize([], plain_tokenizer, DataOptions(max_prompt_length=0))


def test_prompt_limit_must_be_below_the_whole(plain_tokenizer):
    with pytest.raises(InputError, match=r"max_prompt_length \(6\) leaves no room .*max_length \(6 tokens"):
        tokenize([], plain_tokenizer, DataOptions(max_prompt_length=6, max_length=6))
    assert tokenize([], plain_tokenizer, DataOptions(max_prompt_length=5, max_length=6)) == ([], [])


def test_prompts_take_half_of_the_length_unless_told_otherwise(plain_tokenizer):
    assert one(plain_tokenizer, "abcdef", "ghijkl", max_length=6, max_prompt_length=None)[1] == ["def", "ghi"]
    with pytest.raises(InputError, match="max_length is 1; expected at least 2 tokens"):
        tokenize([], plain_tokenizer, DataOptions(max_length=1))


def test_long_prompt_loses_its_beginning(plain_tokenizer):
    example, texts = one(plain_tokenizer, "abcdef", "g", max_prompt_length=4)
    assert texts[0] == "cdef" and example.prompt_truncated
    assert not one(plain_tokenizer, "abcd", "g", max_prompt_length=4)[0].prompt_truncated


@pytest.mark.parametrize(("length", "kept"), [(4, "[B]def"), (1, "[B]")])
def test_long_prompt_keeps_its_bos(chat_tokenizer, length, kept):
    example, texts = one(chat_tokenizer, "abcdef", "g", max_prompt_length=length)
    assert texts[0] == kept and example.prompt_truncated


def test_long_chat_prompt_keeps_its_bos(chat_tokenizer):
    assert one(chat_tokenizer, user("ab"), assistant("c"), max_prompt_length=12)[1] == ["[B]<assistant>", "c[E]"]


def test_long_response_loses_its_end_and_eos(plain_tokenizer):
    example, texts = one(plain_tokenizer, "ab", "cdefgh", "cd", max_length=6, max_prompt_length=3)
    assert texts == ["ab", "cdef", "cd[E]"]
    assert [r.truncated for r in example.responses] == [True, False]


def test_response_that_leaves_no_room_for_eos_is_truncated(plain_tokenizer):
    example, texts = one(plain_tokenizer, "ab", "cdef", "cde", max_length=6, max_prompt_length=3)
    assert texts == ["ab", "cdef", "cde[E]"]
    assert [r.truncated for r in example.responses] == [True, False]


def test_room_for_the_response_counts_the_truncated_prompt(plain_tokenizer):
    assert one(plain_tokenizer, "abcdef", "gh", max_length=5, max_prompt_length=2)[1] == ["ef", "gh[E]"]


def test_empty_prompt(plain_tokenizer, chat_tokenizer, character_tokenizer):
    assert one(chat_tokenizer, "", "c")[1] == ["[B]", "c[E]"]
    bos_unused = character_tokenizer(bos="[B]")
    assert one(bos_unused, "", "c")[1] == ["[B]", "c[E]"]
    assert dropped_reason(plain_tokenizer, "", "c") == "empty prompt"


def test_eos_inside_a_response(plain_tokenizer, chat_tokenizer):
    assert dropped_reason(plain_tokenizer, "a", "b[E]c") == "EOS token inside a response"
    assert dropped_reason(chat_tokenizer, user("a"), assistant("b[E]c")) == "EOS token inside a response"


def test_eos_inside_a_response_whose_turn_ends_with_something_else(character_tokenizer, chat_tokenizer):
    tokenizer = character_tokenizer(chat_template=chat_tokenizer.chat_template.replace("{{ eos_token }}", "|"))
    assert dropped_reason(tokenizer, user("a"), assistant("b[E]c")) == "EOS token inside a response"


def test_responses_that_differ_only_beyond_the_limit(plain_tokenizer):
    reason = dropped_reason(plain_tokenizer, "a", "bcdX", "bcdY", max_length=4, max_prompt_length=1)
    assert reason == "the tokens of the two responses are equal within max_length"


def test_prompts_alone(chat_tokenizer):
    example, texts = one(chat_tokenizer, user("a"))
    assert texts == ["[B]<user>a[E]\n<assistant>"] and example.responses == ()


def test_order_rows_and_counts(plain_tokenizer):
    records = [Record("a", ("b",), 2), Record("", ("b",), 3), Record("a", ("c",), 5), Record("", ("d",), 6)]
    examples, dropped = tokenize(records, plain_tokenizer, DataOptions())
    assert [example.row for example in examples] == [2, 5]
    assert dropped == [Dropped(3, "empty prompt"), Dropped(6, "empty prompt")]


def test_tokens_beyond_the_embedding(plain_tokenizer, character_tokenizer):
    size = len(plain_tokenizer)
    added = character_tokenizer(pad="[E]")
    added.add_tokens(["Zebra"])
    added.add_special_tokens({"pad_token": "[PAD]"})  # padding is in no row, so it does not matter
    records = [Record("a", ("b", "c"), 0), Record("a", ("b Zebra", "c"), 4)]
    assert len(tokenize(records[:1], added, DataOptions(), vocabulary=size)[0]) == 1
    message = rf"pairs.jsonl row 5: the token 'Zebra' has id {size}, but the model has only {size} tokens; resize"
    with pytest.raises(InputError, match=message):
        tokenize(records, added, DataOptions(), vocabulary=size, source="pairs.jsonl")
    with pytest.raises(InputError, match="row 5: the token 'Zebra'"):
        tokenize([Record("Zebra", (), 4)], added, DataOptions(), vocabulary=size)
    assert len(tokenize(records, added, DataOptions(), vocabulary=size + 1)[0]) == 2
    added.add_special_tokens({"eos_token": "[END]", "bos_token": "[BEGIN]"})
    with pytest.raises(InputError, match=r"row 1: the token '\[END\]' has id"):  # it ends a response
        tokenize(records[:1], added, DataOptions(), vocabulary=size)
    with pytest.raises(InputError, match=r"row 1: the token '\[BEGIN\]' has id"):  # it stands for an empty prompt
        tokenize([Record("", (), 0)], added, DataOptions(), vocabulary=size)


def test_slow_tokenizers_are_refused(plain_tokenizer, monkeypatch):
    monkeypatch.setattr(type(plain_tokenizer), "is_fast", False)
    with pytest.raises(InputError, match=r"is a slow tokenizer.*expected a fast one"):
        tokenize([Record("a", ("b",), 0)], plain_tokenizer, DataOptions())


@pytest.mark.parametrize("code", ["m.content + 3", "m.content | abs", "m['content'].x.y", "raise_exception('\x1bno')"])
def test_a_template_may_fail_in_any_way(character_tokenizer, code):
    tokenizer = character_tokenizer(chat_template="{% for m in messages %}{{ " + code + " }}{% endfor %}")
    reason = dropped_reason(tokenizer, user("a"), assistant("b"))
    assert reason.startswith("the chat template refuses the messages (") and "\x1b" not in reason
