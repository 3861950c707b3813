"""The assistant's turns in dialogues: which tokens are actions, and the known bugs of other trainers.

Every character is a token, so masks are written by hand as texts: actions alone, then the whole response.
"""

import json

import numpy as np
import pytest

from qstar_jax.config import DataOptions
from qstar_jax.data.batches import make_batch
from qstar_jax.data.loading import load_examples, make_dataset
from qstar_jax.data.packing import Shapes
from qstar_jax.data.preferences import completion_records, label_records, preference_records, prompt_records
from qstar_jax.data.preview import preview
from qstar_jax.data.records import Record
from qstar_jax.data.tokenization import tokenize
from qstar_jax.data.turns import turn_of_tokens
from qstar_jax.errors import InputError

CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"x": "number"}}}]
TOOL_TEMPLATE = (
    "{% for t in tools or [] %}({{ t.function.name }}){% endfor %}{% for m in messages %}<{{ m.role }}>"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}:{{ c.function.arguments | tojson }}{% endfor %}"
    "{{ m.content }}[E]\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def tool(text):
    return {"role": "tool", "content": text}


def one(tokenizer, messages, *, tools=None, prompt=1, eos_ids=(), **options):
    """The response of a dialogue, whose first messages are the prompt."""
    record = Record(messages[:prompt], (messages[prompt:],), 0, tools)
    [example], dropped = tokenize([record], tokenizer, DataOptions(**options), eos_ids=eos_ids)
    assert not dropped
    return example.responses[0]


def fault(tokenizer, messages, **options):
    [dropped] = tokenize([Record(messages[:1], (messages[1:],), 0)], tokenizer, DataOptions(**options))[1]
    return dropped.fault or dropped.reason


def texts(tokenizer, response):
    """Text of each stretch of tokens with its turn, and of the environment (-1)."""
    stretches = np.split(np.arange(len(response.ids)), np.flatnonzero(np.diff(response.turns)) + 1)
    np.testing.assert_array_equal(response.action_mask, response.turns >= 0)
    return [(int(response.turns[s[0]]), tokenizer.decode(response.ids[s])) for s in stretches]


TALK = [user("a"), assistant("bc"), user("d"), assistant("e"), tool("f"), assistant("gh")]
MASK = [(0, "bc[E]"), (-1, "\n<user>d[E]\n<assistant>"), (1, "e[E]"), (-1, "\n<tool>f[E]\n<assistant>"), (2, "gh[E]")]


def test_actions_are_words_and_ends_of_turns(chat_tokenizer):
    assert texts(chat_tokenizer, one(chat_tokenizer, TALK)) == MASK


def test_the_last_turn_or_its_final_answer(character_tokenizer, chat_tokenizer):
    last = one(chat_tokenizer, TALK, turns="last")
    assert texts(chat_tokenizer, last) == [(-1, "".join(text for _, text in MASK[:-1])), (0, "gh[E]")]
    tokenizer = character_tokenizer(chat_template=TOOL_TEMPLATE)
    thinking = [user("a"), assistant("x"), user("d"), assistant("<think>u</think> v", tool_calls=[CALL])]
    answers = {
        turns: texts(tokenizer, one(tokenizer, thinking, turns=turns))[-1] for turns in ("all", "last", "final_answer")
    }
    words = 'f:{"x": 1}<think>u</think> v[E]'
    assert answers == {"all": (1, words), "last": (0, words), "final_answer": (0, "v[E]")}
    calls_only = [user("a"), assistant("", tool_calls=[CALL])]
    assert fault(tokenizer, calls_only, turns="final_answer").startswith("the last turn has no final answer, only")


def test_a_final_answer_may_occur_in_the_end_of_its_turn(chat_tokenizer):
    """As "e" in <|im_end|>, or "im_end"."""
    for answer in ("E", "[", "E]"):
        response = one(
            chat_tokenizer, [user("a"), assistant(f"<think>{answer}</think> {answer} ")], turns="final_answer"
        )
        assert texts(chat_tokenizer, response)[-1][1].replace(" ", "") == f"{answer}[E]"


def test_words_before_a_tool_call_are_no_final_answer(character_tokenizer):
    template = TOOL_TEMPLATE.replace("{{ m.content }}", "").replace("{% for c in", "{{ m.content }}{% for c in")
    talk = [user("a"), assistant("b", tool_calls=[CALL])]
    message = fault(character_tokenizer(chat_template=template), talk, turns="final_answer")
    assert message.startswith("the chat template does not render the final answer as the end of the last turn ('b')")


def test_turns_of_weight_0_are_not_learned(chat_tokenizer):
    """OpenAI's mark for turns of the assistant that were wrong."""
    for weight in (0, 0.0, False):
        talk = [TALK[0], assistant("bc", weight=weight), *TALK[2:]]
        expected = [(-1, "".join(text for _, text in MASK[:2])), (0, "e[E]"), MASK[3], (1, "gh[E]")]
        assert texts(chat_tokenizer, one(chat_tokenizer, talk)) == expected
    assert texts(chat_tokenizer, one(chat_tokenizer, [TALK[0], assistant("bc", weight=1), *TALK[2:]])) == MASK
    assert fault(chat_tokenizer, [user("a"), assistant("b", weight=0)]).startswith("the last turn of the assistant has")
    row = {"messages": [user("a"), assistant("b", weight=0.5)]}
    with pytest.raises(InputError, match=r"message whose .weight. is 0\.5"):
        completion_records([row], DataOptions(), "rows.jsonl")


# Pairs that part anywhere


def read(reader, row, **options):
    records, dropped = reader([row], DataOptions(**options), "rows.jsonl")
    assert not dropped
    return records[0]


def test_pairs_part_where_they_begin_to_differ():
    chosen = [*TALK[:3], assistant("e2"), user("x"), assistant("y")]
    for row in (
        {"chosen": TALK, "rejected": chosen},
        {"prompt": TALK[:1], "chosen": TALK[1:], "rejected": chosen[1:]},
    ):
        record = read(preference_records, row)
        assert record.prompt == TALK[:3] and record.responses == (TALK[3:], chosen[3:])


def test_pairs_of_different_numbers_of_turns(chat_tokenizer):
    shorter = [*TALK[:3], assistant("e2")]
    record = read(preference_records, {"chosen": TALK, "rejected": shorter})
    [example], _ = tokenize([record], chat_tokenizer, DataOptions())
    assert chat_tokenizer.decode(example.prompt).endswith("\n<user>d[E]\n<assistant>")
    assert [texts(chat_tokenizer, r)[-1] for r in example.responses] == [(1, "gh[E]"), (0, "e2[E]")]


def test_pairs_without_a_common_beginning_are_dropped():
    pair = {"chosen": TALK, "rejected": [user("z"), assistant("y")]}
    _, [dropped] = preference_records(
        [{"chosen": TALK, "rejected": [*TALK[:1], assistant("y")]}, pair], DataOptions(), "f"
    )
    assert dropped.reason == "prompts of the two dialogues differ"


def test_labels_of_pairs_are_those_of_turns_that_differ():
    other = [*TALK[:3], assistant("x")]
    rows = [{"chosen": TALK, "rejected": other}, {"chosen": TALK, "rejected": None}]
    records, [dropped] = label_records(rows, DataOptions(), "f")
    assert [record.prompt for record in records] == [TALK[:3], TALK[:3], TALK[:1]]
    assert [record.responses for record in records] == [(TALK[3:],), (other[3:],), (TALK[1:],)]
    assert [record.label for record in records] == [True, False, True] and "is null" in dropped.reason


def test_single_dialogues_begin_with_the_first_turn():
    row = {"messages": TALK}
    assert read(completion_records, row).prompt == TALK[:1]
    assert read(completion_records, row, turns="last").prompt == TALK[:-1]
    assert read(prompt_records, row).prompt == TALK[:-1]


def test_a_prompt_that_dialogues_repeat_is_where_they_begin():
    for prompt, start in ((TALK[:1], 1), (TALK[:3], 3), ("a", 1), ("d", 3)):
        record = read(completion_records, {"prompt": prompt, "completion": TALK})
        assert record.prompt == TALK[:start] and record.responses == (TALK[start:],)
        pair = {"prompt": prompt, "chosen": TALK, "rejected": [*TALK[:3], assistant("x")]}
        assert read(preference_records, pair).prompt == TALK[:3]
    rows = [{"prompt": "a", "completion": TALK}, {"prompt": "x", "completion": TALK}]
    _, [dropped] = completion_records(rows, DataOptions(), "f")
    assert dropped.reason == "the prompt column and the prompt of the dialogues differ"


@pytest.mark.parametrize(("prompt", "responses", "why"), [("a", ("b",), "no row is a chat"), (TALK[:1], (), "prompts")])
def test_turns_that_have_no_effect_are_refused(prompt, responses, why, chat_tokenizer):
    with pytest.raises(InputError, match=f"data.turns.* has no effect.*{why}"):
        tokenize([Record(prompt, responses, 0)], chat_tokenizer, DataOptions(turns="last"))


# Templates that rewrite turns

REWRITES = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and loop.last %}~{% endif %}"
    "{{ m.content }}[E]\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}<assistant>{% if loop.last %}~{% endif %}"
    "{{ m.content }}{% endgeneration %}[E]\n{% else %}<{{ m.role }}>{{ m.content }}[E]\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_rewritten_turns_are_refused_with_the_way_out(character_tokenizer):
    """THUDM/slime#1418: Qwen3 drops the reasoning of earlier turns."""
    tokenizer = character_tokenizer(chat_template=REWRITES)
    message = fault(tokenizer, TALK[:4])
    assert message.startswith("the chat template rewrites a turn of the assistant when another follows (after")
    assert "'~bc[E]" in message and "--data.turns last" in message and "--data.chat_template FILE" in message
    assert texts(tokenizer, one(tokenizer, TALK[:4], turns="last"))[-1] == (0, "~e[E]")


def test_marked_turns_are_taken_where_prefixes_differ(character_tokenizer):
    tokenizer = character_tokenizer(chat_template=MARKED)
    expected = [(0, "bc[E]"), (-1, "\n<user>d[E]\n<assistant>"), (1, "~e[E]")]
    assert texts(tokenizer, one(tokenizer, TALK[:4])) == expected


def test_a_template_from_a_file_is_the_way_out(character_tokenizer, tmp_path):
    (tmp_path / "t.jinja").write_text(MARKED)
    tokenizer = character_tokenizer(chat_template=REWRITES)
    assert one(tokenizer, TALK, chat_template=str(tmp_path / "t.jinja")).turns.max() == 2


def test_marked_turns_are_refused_in_contexts_that_generation_never_sees(character_tokenizer):
    followed = "{% else %}{% if loop.index > 1 and not loop.last %}!{% endif %}<{{ m.role }}>"
    template = MARKED.replace("{% else %}<{{ m.role }}>", followed)
    message = fault(character_tokenizer(chat_template=template), TALK[:4])
    assert message.startswith("the chat template rewrites what comes before a turn of the assistant when this follows")
    assert "it first has '<user>d" in message and "and later '!<user>d" in message and "--data.turns last" in message


def test_marked_turns_must_show_their_own_reasoning(character_tokenizer):
    marked = MARKED.replace("~", "{{ m.reasoning_content }}")
    talk = [user("a"), assistant("b", reasoning_content="u"), user("c"), assistant("d", reasoning_content="v")]
    assert fault(character_tokenizer(chat_template=marked), talk).startswith(
        "the chat template omits reasoning_content"
    )


# The eleven bugs


def test_a_truncated_last_turn_keeps_its_actions(chat_tokenizer):
    """transformers#34494: the last assistant turn, truncated, got a mask of zeros."""
    whole = one(chat_tokenizer, TALK)
    for room in range(1, len(whole.ids)):
        response = one(chat_tokenizer, TALK, max_length=10 + room, max_prompt_length=10)
        assert response.truncated and response.num_actions == (whole.turns[:room] >= 0).sum()
        np.testing.assert_array_equal(response.turns, whole.turns[: len(response.ids)])
        assert response.action_mask[-1]  # what a tool says after the last action is dropped
    response = one(chat_tokenizer, TALK, max_length=10 + len(whole.ids), max_prompt_length=10)
    assert not response.truncated and response.ids.tolist() == whole.ids.tolist()


def test_pairs_that_differ_beyond_max_length_only_in_the_environment(chat_tokenizer):
    pair = [[assistant("bc"), user(text), assistant("e")] for text in ("x", "y")]
    options = DataOptions(max_length=10 + len("bc[E]<user>x"), max_prompt_length=10)
    examples, [dropped] = tokenize([Record(TALK[:1], tuple(pair), 0)], chat_tokenizer, options)
    assert not examples and dropped.reason == "the tokens of the two responses are equal within max_length"


def test_turns_at_the_first_token_and_on_white_space():
    """transformers#47325: a span at token 0, or on white space, was masked up to the end of the sequence."""
    offsets = [(0, 2), (2, 3), (3, 5), (5, 6)]  # "ab", a space that a pre-tokenizer strips, "cd", "e"
    assert turn_of_tokens([1, 2, 3, 4], offsets, [(0, 2), (5, 6)], "ab cde", frozenset()) == [0, -1, -1, 1]
    without_space = [(0, 2), (3, 5), (5, 6)]
    for first, expected in (((2, 3), [-1, -1, 1]), ((0, 2), [0, -1, 1])):
        spans = [first, (5, 6)]
        assert turn_of_tokens([1, 3, 4], without_space, spans, "ab cde", frozenset()) == expected


@pytest.mark.parametrize("layout", ["packed", "shared", "plain"])
def test_masks_lie_on_their_tokens_in_every_layout(layout, chat_tokenizer):
    """NeMo Automodel#2314: a mask built unpadded and applied to padded ids was zero nearly everywhere."""
    talks = [TALK, TALK[:2], TALK[:4]]
    examples = tokenize([Record(t[:1], (t[1:],), i) for i, t in enumerate(talks)], chat_tokenizer, DataOptions())[0]
    batch = make_batch(examples, Shapes.of(examples, layout, batch_size=3))
    learned = batch.targets.reshape(-1)[batch.index]
    for b, example in enumerate(examples):
        said = example.responses[0].ids[example.responses[0].action_mask]
        assert learned[b, 0][batch.action_mask[b, 0]].tolist() == said.tolist()
    assert batch.action_mask.sum() == sum(
        len(t.replace("[E]", "E")) for t in ("bc[E]", "e[E]", "gh[E]", "bc[E]", "bc[E]", "e[E]")
    )


def test_an_end_that_the_template_gives_to_the_next_message_is_an_action(character_tokenizer):
    """TRL's `is_chat_template_stop_token_trained`: otherwise the model never learns to stop."""
    template = (
        "{% for m in messages %}{% if not loop.first %}[E]\n{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[E]\n<assistant>{% endif %}"
    )
    tokenizer = character_tokenizer(chat_template=template)
    expected = [(0, "bc[E]"), (-1, "\n<user>d[E]\n<assistant>"), (1, "e[E]")]
    assert texts(tokenizer, one(tokenizer, TALK[:4])) == expected


def test_turns_without_an_end_of_the_model_are_refused(character_tokenizer):
    """As gpt-oss's <|end|>: the model would learn to end its turns with a token at which decoding does not stop."""
    template = MARKED.replace(
        "{% endgeneration %}[E]", "{% if loop.last %}[E]{% else %};{% endif %}{% endgeneration %}"
    )
    message = fault(character_tokenizer(chat_template=template), TALK[:4])
    assert message.startswith("the chat template ends earlier turns of the assistant with another token than the last")
    assert "bc;" in message and "has no EOS of the model" in message and "--data.turns last" in message


def test_an_end_of_dialogues_is_no_end_of_turns(character_tokenizer):
    """As in Phi 3's template, which ends turns with <|end|>, and dialogues with <|endoftext|> as well."""
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}[X]\n{% endfor %}"
    template += "{% if add_generation_prompt %}<assistant>{% else %}[E]{% endif %}"
    tokenizer = character_tokenizer(chat_template=template, merges=(r"\[X\]",))
    tokenizer.add_tokens("[X]")
    response = one(tokenizer, TALK[:4], eos_ids=[tokenizer.convert_tokens_to_ids("[X]")])
    assert texts(tokenizer, response) == [(0, "bc[X]"), (-1, "\n<user>d[X]\n<assistant>"), (1, "e[X]")]


def test_tools_are_shown_once_and_to_every_prefix(character_tokenizer):
    """THUDM/slime#1073: the schema of tools was rendered into every message."""
    tokenizer = character_tokenizer(chat_template=TOOL_TEMPLATE)
    talk = [user("a"), assistant("", tool_calls=[CALL]), tool("3"), assistant("b")]
    [example], _ = tokenize([Record(talk[:1], (talk[1:],), 0, TOOLS)], tokenizer, DataOptions())
    assert tokenizer.decode(example.prompt) == "(f)<user>a[E]\n<assistant>"
    expected = [(0, 'f:{"x": 1}[E]'), (-1, "\n<tool>3[E]\n<assistant>"), (1, "b[E]")]
    assert texts(tokenizer, example.responses[0]) == expected


@pytest.mark.parametrize("arguments", [{"x": 1}, '{"x": 1}'])
def test_arguments_are_given_as_the_template_reads_them(arguments, character_tokenizer):
    """transformers#45419: DeepSeek-V3's template takes text only, most others an object."""
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    talk = [user("a"), assistant("b", tool_calls=[call])]
    as_text = TOOL_TEMPLATE.replace("c.function.arguments | tojson", "'' + c.function.arguments")
    for template in (TOOL_TEMPLATE, as_text):
        tokenizer = character_tokenizer(chat_template=template)
        assert texts(tokenizer, one(tokenizer, talk)) == [(0, 'f:{"x": 1}b[E]')]


def test_nulls_of_arrow_unions_are_dropped_at_every_depth():
    """Arrow gives every dictionary the keys of all others: `arguments` became a union with nulls."""
    call = {
        "id": None,
        "type": "function",
        "function": {"name": "f", "arguments": {"x": {"y": 1, "z": None}, "w": None}},
    }
    schema = {"type": "function", "function": {"name": "f", "parameters": {"x": {"type": "number", "enum": None}}}}
    row = {"prompt": [user("a")], "completion": [assistant(None, tool_calls=[call])], "tools": [schema]}
    record = read(completion_records, row)
    assert record.responses[0][0]["tool_calls"][0]["function"]["arguments"] == {"x": {"y": 1}}
    assert record.tools[0]["function"]["parameters"] == {"x": {"type": "number"}}


def test_lengths_are_those_of_actions(chat_tokenizer):
    """trl#4976: environment tokens counted as length."""
    dataset = make_dataset([Record(TALK[:1], (TALK[1:],), 0)], [], "talks", chat_tokenizer, DataOptions())
    assert dataset.examples[0].responses[0].num_actions == len("bcEeEghE")
    assert "responses have 8.0 tokens on average" in dataset.summary
    assert "responses have 3.0 turns of the assistant, and 42.0 tokens of users, tools" in dataset.summary


def test_a_row_without_an_action_is_dropped_and_counted(chat_tokenizer):
    """prime-rl#978: a sample without any trainable token made a mean NaN."""
    talk = [user("a"), assistant("b" * 30), user("c" * 30), assistant("d")]
    records = [Record(talk[:1], (talk[1:],), 0), Record(TALK[:1], (TALK[1:],), 1)]
    options = DataOptions(turns="last", max_length=80, max_prompt_length=30)
    examples, [dropped] = tokenize(records, chat_tokenizer, options)
    assert dropped.reason == "no token of the assistant within max_length" and [e.row for e in examples] == [1]


def test_turns_are_found_without_surgery_on_strings(chat_tokenizer):
    """ETO drops an example where lengths of strings do not fit; here words may look like headers."""
    talk = [user("a"), assistant("<user>b\n<assistant>"), user("<assistant>"), assistant("<assistant>")]
    expected = [(0, "<user>b\n<assistant>[E]"), (-1, "\n<user><assistant>[E]\n<assistant>"), (1, "<assistant>[E]")]
    assert texts(chat_tokenizer, one(chat_tokenizer, talk)) == expected


def test_eos_inside_a_turn_is_refused(chat_tokenizer):
    for talk in ([*TALK[:3], assistant("e[E]f")], [user("a"), assistant("b[E]c"), *TALK[2:4]]):
        assert fault(chat_tokenizer, talk) == "EOS token inside a response"


# What the user sees


def test_the_preview_shows_actions_in_colour_and_the_environment_dim(chat_tokenizer):
    [example], _ = tokenize([Record(TALK[:1], (TALK[1:],), 0)], chat_tokenizer, DataOptions())
    shown = preview(example, chat_tokenizer)
    assert "response (8 actions of 50 tokens in 3 turns, in the loss)" in shown.plain
    styles = [(shown.plain[span.start : span.end], span.style) for span in shown.spans][3:]
    assert styles[:4] == [("bc", "green"), ("[E]", "green reverse"), (f"⟨{MASK[1][1]}⟩", "dim"), ("e", "green")]


def test_dialogues_are_read_from_a_file(chat_tokenizer, tmp_path):
    rows = [{"chosen": TALK, "rejected": [*TALK[:3], assistant("x"), user("y"), assistant("z")]}] * 2
    (tmp_path / "talks.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = load_examples(str(tmp_path / "talks.jsonl"), "", "preferences", chat_tokenizer, DataOptions())
    assert [r.turns.max() for r in data.examples[1].responses] == [1, 1] and not data.dropped
    (tmp_path / "bad.jsonl").write_text(json.dumps({"chosen": TALK, "rejected": TALK[1:]}))
    with pytest.raises(InputError, match="prompts of the two dialogues differ"):
        load_examples(str(tmp_path / "bad.jsonl"), "", "preferences", chat_tokenizer, DataOptions())
