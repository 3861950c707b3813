import pytest

from qstar_jax.config import DataOptions
from qstar_jax.data.dropped import Dropped
from qstar_jax.data.preferences import Record, completion_records, preference_records, prompt_records
from qstar_jax.errors import InputError

PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def preferences(*rows, **options):
    return preference_records(list(rows), DataOptions(**options), "data.jsonl")


def failure(records, *rows, **options):
    with pytest.raises(InputError) as caught:
        records(list(rows), DataOptions(**options), "data.jsonl")
    return str(caught.value)


def test_text():
    assert preferences(PAIR) == ([Record("p", ("c", "r"), 0)], [])


def test_columns_by_another_name():
    records, _ = preferences({"q": "p", "a": "c", "b": "r"}, prompt="q", chosen="a", rejected="b")
    assert records == [Record("p", ("c", "r"), 0)]


CHAT = Record([user("p")], ([assistant("c")], [assistant("r")]), 0)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [user("p")], "chosen": [assistant("c")], "rejected": [assistant("r")]},
        {"prompt": [user("p")], "chosen": "c", "rejected": "r"},
        {"prompt": "p", "chosen": [assistant("c")], "rejected": [assistant("r")]},
        {"chosen": [user("p"), assistant("c")], "rejected": [user("p"), assistant("r")]},
        {"prompt": "p", "chosen": [user("p"), assistant("c")], "rejected": [user("p"), assistant("r")]},
        {"prompt": [user("p")], "chosen": [user("p"), assistant("c")], "rejected": [user("p"), assistant("r")]},
    ],
)
def test_chat_forms(row):
    assert preferences(row) == ([CHAT], [])


def test_whole_chats_are_split_before_the_last_answer():
    before = [user("1"), assistant("2"), user("3")]
    records, _ = preferences({"chosen": [*before, assistant("c")], "rejected": [*before, assistant("r")]})
    assert records == [Record(before, ([assistant("c")], [assistant("r")]), 0)]


def test_null_entries_of_messages_go():
    message = {"role": "assistant", "content": "c", "tool_calls": None}
    assert preferences({**PAIR, "chosen": [message]})[0][0].responses[0] == [assistant("c")]


def test_dialogues_in_text_are_split_after_the_last_marker():
    before = "\n\nHuman: 1\n\nAssistant: 2\n\nHuman: 3\n\nAssistant:"
    records, dropped = preferences({"chosen": before + " c", "rejected": before + " r"})
    assert records == [Record(before, (" c", " r"), 0)] and not dropped


def test_as_chat():
    assert preferences(PAIR, as_chat=True) == ([CHAT], [])
    chat = {"prompt": CHAT.prompt, "chosen": CHAT.responses[0], "rejected": CHAT.responses[1]}
    assert preferences(chat, as_chat=True) == ([CHAT], [])


def test_as_chat_cannot_take_dialogues_in_text():
    row = {"chosen": "\n\nHuman: 1\n\nAssistant: c", "rejected": "\n\nHuman: 1\n\nAssistant: r"}
    assert "'chosen' apart, as it holds dialogues in text" in failure(preference_records, row, as_chat=True)
    assert "dialogues in text" in failure(prompt_records, row, as_chat=True)


HH = "\n\nHuman: 1\n\nAssistant:"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**PAIR, "chosen": " \n"}, "empty chosen answer"),
        ({**PAIR, "rejected": ""}, "empty rejected answer"),
        ({**PAIR, "rejected": [assistant(" ")]}, "empty rejected answer"),
        ({**PAIR, "rejected": "c"}, "chosen equals rejected"),
        ({**PAIR, "rejected": [assistant("c")]}, "chosen equals rejected"),
        ({**PAIR, "chosen": [assistant("c"), assistant("d")]}, "chosen answer is not one assistant message"),
        ({**PAIR, "rejected": []}, "rejected answer is not one assistant message"),
        ({**PAIR, "prompt": []}, "prompt without messages"),
        (
            {**PAIR, "chosen": [user("x"), assistant("c")], "rejected": [user("x"), assistant("r")]},
            "the prompt column and the prompt of the dialogues differ",
        ),
    ],
)
def test_unusable_rows_are_counted_by_reason(row, reason):
    records, dropped = preferences(PAIR, row, PAIR)
    assert [record.row for record in records] == [0, 2]
    assert dropped == [Dropped(1, reason)]


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ([user("p"), assistant("c")], [user("q"), assistant("r")], "prompts of the two dialogues differ"),
        (HH + " c", "\n\nHuman: 2\n\nAssistant: r", "prompts of the two dialogues differ"),
        ([user("p"), assistant("c")], [user("p")], "dialogue does not end with an assistant turn"),
        (HH + " c\n\nHuman: 2", HH + " r", "dialogue does not end with an assistant turn"),
        ([assistant("c")], [assistant("r")], "dialogue has no turn before the answer"),
        (HH + " ", HH + " r", "empty chosen answer"),
    ],
)
def test_unusable_dialogues_are_counted_by_reason(chosen, rejected, reason):
    good = {"chosen": HH + " c", "rejected": HH + " r"}
    records, dropped = preferences({"chosen": chosen, "rejected": rejected}, good)
    assert [record.row for record in records] == [1]
    assert dropped == [Dropped(0, reason)]


def test_an_empty_prompt_in_text_is_kept_for_the_tokenizer_to_judge():
    assert preferences({**PAIR, "prompt": ""})[0][0].prompt == ""


def test_missing_columns():
    message = failure(preference_records, {"prompt": "p", "response": "c"})
    assert message == (
        "data.jsonl row 1: no column 'chosen' (found: 'prompt', 'response'); expected prompt, chosen, rejected; "
        "name yours with --data.chosen"
    )
    message = failure(preference_records, PAIR, {"prompt": "p", "chosen": "c"})
    assert "data.jsonl row 2: no column 'rejected' (found: 'prompt', 'chosen')" in message
    assert "--data.rejected" in message
    assert "row 2: no column 'prompt'" in failure(preference_records, PAIR, {"chosen": "c", "rejected": "r"})


def test_neither_prompt_nor_dialogues():
    message = failure(preference_records, {"question": "p", "chosen": "c", "rejected": "r"})
    assert "data.jsonl row 1: no column 'prompt' (found: 'question', 'chosen', 'rejected')" in message
    assert "no whole dialogue" in message and "name yours with --data.prompt" in message


def test_a_column_that_the_user_names_is_never_passed_over():
    dialogues = {"chosen": HH + " c", "rejected": HH + " r"}
    assert "no column 'q'" in failure(preference_records, dialogues, prompt="q")
    assert "no column 'a'" in failure(completion_records, PAIR, completion="a")


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (None, "holds NoneType"),
        (3, "holds int"),
        (["a"], "item 1 is str"),
        ([{"content": "c"}], "'role' of message 1 is missing"),
        ([assistant("a"), assistant(None)], "'content' of message 2 is NoneType"),
    ],
)
def test_wrong_types(value, found):
    message = failure(preference_records, PAIR, {**PAIR, "rejected": value})
    assert message.startswith("data.jsonl row 2: column 'rejected'")
    assert found in message and "expected text or a list of chat messages" in message


def test_nothing_left():
    message = failure(preference_records, {**PAIR, "chosen": ""}, {**PAIR, "rejected": "c"}, {**PAIR, "rejected": "c"})
    assert "none of its 3 rows can be used (2 chosen equals rejected, 1 empty chosen answer)" in message


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "completion": "c", "chosen": "other"},
        {"prompt": "p", "chosen": "c"},
        {"prompt": [user("p")], "completion": [assistant("c")]},
        {"messages": [user("p"), assistant("c")]},
        {"prompt": "p", "messages": [user("p"), assistant("c")]},
        {"completion": [user("p"), assistant("c")]},
        {"chosen": HH + " c", "rejected": HH + " r"},
    ],
)
def test_completions(row):
    [record], dropped = completion_records([row], DataOptions(), "data.jsonl")
    chat = isinstance(record.prompt, list)
    assert record.responses == (([assistant("c")],) if chat else (" c" if "rejected" in row else "c",))
    assert record.prompt == ([user("p")] if chat else HH if "rejected" in row else "p")
    assert not dropped


def test_completion_failures():
    message = failure(completion_records, {"prompt": "p", "response": "c"})
    assert "no column 'completion'" in message and "or messages" in message and "--data.completion" in message
    message = failure(completion_records, {"messages": [user("p"), assistant("c")]}, {"prompt": "p"})
    assert "row 2: no column 'messages'" in message and "--data" not in message
    assert "1 empty answer" in failure(completion_records, {"prompt": "p", "completion": ""})


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "p"}, "p"),
        ({**PAIR, "chosen": ""}, "p"),
        ({"prompt": [user("p")]}, [user("p")]),
        ({"messages": [user("p"), assistant("c")]}, [user("p")]),
        ({"messages": [user("p"), assistant("")]}, [user("p")]),
        ({"chosen": HH + " c", "rejected": HH + " r"}, HH),
    ],
)
def test_prompts(row, prompt):
    assert prompt_records([row], DataOptions(), "data.jsonl") == ([Record(prompt, (), 0)], [])


def test_prompt_failures():
    assert "no column 'prompt' (found: 'text'); expected prompt;" in failure(prompt_records, {"text": "p"})
    assert "--data.prompt" in failure(prompt_records, {"text": "p"})
