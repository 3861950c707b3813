import json

import pytest

from qstar_jax.config import DataOptions
from qstar_jax.data.dropped import Dropped
from qstar_jax.data.preferences import completion_records, preference_records, prompt_records
from qstar_jax.data.repeats import repeats_note

HH = "\n\nHuman: What is wet?\n\nAssistant:"
ASK = "What is wet?"


def note_of(records):
    rows = {state: [record.row for record in records if record.repeats == state] for state in ("removed", "kept")}
    return repeats_note(**rows)


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


def preferences(*rows, **options):
    return preference_records(list(rows), DataOptions(**options), "data.jsonl")


def pair(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_a_repeated_prompt_is_removed():
    rows = [{"prompt": "What is wet?", "chosen": "What is wet? Water.", "rejected": "What is wet? Bread."}]
    [record], dropped = preference_records(rows, DataOptions(), "data.jsonl")
    assert record.prompt == "What is wet?" and record.responses == (" Water.", " Bread.")
    assert dropped == []


@pytest.mark.parametrize(
    ("prompt", "before", "kept"),
    [
        (HH, HH + " ", " "),
        (HH, HH.strip() + " ", " "),
        (HH + " ", HH + " ", ""),
        (ASK, ASK + "\n", "\n"),
        (ASK + "\n", ASK + "\n", ""),
        (ASK + "\n", ASK + " ", " "),
        ("  " + ASK, ASK + " ", " "),
        ("Das heißt", "Das heißt ", " "),
        ("水是什么", "水是什么", ""),
    ],
)
def test_prompts_are_removed_from_texts(prompt, before, kept):
    rows = [pair(prompt, before + "Water.", before + "Bread.")] * 2
    records, dropped = preferences(*rows)
    assert not dropped and [record.row for record in records] == [0, 1]
    for record in records:
        assert (record.prompt, record.responses) == (prompt, (kept + "Water.", kept + "Bread."))
    note = note_of(records)
    assert note.startswith("Responses repeated their prompt, which was removed: 2 (row 1, 2);")


@pytest.mark.parametrize("as_chat", [False, True])
def test_prompts_are_removed_from_chats(as_chat):
    rows = [
        pair(user(ASK), assistant(ASK + "\nWater."), assistant(ASK + " Bread.")),
        pair(user(ASK), ASK + "\nWater.", ASK + " Bread."),
        *([pair(ASK, ASK + "\nWater.", ASK + " Bread.")] if as_chat else []),
    ]
    records, _ = preferences(*rows, as_chat=as_chat)
    for record in records:
        assert (record.prompt, record.responses) == (user(ASK), (assistant("Water."), assistant("Bread.")))


def test_text_dialogues_beside_a_prompt_column():
    records, dropped = preferences(pair(ASK, HH + " Water.", HH + " Bread."))
    assert (records[0].prompt, records[0].responses) == (HH, (" Water.", " Bread.")) and not dropped
    _, [dropped] = preferences(pair("Else?", HH + " Water.", HH + " Bread."), pair("p", "c", "r"))
    assert dropped.reason == "the prompt column and the prompt of the dialogues differ"


def test_prompts_are_removed_from_completions():
    [record], _ = completion_records([{"prompt": ASK, "completion": ASK + "\nWater."}], DataOptions(), "data.jsonl")
    assert record.responses == ("\nWater.",)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_few_responses_may_begin_with_their_prompt(rows):
    rows = [pair("Yes", "Yes, of course", "Yes.")] * rows + [pair("p", "c", "r")] * rows
    records, dropped = preferences(*rows)
    assert [record.responses for record in records] == [(row["chosen"], row["rejected"]) for row in rows]
    assert not dropped and note_of(records).startswith(
        f"Responses that begin with their prompt, and keep it: {len(rows) // 2} (row 1"
    )


@pytest.mark.parametrize(
    "row",
    [pair("Yes", "Yesterday", "Yes-man"), pair("Yes", "Yes, I do", "No"), pair(" ", " a", " b"), pair("", "a", "b")],
)
def test_texts_that_do_not_repeat_their_prompt_are_unchanged(row):
    records, dropped = preferences(row)
    assert (records[0].prompt, records[0].responses) == (row["prompt"], (row["chosen"], row["rejected"]))
    assert not dropped and note_of(records) == ""


def test_rows_without_repetition_in_a_file_that_repeats_prompts():
    repeating = pair(ASK, ASK + " Water.", ASK + " Bread.")
    rows = [repeating, pair(ASK, "Water.", "Bread."), pair(ASK, ASK + " Water.", "Bread."), repeating, repeating]
    rows += [pair(ASK, ASK, ASK + " Bread.")]
    records, dropped = preferences(*rows)
    assert [record.row for record in records] == [0, 1, 3, 4]
    assert records[1].responses == ("Water.", "Bread.")
    uneven = "only one of the responses repeats the prompt"
    assert dropped == [Dropped(2, uneven), Dropped(5, "empty chosen response")]
    assert all(one.fault for one in dropped)


def test_keep_leaves_repeated_prompts():
    row = pair(ASK, ASK + " Water.", ASK + " Bread.")
    records, _ = preferences(row, repeated_prompt="keep")
    assert records[0].responses == (row["chosen"], row["rejected"])
    assert note_of(records) == "Responses that begin with their prompt, and keep it: 1 (row 1)."


def test_chats_as_json():
    row = pair(ASK, json.dumps(user(ASK) + assistant("Water.")), json.dumps(user(ASK) + assistant("Bread.")))
    responses = ((assistant("Water."), assistant("Bread.")),)
    assert [preferences(row)[0][0].responses] == list(responses)
    broken = {**row, "chosen": row["chosen"][:-2]}
    python = {**row, "chosen": repr(user(ASK) + assistant("Water."))}
    records, dropped = preferences(row, broken, python, row)
    assert [(record.row, record.responses) for record in records] == [(0, *responses), (3, *responses)]
    assert dropped == [Dropped(1, "column 'chosen' holds broken JSON"), Dropped(2, "column 'chosen' holds broken JSON")]
    prompts = [{"prompt": json.dumps(user(ASK))}] * 2
    assert prompt_records(prompts, DataOptions(), "data.jsonl")[0][1].prompt == user(ASK)


def test_a_response_about_messages_stays_text():
    example = json.dumps(assistant("Hello"))
    records, dropped = preferences(pair("p", "c", "r"), pair("Show me messages", example, "[]"), pair("p", "c", "r"))
    assert records[1].responses == (example, "[]") and not dropped
