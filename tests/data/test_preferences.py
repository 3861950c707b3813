import json

import pytest

from qstar_jax.config import DataOptions
from qstar_jax.data.dropped import Dropped
from qstar_jax.data.preferences import completion_records, preference_records, prompt_records
from qstar_jax.data.records import Record
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


def test_a_pair_of_texts():
    rows = [{"prompt": "Why?", "chosen": "Because.", "rejected": "No idea."}]
    records, dropped = preference_records(rows, DataOptions(), "data.jsonl")
    assert records == [Record(prompt="Why?", responses=("Because.", "No idea."), row=0)]
    assert dropped == []


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
def test_every_form_of_a_chat_gives_the_same_record(row):
    assert preferences(row) == ([CHAT], [])


def test_whole_chats_are_split_before_the_last_response():
    before = [user("1"), assistant("2"), user("3")]
    records, _ = preferences({"chosen": [*before, assistant("c")], "rejected": [*before, assistant("r")]})
    assert records == [Record(before, ([assistant("c")], [assistant("r")]), 0)]


def test_null_entries_of_messages_are_removed():
    message = {"role": "assistant", "content": "c", "tool_calls": None}
    assert preferences({**PAIR, "chosen": [message]})[0][0].responses[0] == [assistant("c")]


def test_dialogues_in_text_are_split_after_the_last_marker():
    before = "\n\nHuman: 1\n\nAssistant: 2\n\nHuman: 3\n\nAssistant:"
    records, dropped = preferences({"chosen": before + " c", "rejected": before + " r"})
    assert records == [Record(before, (" c", " r"), 0)] and not dropped


def test_as_chat_turns_text_into_messages():
    assert preferences(PAIR, as_chat=True) == ([CHAT], [])
    chat = {"prompt": CHAT.prompt, "chosen": CHAT.responses[0], "rejected": CHAT.responses[1]}
    assert preferences(chat, as_chat=True) == ([CHAT], [])


def test_as_chat_refuses_dialogues_in_text():
    row = {"chosen": "\n\nHuman: 1\n\nAssistant: c", "rejected": "\n\nHuman: 1\n\nAssistant: r"}
    assert "cannot split 'chosen', which holds dialogues in plain text" in failure(
        preference_records, row, as_chat=True
    )
    assert "dialogues in plain text" in failure(prompt_records, row, as_chat=True)


def faults(records, *rows, **options):
    """Describes what is wrong with each bad row."""
    return [row.fault for row in records(list(rows), DataOptions(**options), "data.jsonl")[1]]


HH = "\n\nHuman: 1\n\nAssistant:"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**PAIR, "chosen": " \n"}, "empty chosen response"),
        ({**PAIR, "rejected": ""}, "empty rejected response"),
        ({**PAIR, "rejected": [assistant(" ")]}, "empty rejected response"),
        ({**PAIR, "rejected": "c"}, "chosen equals rejected"),
        ({**PAIR, "rejected": [assistant("c")]}, "chosen equals rejected"),
        (
            {**PAIR, "chosen": [assistant("c"), user("d")]},
            "chosen response does not begin and end with an assistant turn",
        ),
        ({**PAIR, "rejected": []}, "rejected response does not begin and end with an assistant turn"),
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
        ([assistant("c")], [assistant("r")], "dialogue has no turn before the response"),
        (HH + " ", HH + " r", "empty chosen response"),
    ],
)
def test_unusable_dialogues_are_counted_by_reason(chosen, rejected, reason):
    good = {"chosen": HH + " c", "rejected": HH + " r"}
    records, dropped = preferences({"chosen": chosen, "rejected": rejected}, good)
    assert [record.row for record in records] == [1]
    assert dropped == [Dropped(0, reason)]


def test_an_empty_prompt_in_text_is_kept_for_the_tokenizer():
    assert preferences({**PAIR, "prompt": ""})[0][0].prompt == ""


def test_missing_columns():
    message = failure(preference_records, {"prompt": "p", "response": "c"})
    assert message == (
        "data.jsonl row 1: no column 'chosen' (found: 'prompt', 'response'); expected prompt, chosen, rejected; "
        "name yours with --data.chosen"
    )
    every = failure(preference_records, *[{"prompt": "p", "response": "c"}] * 3)
    assert every == f"{message}; the same in all 3 rows"


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_column_missing_in_one_row_of_many(place):
    rows = [PAIR, PAIR]
    rows.insert(place, {"prompt": "p", "chosen": "c"})
    records, [dropped] = preferences(*rows)
    assert [record.row for record in records] == [row for row in range(3) if row != place]
    assert dropped == Dropped(place, "no column 'rejected'")
    assert "no column 'rejected' (found: 'prompt', 'chosen'); expected" in dropped.fault
    assert "--data.rejected" in dropped.fault
    rows[place] = {"chosen": "c", "rejected": "r"}
    assert preferences(*rows)[1] == [Dropped(place, "no column 'prompt'")]
    rows[place] = {**PAIR, "prompt": None}
    assert preferences(*rows)[1] == [Dropped(place, "column 'prompt' is null")]


def test_columns_of_nulls_count_as_missing():
    nulls = {"prompt": None, "completion": None, "tools": None, "system": None}
    dialogues = {"chosen": [user("p"), assistant("c")], "rejected": [user("p"), assistant("r")], **nulls}
    assert preferences(dialogues) == ([CHAT], [])
    assert completion_records([dialogues], DataOptions(), "data.jsonl")[0][0].responses == ([assistant("c")],)


def test_neither_prompt_nor_dialogues():
    message = failure(preference_records, {"question": "p", "chosen": "c", "rejected": "r"})
    assert "data.jsonl row 1: no column 'prompt' (found: 'question', 'chosen', 'rejected')" in message
    assert "not a whole dialogue" in message and "name yours with --data.prompt" in message


def test_a_column_named_by_the_user_is_never_ignored():
    dialogues = {"chosen": HH + " c", "rejected": HH + " r"}
    assert "no column 'q'" in failure(preference_records, dialogues, prompt="q")
    assert "no column 'a'" in failure(completion_records, PAIR, completion="a")


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (None, "column 'rejected' is null"),
        (3, "column 'rejected' holds int"),
        (float("nan"), "column 'rejected' holds float"),
        ({"a": "b"}, "column 'rejected' holds dict"),
        (["a"], "list of something other than messages (item 1 is str)"),
        ([[assistant("a")]], "list of something other than messages (item 1 is list)"),
        ([assistant("a"), None], "list of something other than messages (item 2 is null)"),
        ([{"content": "c"}], "a message without 'role' (message 1, keys: 'content')"),
        ([{}], "a message without 'role' (message 1, keys: none)"),
        ([{"from": "bot", "value": "c"}], "a message from 'bot' (message 1); expected one of user, assistant,"),
        ([{"from": "gpt", "value": 3}], "a message whose 'content' holds int (message 1,"),
        ([{"from": "function_call", "value": "f(x)"}], "column 'rejected' holds broken JSON ("),
        ([{"from": "function_call", "value": "[3]"}], "a call of a function without a name (message 1: '[3]')"),
        ([assistant("a"), assistant(None)], "a message without 'content' (message 2, keys: 'role')"),
        ([{**assistant(None), "tool_calls": []}], "a message without 'content' (message 1,"),
        ([assistant([{"type": "image", "url": "x"}])], "a message with a part of type 'image' (message 1);"),
        ([{"role": "assistant", "content": ["a"]}], "a message whose 'content' holds list (message 1,"),
    ],
)
def test_wrong_types(value, problem):
    [fault] = faults(preference_records, PAIR, {**PAIR, "rejected": value})
    assert fault.startswith("column 'rejected'")
    assert problem in fault and "expected" in fault


HALF = "hi \ud83d"


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("prompt", HALF),
        ("rejected", HALF),
        ("chosen", [assistant(HALF)]),
        ("chosen", [{**assistant("c"), "tool_calls": [{"arguments": {"x": HALF}}]}]),
        ("chosen", [{**assistant("c"), HALF: "x"}]),
        ("tools", [{"name": HALF}]),
        ("tools", json.dumps([{"name": HALF}])),
        ("system", HALF),
    ],
)
def test_lone_surrogates_are_refused_everywhere(column, value):
    chat = {"prompt": [user("p")], "chosen": "c", "rejected": "r"}
    [fault] = faults(preference_records, chat, {**chat, column: value})
    assert fault.startswith(f"column {column!r} holds half a character, a lone surrogate (U+D83D at character ")


def test_whole_emoji_and_unused_columns_are_accepted():
    assert not faults(preference_records, {**PAIR, "chosen": "\U0001f600", "id": HALF, "score": None})


def test_an_error_lists_why_no_row_is_left():
    message = failure(preference_records, {**PAIR, "chosen": ""}, {**PAIR, "rejected": "c"}, {**PAIR, "rejected": "c"})
    reasons = "2 chosen equals rejected (row 2, 3), 1 empty chosen response (row 1)"
    assert message == f"data.jsonl: none of its 3 rows can be used ({reasons}); row 1: empty chosen response"


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
def test_every_form_of_a_completion(row):
    [record], dropped = completion_records([row], DataOptions(), "data.jsonl")
    chat = isinstance(record.prompt, list)
    assert record.responses == (([assistant("c")],) if chat else (" c" if "rejected" in row else "c",))
    assert record.prompt == ([user("p")] if chat else HH if "rejected" in row else "p")
    assert not dropped


def test_completion_failures():
    message = failure(completion_records, {"prompt": "p", "response": "c"})
    assert "no column 'completion'" in message and "or messages" in message and "--data.completion" in message
    message = failure(completion_records, {"prompt": "p", "completion": ""})
    assert message == "data.jsonl row 1: empty response"


def test_a_row_without_messages():
    [fault] = faults(completion_records, {"messages": [user("p"), assistant("c")]}, {"prompt": "p"})
    assert fault.startswith("no column 'messages' (found: 'prompt')") and "--data" not in fault


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
def test_every_form_of_a_prompt(row, prompt):
    assert prompt_records([row], DataOptions(), "data.jsonl") == ([Record(prompt, (), 0)], [])


def test_prompt_failures():
    assert "no column 'prompt' (found: 'text'); expected prompt;" in failure(prompt_records, {"text": "p"})
    assert "--data.prompt" in failure(prompt_records, {"text": "p"})


TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


@pytest.mark.parametrize("value", [[TOOL], json.dumps([TOOL]), [json.dumps(TOOL)]])
def test_tools(value):
    [record, bare], _ = preferences({**PAIR, "tools": value}, {**PAIR, "tools": None}, as_chat=True)
    assert record.tools == [TOOL] and bare.tools is None
    [record], _ = preferences({**PAIR, "t": value, "tools": 3}, as_chat=True, tools="t")
    assert record.tools == [TOOL]


@pytest.mark.parametrize("value", [None, [], "", " ", "[]", "null"])
@pytest.mark.parametrize("as_chat", [True, False])
def test_no_tools(value, as_chat):
    [record], _ = preferences({**PAIR, "tools": value}, as_chat=as_chat)
    assert record.tools is None


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (3, "column 'tools' holds int; expected a list of JSON schemas"),
        (TOOL, "column 'tools' holds dict; expected"),
        ([3], "column 'tools' holds a list of something other than schemas; expected"),
        ([[TOOL]], "column 'tools' holds a list of something other than schemas; expected"),
        ("[{", "column 'tools' holds broken JSON ("),
        ('"f"', "column 'tools' holds str; expected"),
    ],
)
def test_wrong_tools(value, problem):
    [fault] = faults(prompt_records, {"prompt": [user("p")]}, {"prompt": [user("p")], "tools": value})
    assert fault.startswith(problem)


def test_a_system_column_goes_before_the_messages():
    rows = [{**PAIR, "system": "s"}, {**PAIR, "system": None}, {**PAIR, "system": " "}, PAIR]
    records, _ = preferences(*rows, as_chat=True)
    system = {"role": "system", "content": "s"}
    assert [record.prompt for record in records] == [[system, user("p")], *[[user("p")]] * 3]
    row = {"prompt": [system, user("p")], "system": "s"}
    records, dropped = prompt_records([row, {**row, "system": "t"}, {**row, "system": 3}], DataOptions(), "")
    assert [record.prompt for record in records] == [[system, user("p")]]
    assert [row.reason for row in dropped] == [
        "the column 'system' and the system message of the prompt differ",
        "column 'system' holds int",
    ]


@pytest.mark.parametrize(("column", "value"), [("system", "s"), ("tools", [TOOL])])
def test_plain_text_cannot_hold_them(column, value):
    row = {**PAIR, column: value}
    message = failure(preference_records, row)
    assert f"row 1: the column {column!r} needs chat messages, but this is plain text" in message
    assert f"--data.as_chat, or drop the column with --data.{column} null" in message
    assert preferences(row, **{column: None})[0] == [Record("p", ("c", "r"), 0)]
    assert f"no column 'x' (found: 'prompt', 'chosen', 'rejected', {column!r})" in failure(
        preference_records, row, **{column: "x"}
    )


def test_a_prompt_that_ends_with_the_assistant():
    chat = [user("p"), assistant("Sure,")]
    [fault] = faults(prompt_records, {"prompt": "p"}, {"prompt": chat})
    assert fault.startswith("column 'prompt' ends with the assistant's turn; expected that of a user or a tool")
    [record], _ = completion_records([{"messages": [*chat, assistant("c")]}], DataOptions(), "data.jsonl")
    assert record.prompt == chat[:1] and record.responses == ([*chat[1:], assistant("c")],)


def test_other_keys_of_messages_are_kept():
    call = {"role": "assistant", "content": "", "tool_calls": [{"x": None}], "name": None}
    [record], _ = prompt_records([{"prompt": [user("p"), call, {"role": "tool", "content": "3"}]}], DataOptions(), "")
    assert record.prompt[1] == {"role": "assistant", "content": "", "tool_calls": [{}]}


def test_as_chat_refuses_a_prompt_column_of_dialogues_in_text():
    row = {"prompt": HH, "chosen": " c", "rejected": " r"}
    assert "cannot split 'prompt', which holds dialogues in plain text" in failure(
        preference_records, row, as_chat=True
    )
