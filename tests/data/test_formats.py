"""One test for each published shape of rows: what becomes of a real example's columns."""

import csv
import json
from dataclasses import replace

import datasets
import pytest

from qstar_jax.config import DataOptions
from qstar_jax.data.dropped import Dropped
from qstar_jax.data.loading import load_examples
from qstar_jax.data.preferences import (
    completion_records,
    label_records,
    preference_records,
    prompt_records,
    ranking_records,
    return_records,
)
from qstar_jax.data.reading import read_rows
from qstar_jax.data.records import Record
from qstar_jax.errors import InputError


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def read(make, *rows, **options):
    """Records of a file, and the reasons for which rows are dropped."""
    records, dropped = make(list(rows), DataOptions(**options), "data.jsonl")
    return records, [(entry.row, entry.reason) for entry in dropped]


def failure(make, *rows, **options):
    with pytest.raises(InputError) as caught:
        make(list(rows), DataOptions(**options), "data.jsonl")
    return str(caught.value)


@pytest.mark.parametrize("column", ["image", "images", "videos", "audio"])
def test_rows_that_speak_of_images_are_refused(column):
    row = {"prompt": "What is on it?", "chosen": "a cat", "rejected": "a dog"}
    _, dropped = read(preference_records, *[row] * 19, row | {column: []}, row | {column: ["a.png"]})
    assert dropped == [(20, "it comes with images, video or audio")]
    message = failure(preference_records, row | {column: ["a.png"]})
    assert f"column '{column}'; only texts are read. Remove the column to train on the texts alone" in message


# TRL

TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
def test_trl_conversational_with_tools_and_variables(tools):
    row = {
        "prompt": [user("Weather in Paris?")],
        "chosen": [{"role": "assistant", "tool_calls": [CALL]}],
        "rejected": [assistant("Sunny.")],
        "tools": tools,
        "chat_template_kwargs": {"enable_thinking": False},
    }
    [record], dropped = read(preference_records, row)
    assert not dropped and record.tools == [TOOL] and record.template_kwargs == {"enable_thinking": False}
    assert record.responses == ([assistant("", tool_calls=[CALL])], [assistant("Sunny.")])
    [record], _ = read(preference_records, row | {"chat_template_kwargs": '{"enable_thinking": true}'})
    assert record.template_kwargs == {"enable_thinking": True}
    _, dropped = read(preference_records, row, row | {"chat_template_kwargs": [3]})
    assert dropped == [(1, "column 'chat_template_kwargs' holds list")]
    message = failure(
        preference_records, {"prompt": "p", "chosen": "c", "rejected": "r", "chat_template_kwargs": {"x": 1}}
    )
    assert "needs chat messages, but this is plain text" in message


def test_variables_of_a_row_reach_its_template(tmp_path, character_tokenizer):
    template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}{% if mood %}{{ mood }}{% endif %}"
    tokenizer = character_tokenizer(
        chat_template=template.replace("{% for", "{% if mood %}{{ mood }}{% endif %}{% for", 1)
    )
    tokenizer.chat_template = "{{ mood or 'x' }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    row = {"prompt": [user("p")], "chosen": "c", "rejected": "r"}
    rows = [
        row,
        row | {"chat_template_kwargs": {"mood": "y"}},
        *[row] * 18,
        row | {"chat_template_kwargs": {"m00d": "y"}},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = DataOptions(chat_template_kwargs={"mood": "z"})
    data = load_examples(str(tmp_path / "a.jsonl"), "train", "preferences", tokenizer, options)
    assert [tokenizer.decode(example.prompt)[0] for example in data.examples[:3]] == ["z", "y", "z"]
    assert data.dropped == (Dropped(20, "the chat template does not read the variables of the row"),)


# OpenAI


@pytest.mark.parametrize("arguments", ['{"city": "Paris"}', {"city": "Paris"}])
def test_messages_with_tool_calls(arguments):
    call = {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    messages = [
        user([{"type": "text", "text": "Weather "}, {"type": "text", "text": "in Paris?"}]),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "name": "get_weather", "content": "Sunny"},
        assistant("It is sunny."),
    ]
    [record], _ = read(completion_records, {"messages": messages, "tools": [TOOL]})
    called = assistant("", tool_calls=[call])
    assert record.prompt == [user("Weather in Paris?")]
    assert record.responses == ([called, messages[2], assistant("It is sunny.")],)


def test_a_response_that_only_calls_a_tool_is_not_empty():
    row = {"prompt": [user("p")], "chosen": [assistant(None, tool_calls=[CALL])], "rejected": [assistant("r")]}
    assert len(read(preference_records, row)[0]) == 1
    assert read(preference_records, row, row | {"rejected": [assistant("")]})[1] == [(1, "empty rejected response")]


def test_arrow_unions_of_arguments_lose_their_nulls(tmp_path):
    calls = [{"function": {"name": "f", "arguments": arguments}} for arguments in ({"x": 1}, {"y": "2"})]
    rows = [{"messages": [user("p"), assistant("", tool_calls=[call]), user("q"), assistant("c")]} for call in calls]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    records, _ = read(completion_records, *read_rows(str(tmp_path / "a.parquet"), "train"))
    assert [record.responses[0][0]["tool_calls"] for record in records] == [[call] for call in calls]


# ShareGPT, LLaMA-Factory, Alpaca

CHAT = Record([user("p")], ([assistant("c")], [assistant("r")]), 0)


def said(who, value):
    return {"from": who, "value": value}


def test_share_gpt_dialogues():
    system = said("system", "s")
    row = {"conversations": [system, said("human", "p"), said("gpt", "c")], "id": "x"}
    [record], _ = read(completion_records, row)
    assert (record.prompt, record.responses) == ([{"role": "system", "content": "s"}, user("p")], ([assistant("c")],))
    assert read(prompt_records, row)[0][0].prompt == record.prompt


@pytest.mark.parametrize("tool", [TOOL, TOOL["function"]], ids=["tool", "function"])
def test_llama_factory_calls_of_functions(tool):
    call = json.dumps({"name": "get_weather", "arguments": {"city": "Paris"}})
    row = {
        "conversations": [
            said("human", "p"),
            said("function_call", call),
            said("observation", "Sunny"),
            said("gpt", "c"),
        ],
        "tools": json.dumps([tool]),
    }
    [record], _ = read(completion_records, row)
    called, observed = assistant("", tool_calls=[CALL]), {"role": "tool", "content": "Sunny"}
    assert record.responses == ([called, observed, assistant("c")],)
    assert record.tools == [TOOL]


def test_llama_factory_pairs():
    row = {"conversations": [said("human", "p")], "chosen": said("gpt", "c"), "rejected": said("gpt", "r")}
    assert read(preference_records, row) == ([CHAT], [])
    assert read(prompt_records, row)[0] == [Record([user("p")], (), 0)]
    messages = {"messages": [user("p")], "chosen": assistant("c"), "rejected": assistant("r")}
    assert read(preference_records, messages) == ([CHAT], [])
    whole = {"messages": [user("p"), assistant("c")], "chosen": [user("p"), assistant("c")]}
    assert read(preference_records, whole | {"rejected": [user("p"), assistant("r")]}) == ([CHAT], [])


def test_eto_trajectories_as_share_gpt():
    row = {
        "id": 1,
        "prompt": [said("human", "game"), said("gpt", "OK"), said("human", "start")],
        "chosen": [said("gpt", "c")],
        "rejected": [said("gpt", "r")],
    }
    [record], _ = read(preference_records, row)
    assert record.prompt == [user("game"), assistant("OK"), user("start")] and record.responses == CHAT.responses


def test_alpaca_prompts():
    row = {"instruction": "Add", "input": "1 2", "output": "3", "chosen": "3", "rejected": "4", "system": ""}
    assert read(preference_records, row)[0] == [Record("Add\n1 2", ("3", "4"), 0)]
    alpaca = {name: row[name] for name in ("instruction", "input", "output")}
    assert read(completion_records, alpaca)[0] == [Record("Add\n1 2", ("3",), 0)]
    assert read(prompt_records, alpaca | {"input": ""})[0] == [Record("Add", (), 0)]
    [record], _ = read(preference_records, row | {"history": [["Hi", "Hello"]]})
    assert record.prompt == [user("Hi"), assistant("Hello"), user("Add\n1 2")]
    assert read(preference_records, row, row | {"history": [3]})[1][0][1].startswith("column 'history' holds no list")


# Several responses with scores


def judged(text, overall, fine, system="Be helpful."):
    """A completion of openbmb/UltraFeedback; ratings are text, and "N/A" where there is none."""
    rating = {"Rating": str(round(fine)), "Rationale": "x"}
    typed = {"Type": ["1"], "Rationale": "x", "Rating": str(round(fine)), "Rationale For Rating": "x"}
    return {
        "annotations": {
            "instruction_following": rating,
            "honesty": rating | {"Rating": "N/A" if text == "n" else str(5 - round(fine))},
            "truthfulness": typed,
            "helpfulness": typed,
        },
        "custom_system_prompt": system,
        "model": "m",
        "principle": "helpfulness",
        "response": text,
        "critique": "x",
        "overall_score": overall,
        "fine-grained_score": fine,
    }


ULTRA = {
    "source": "evol_instruct",
    "instruction": "p",
    "models": ["a", "b", "c", "d"],
    "completions": [
        judged("a", 7.0, 1.0),
        judged("b", 8.5, 4.25, "Be honest."),
        judged("c", 2.0, 3.0, "Be honest."),
        judged("d", 8.5, 2.0, "Be brief."),
    ],
    "correct_answers": ["None"],
    "incorrect_answers": ["None"],
}


def test_several_scores_must_be_chosen_from():
    message = failure(preference_records, ULTRA)
    assert message == (
        "several columns may hold the reward: annotations.instruction_following.Rating, annotations.honesty.Rating, "
        "annotations.truthfulness.Rating, annotations.helpfulness.Rating, overall_score, fine-grained_score; choose "
        "one with --data.reward"
    )


def test_ratings_of_ultrafeedback_are_nested():
    [record], dropped = read(preference_records, ULTRA, reward="annotations.helpfulness.Rating")
    assert record.responses == ("b", "a") and not dropped
    unrated = ULTRA | {"completions": [judged("n", 1.0, 1.0), judged("b", 2.0, 2.0)]}
    records, dropped = read(preference_records, ULTRA, unrated, reward="annotations.honesty.Rating")
    assert records[0].responses == ("a", "b")
    assert dropped == [(1, "a response without a rating in 'annotations.honesty.Rating'")]
    _, dropped = read(preference_records, ULTRA, {**ULTRA, "completions": [{"response": "a"}]}, reward="overall_score")
    assert dropped == [(1, "not every response has a number 'overall_score'")]
    # The only score beside the text is the reward, whatever is nested.
    nested = {
        "prompt": "p",
        "responses": [{"text": t, "score": s, "by": {"score": 9}} for t, s in (("r", 1), ("c", 2))],
    }
    assert read(preference_records, nested)[0][0].responses == ("c", "r")
    single = {"prompt": "p", "completion": "c", "judge": {"reward": 2}, "reference_rewards": [1]}
    assert read(return_records, single)[0][0].reward == 2


def test_system_prompts_of_responses(tmp_path, chat_tokenizer):
    """Left out and said so, or read: then only responses to the same prompt are compared."""
    key = {"reward": "fine-grained_score", "as_chat": True}
    [record], _ = read(preference_records, ULTRA, **key)
    assert record.prompt == [user("p")] and record.ignored_system == "custom_system_prompt"
    honest = [{"role": "system", "content": "Be honest."}, user("p")]
    for make in (preference_records, ranking_records):
        [record], _ = read(make, ULTRA, **key, system="custom_system_prompt")
        assert (record.prompt, record.responses) == (honest, ([assistant("b")], [assistant("c")]))
        assert not record.ignored_system
    apart = ULTRA | {"completions": ULTRA["completions"][2:]}
    _, dropped = read(preference_records, ULTRA, apart, **key, system="custom_system_prompt")
    assert dropped == [(1, "no two responses of different scores have the same system prompt")]
    # Each return is that of its own prompt.
    records, _ = read(return_records, ULTRA, **key, system="custom_system_prompt")
    assert [record.prompt for record in records] == [honest] * 2
    assert not read(preference_records, ULTRA, **key, system=None)[0][0].ignored_system
    assert "no column 'x'" in failure(preference_records, ULTRA, **key, system="x")
    (tmp_path / "a.jsonl").write_text(json.dumps(ULTRA))
    source = str(tmp_path / "a.jsonl")
    data = load_examples(source, "train", "preferences", chat_tokenizer, DataOptions(reward="overall_score"))
    assert "(custom_system_prompt), which are left out" in data.summary and ": 1 (row 1); read" in data.summary


def test_ultrafeedback_as_pairs():
    def pairs(reward, rule=None, rows=1):
        records, dropped = read(preference_records, *[ULTRA] * rows, reward=reward, pairs=rule)
        assert not dropped and all(record.prompt == "p" for record in records)
        return [record.responses for record in records]

    assert pairs("overall_score") == [("b", "c")] and pairs("fine-grained_score") == [("b", "a")]
    assert pairs("overall_score", "all") == [("b", "a"), ("b", "c"), ("d", "a"), ("d", "c"), ("a", "c")]
    drawn = pairs("fine-grained_score", "best_random", rows=30)
    assert set(drawn) == {("b", "a"), ("b", "c"), ("b", "d")}
    assert drawn[:9] == pairs("fine-grained_score", "best_random", rows=9)


def test_ultrafeedback_as_rankings():
    [record], _ = read(ranking_records, ULTRA, reward="fine-grained_score")
    assert record == Record("p", ("b", "c", "d", "a"), 0, ignored_system="custom_system_prompt")
    # Of equal scores, the first response stays; rankings may differ in length.
    equal = ULTRA | {"completions": [judged(text, 5.0, 1.0) for text in "ab"]}
    records, dropped = read(ranking_records, ULTRA, equal, reward="overall_score")
    assert [record.responses for record in records] == [("b", "a", "c")]
    assert dropped == [(1, "all responses have the same score")]
    assert read(preference_records, ULTRA, equal, reward="overall_score")[1] == dropped


def test_ultrafeedback_as_returns():
    records, _ = read(return_records, ULTRA, reward="overall_score")
    assert [(record.responses[0], record.reward) for record in records] == [
        ("b", 8.5),
        ("d", 8.5),
        ("a", 7.0),
        ("c", 2.0),
    ]
    assert {record.reference_rewards for record in records} == {(8.5, 8.5, 7.0, 2.0)}


@pytest.mark.parametrize(
    "row",
    [
        {
            "prompt": "p",
            "answers": [{"answer": "r", "rank": 2, "model": "m"}, {"answer": "c", "rank": 1, "model": "n"}],
        },
        {"prompt": "p", "responses": ["r", "c"], "scores": [0.5, 0.9]},
        {"prompt": "p", "responses": '["r", "c"]', "scores": "[0.5, 0.9]"},
        {"prompt": "p", "completions": [{"text": "c", "score": "4"}, {"text": "r", "score": "3"}]},
    ],
    ids=["nectar", "lists", "csv", "text"],
)
def test_other_rankings(row):
    assert read(preference_records, row)[0] == [Record("p", ("c", "r"), 0)]
    assert read(ranking_records, row)[0] == [Record("p", ("c", "r"), 0)]


def test_broken_rankings():
    row = {"prompt": "p", "responses": ["c", "r"], "scores": [1, 0]}
    bad = [{"scores": [1]}, {"scores": [1, None]}, {"responses": []}, {"responses": [{"model": "m"}, "x"]}]
    _, dropped = read(preference_records, row, *(row | change for change in bad))
    assert [reason for _, reason in dropped] == [
        *["not every response has a number 'scores'"] * 2,
        "column 'responses' holds no list of responses",
        "column 'responses' has a response without text",
    ]
    assert "have no scores; expected numbers beside each text" in failure(
        preference_records, {"prompt": "p", "responses": ["c", "r"]}
    )


def test_rankings_become_labels():
    records, _ = read(label_records, ULTRA, reward="overall_score", pairs="all")
    labels = [(record.responses[0], record.label) for record in records[:4]]
    assert labels == [("b", True), ("a", False), ("b", True), ("c", False)]
    assert len(records) == 10


# Arena


def test_arena_battles():
    def battle(winner):
        conversation = [user("p"), assistant("a")], [user("p"), assistant("b")]
        return {
            "question_id": "q",
            "conversation_a": conversation[0],
            "conversation_b": conversation[1],
            "winner": winner,
        }

    winners = ["model_a", "Model_B", "tie", "tie (bothbad)", "both_bad", "someone"]
    records, dropped = read(preference_records, *map(battle, winners))
    assert [[response[0]["content"] for response in record.responses] for record in records] == [["a", "b"], ["b", "a"]]
    assert dropped == [(2, "tie"), (3, "tie"), (4, "tie"), (5, "unknown winner")]


def test_arena_with_parts_of_contents():
    """Those of lmarena-ai/arena-human-preference-140k, whose texts come with empty images."""

    def said(role, text):
        return {"role": role, "content": [{"type": "text", "text": text, "image": None, "mimeType": None}]}

    row = {
        "id": "x",
        "model_a": "m",
        "model_b": "n",
        "winner": "model_b",
        "evaluation_order": 1,
        "conversation_a": [said("user", "p"), said("assistant", "a")],
        "conversation_b": [said("user", "p"), said("assistant", "b")],
        "full_conversation": [
            {"user": said("user", "p"), "model_side_a": said("assistant", "a"), "model_side_b": said("assistant", "b")}
        ],
        "is_code": False,
    }
    image = {"type": "image", "text": None, "image": "https://...", "mimeType": "image/png"}
    seen = row | {"conversation_a": [{"role": "user", "content": [image]}, said("assistant", "a")]}
    records, dropped = read(preference_records, row, seen)
    assert records == [Record([user("p")], ([assistant("b")], [assistant("a")]), 0)]
    assert dropped == [(1, "column 'rejected' has a message with a part of type 'image'")]


def test_arena_with_lists_of_turns(tmp_path):
    """Those of lmsys/lmsys-arena-human-preference-55k, a CSV file of JSON."""
    names = "id,model_a,model_b,prompt,response_a,response_b,winner_model_a,winner_model_b,winner_tie"
    lines = [
        [1, "m", "n", ["p"], ["a"], ["b"], 0, 1, 0],
        [2, "m", "n", ["p", "q"], ["a", "b"], ["a", "c"], 1, 0, 0],
        [3, "m", "n", ["p"], ["a"], ["b"], 0, 0, 1],
        [4, "m", "n", ["p"], ["a"], [None], 1, 0, 0],
        [5, "m", "n", ["p"], ["a"], ["b"], 1, 1, 0],
    ]
    with open(tmp_path / "a.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names.split(","))
        writer.writerows([json.dumps(cell) if isinstance(cell, list) else cell for cell in line] for line in lines)
    rows = read_rows(str(tmp_path / "a.csv"), "train")
    assert [record.prompt for record in read(prompt_records, *rows)[0]] == [[user("p")]] * 5
    records, dropped = read(preference_records, *rows)
    assert [record.responses for record in records] == [
        ([assistant("b")], [assistant("a")]),
        ([assistant("b")], [assistant("c")]),
    ]
    assert [record.prompt for record in records] == [[user("p")], [user("p"), assistant("a"), user("q")]]
    assert dropped == [(2, "tie"), (3, "turns of the user and answers do not alternate"), (4, "not one winner")]


def test_arena_with_plain_responses():
    row = {"prompt": "p", "response_a": "a", "response_b": "b", "winner": "model_b"}
    assert read(preference_records, row)[0] == [Record("p", ("b", "a"), 0)]
    assert [record.label for record in read(label_records, row)[0]] == [True, False]
    lists = {"prompt": "p", "response_a": "[1]", "response_b": "[2]", "winner": "model_a"}
    assert read(preference_records, lists)[0][0].responses == ("[1]", "[2]")


# Step-DPO

STEP = {
    "dataset": "MATH",
    "prompt": "What is 2+2+2?",
    "initial_reason_steps": "Step 1: 2+2=4.\nStep 2:",
    "chosen": " 4+2=6.",
    "rejected": " 4+2=7.",
    "full_chosen": " 4+2=6. So 6.",
    "full_rejected": " 4+2=7. So 7.",
    "answer": "6",
}


def test_step_dpo_puts_the_steps_before_both_responses(tmp_path, chat_tokenizer):
    steps = STEP["initial_reason_steps"]
    assert read(preference_records, STEP)[0] == [
        Record(f"What is 2+2+2?\n{steps}", (" 4+2=6.", " 4+2=7."), 0, open_end=True)
    ]
    (tmp_path / "a.jsonl").write_text(json.dumps(STEP))
    for options in (DataOptions(), DataOptions(as_chat=True)):
        data = load_examples(str(tmp_path / "a.jsonl"), "train", "preferences", chat_tokenizer, options)
        [example] = data.examples
        prompt, *responses = (
            chat_tokenizer.decode(ids) for ids in (example.prompt, *(r.ids for r in example.responses))
        )
        # A step is not the end of the response, so no EOS is learned.
        assert all(r.truncated for r in example.responses) and not any("[E]" in text for text in responses)
        assert (prompt + responses[0]).endswith(steps + " 4+2=6.") and (prompt + responses[1]).endswith(" 4+2=7.")
        assert "single steps, which end without EOS: 1 (row 1)" in data.summary and "none truncated" in data.summary


def test_step_dpo_without_first_steps():
    assert read(preference_records, STEP, STEP | {"initial_reason_steps": ""})[0][1].prompt == "What is 2+2+2?"
    assert read(preference_records, STEP, STEP | {"chosen": None})[1][0][1].endswith("are not all text")


# Single responses


@pytest.mark.parametrize(
    ("label", "expected"), [(True, True), (0, False), (-1.0, False), ("True", True), ("0", False), ("1.0", True)]
)
def test_trl_unpaired_labels(label, expected):
    [record], _ = read(label_records, {"prompt": "p", "completion": "c", "label": label})
    assert record == Record("p", ("c",), 0, label=expected)
    [record], _ = read(label_records, {"messages": [user("p"), assistant("c")], "good": label}, label="good")
    assert (record.prompt, record.responses, record.label) == ([user("p")], ([assistant("c")],), expected)


def test_labels_that_are_none():
    row = {"prompt": "p", "completion": "c", "label": True}
    _, dropped = read(label_records, row, row | {"label": 0.5}, row | {"label": None}, row | {"label": "maybe"})
    assert [reason for _, reason in dropped] == [
        "column 'label' holds no label",
        "column 'label' is null",
        "column 'label' holds no label",
    ]
    assert "no column 'x' (found: completion, label, prompt)" in failure(label_records, row, label="x")


def test_pairs_become_two_labels():
    records, _ = read(label_records, {"prompt": "p", "chosen": "c", "rejected": "r"})
    assert records == [Record("p", ("c",), 0, label=True), Record("p", ("r",), 0, label=False)]
    dialogues = {"chosen": [user("p"), assistant("c")], "rejected": [user("p"), assistant("r")]}
    assert [record.responses for record in read(label_records, dialogues)[0]] == [([assistant(t)],) for t in "cr"]


def test_returns():
    row = {"prompt": "p", "completion": "c", "reward": 1.5, "reference_rewards": [1, 2.5]}
    rows = [row, row | {"reference_rewards": "[3]"}, row | {"reference_rewards": 4}]
    records, _ = read(return_records, *rows)
    assert [record.reference_rewards for record in records] == [(1.0, 2.5), (3.0,), (4.0,)]
    assert all(record.reward == 1.5 for record in records)
    _, dropped = read(return_records, row, row | {"reference_rewards": ["x"]}, row | {"reward": float("nan")})
    assert dropped == [(1, "column 'reference_rewards' holds no rewards"), (2, "column 'reward' holds no number")]


def test_returns_of_one_prompt_stand_for_the_reference():
    rows = [{"prompt": p, "completion": c, "score": s} for p, c, s in (("p", "a", 1), ("q", "b", 2), ("p", "c", 3))]
    records, dropped = read(return_records, *rows)
    assert [(record.row, record.reference_rewards) for record in records] == [(0, (1.0, 3.0)), (2, (1.0, 3.0))]
    assert dropped == [(1, "no rewards of the reference's responses")]
    rows = [row | {"helpful_rating": 3} for row in rows]
    assert "several columns may hold the reward: score, helpful_rating" in failure(return_records, *rows)
    assert len(read(return_records, *rows, reward="score")[0]) == 2
    assert "no column of rewards (found: completion, prompt); name yours with --data.reward" in failure(
        return_records, {"prompt": "p", "completion": "c"}
    )


# What is unclear is refused


def test_a_file_of_another_kind_is_refused_by_name():
    single = {"prompt": "p", "completion": "c", "label": True}
    message = failure(preference_records, single)
    assert "holds rows of the format 'single' (columns: completion, label, prompt)" in message
    assert "loss.name kto and implicit_prm read labels" in message
    assert "holds rows of the format 'pairs'" in failure(
        return_records, {"prompt": "p", "chosen": "c", "rejected": "r"}
    )


def test_several_formats_in_one_file():
    both = {"prompt": "p", "chosen": "c", "rejected": "r", "responses": ["x", "y"], "scores": [1, 2]}
    assert "fit several formats (pairs, ranking); choose one with --data.format" in failure(preference_records, both)
    assert read(preference_records, both, format="pairs")[0][0].responses == ("c", "r")
    assert read(preference_records, both, format="ranking")[0][0].responses == ("y", "x")
    assert "data.format single is for losses of single responses" in failure(preference_records, both, format="single")


def test_options_without_effect_are_refused():
    pair = {"prompt": "p", "chosen": "c", "rejected": "r"}
    assert "data.pairs all has no effect" in failure(preference_records, pair, pairs="all")
    assert "data.pairs all has no effect" in failure(prompt_records, pair, pairs="all")
    assert "data.format pairs has no effect" in failure(completion_records, pair, format="pairs")


def test_all_pairs_of_a_ranking_are_counted_by_row(tmp_path, plain_tokenizer):
    rows = [{"prompt": "p", "responses": ["p a", "p b", "p c"], "scores": [1, 2, 3]}] * 2
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = replace(DataOptions(), pairs="all")
    data = load_examples(str(tmp_path / "a.jsonl"), "train", "preferences", plain_tokenizer, options)
    assert "2 rows read, 2 used for 6 examples; prompts" in data.summary
    assert [plain_tokenizer.decode(e.responses[0].ids) for e in data.examples] == [" c[E]", " c[E]", " b[E]"] * 2
