"""What `qstar data FILE` says of a file."""

import copy
import json

import pytest

from qstar_jax.cli.main import main
from qstar_jax.store import hub


def say(tmp_path, capsys, rows, *words, code=0):
    """What the verb prints about a file of these rows, and what it refuses."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["data", str(tmp_path / "a.jsonl"), *words]) == code
    shown = capsys.readouterr()
    return shown.out if code == 0 else (shown.out, shown.err)


PAIR = {"prompt": "w1 w2", "chosen": "w3 w4 w5", "rejected": "w6"}


def test_a_file_without_a_tokenizer(tmp_path, capsys):
    rows = [PAIR] * 19 + [PAIR | {"rejected": ""}, PAIR | {"rejected": PAIR["chosen"]}, PAIR | {"id": 3}]
    text = say(tmp_path, capsys, rows, "--show", "1")
    assert "22 rows" in text and "format: pairs, read as preferences" in text
    table = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    assert table["chosen"] == ["chosen", "8.0", "8", "8", "8", "8"]  # lengths, which stand below the columns
    assert "empty rejected response" in text and "chosen equals rejected" in text
    assert table["id"] == ["id", "int", "5%", "3"]
    assert "[prompt] w1 w2" in text and "[chosen] w3 w4 w5" in text and "row 2" not in text
    assert "Use it: qstar dpo --data.train /" in text and "a.jsonl --model MODEL --out OUT" in text
    assert "Chosen responses are the longer ones in 100%" in text


def test_a_file_with_a_tokenizer(tmp_path, capsys, hf_folder):
    rows = [PAIR] * 9 + [PAIR | {"chosen": "w3 " * 40}]
    words = ["--model", str(hf_folder), "--data.max_length", "20", "--data.max_prompt_length", "8", "--show", "1"]
    text = say(tmp_path, capsys, rows, *words)
    assert "10 rows read, 10 used" in text and "lengths in tokens" in text
    assert "10.0% exceed --data.max_length 20;" in text
    assert "chosen (" in text and "in the loss)" in text
    text = say(tmp_path, capsys, rows[:3], "--model", str(hf_folder), "--data.max_length", "900")
    assert "--data.max_length" in text.split("The longest text has")[1]


@pytest.mark.parametrize(
    ("row", "kind", "use"),
    [
        ({"prompt": "p", "completion": "c", "label": True}, "labels", "--loss.name implicit_prm"),
        ({"prompt": "p", "completion": "c", "score": 1}, "returns", "--loss.name a_star"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [1, 2]}, "preferences", "qstar dpo"),
        ({"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "c"}]}, "completions", "sft"),
        ({"prompt": "p"}, "prompts", "qstar generate --data.eval"),
    ],
)
def test_kinds_of_rows(row, kind, use, tmp_path, capsys):
    text = say(tmp_path, capsys, [row] * 2)
    assert f"read as {kind}" in text and use in text


def test_columns_that_may_be_responses_are_named(tmp_path, capsys):
    rows = [{"prompt": "p", "response_chosen": "a", "response_rejected": "b", "score": 1}] * 2
    text = " ".join(say(tmp_path, capsys, rows).split())
    assert "Only prompts are read. If there are responses in response_chosen, response_rejected, name them" in text


def test_another_kind(tmp_path, capsys):
    text = say(tmp_path, capsys, [PAIR, PAIR | {"prompt": "w2"}], "--kind", "labels")
    assert "format: pairs, read as labels" in text and "--loss.name kto" in text


def test_what_cannot_be_used_is_shown_before_it_is_refused(tmp_path, capsys):
    shown, refusal = say(tmp_path, capsys, [{"question": "p", "answer": "a"}], code=2)
    assert "question" in shown and "none of its columns (answer, question) is known" in refusal
    assert "--data.prompt, --data.chosen and --data.rejected" in refusal
    row = {"prompt": "p", "completions": [{"response": "a", "x_score": 1, "y_score": 2}]}
    shown, refusal = say(tmp_path, capsys, [row], code=2)
    assert "completions" in shown and "x_score, y_score; choose one with --data.reward" in refusal


def test_the_command_has_the_options_with_which_the_file_was_read(tmp_path, capsys):
    row = {
        "q": "p",
        "responses": [{"text": "a b", "x_score": 1, "y_score": 2}, {"text": "c", "x_score": 2, "y_score": 1}],
    }
    words = ["--data.prompt", "q", "--data.reward", "y_score", "--data.pairs", "all", "--data.system", "null"]
    command = say(tmp_path, capsys, [row], *words).split("Use it: ")[1].replace("\n", " ")
    assert all(option in command for option in ("--data.prompt q", "--data.reward y_score", "--data.pairs all"))
    assert "--data.system null" in command and "max_length" not in command
    out = tmp_path / "out"
    command = command.replace("MODEL", "/nowhere").replace("OUT", str(out)).split()
    assert main(command[1:]) == 2 and "/nowhere" in capsys.readouterr().err


def test_labels_and_rewards_are_shown(tmp_path, capsys):
    row = {"prompt": "p", "completion": "c"}
    # KTO refuses a file with a single prompt, so it is not proposed.
    assert "--loss.name implicit_prm" in say(tmp_path, capsys, [row | {"label": True}] * 2)
    text = say(tmp_path, capsys, [row | {"label": n == 0} for n in range(4)])
    assert "row 1, desirable" in text and "row 2, not desirable" in text
    assert "25% of the responses are desirable." in text
    assert "All of the responses are desirable: losses of labels need some of each" in say(
        tmp_path, capsys, [row | {"label": True}] * 2
    )
    assert "row 1, reward 0.5" in say(tmp_path, capsys, [row | {"reward": 0.5}] * 2)
    _, refusal = say(tmp_path, capsys, [row | {"reward": float("nan")}] * 2, code=2)
    assert "column 'reward' holds no number (found nan)" in refusal


def test_a_dialogue_has_actions_and_an_environment(tmp_path, capsys, tiny_model, tiny_params, tiny_tokenizer):
    def said(role, text):
        return {"role": role, "content": text}

    user, short, long = said("user", "w1 w2 w3 w4 w5"), said("assistant", "w1"), said("assistant", "w1 w2 w3")
    row = {"prompt": [user], "chosen": [short, user, short], "rejected": [long]}
    text = say(tmp_path, capsys, [row] * 2)
    # The user's words make nobody's response longer.
    assert "Chosen responses are the longer ones in 0% of the pairs." in text
    assert "[chosen, user] w1 w2" in text and "[rejected, assistant] w1 w2 w3" in text
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    hub.write_folder(tmp_path / "model", tiny_model, tiny_params, tokenizer, "float32")
    text = say(tmp_path, capsys, [row] * 2, "--model", str(tmp_path / "model"), "--show", "0")
    means = {" ".join(words[:-5]): words[-5] for line in text.splitlines() if len(words := line.split()) > 5}
    assert (means["chosen"], means["actions of chosen"], means["rejected"]) == ("10.0", "4.0", "4.0")
    assert "actions of rejected" not in means


def test_chats_beside_plain_text_are_counted(tmp_path, capsys, hf_folder):
    chat = {"prompt": [{"role": "user", "content": "w1"}], "chosen": "w2", "rejected": "w3"}
    text = say(tmp_path, capsys, [PAIR, chat, PAIR]).replace("\n", " ")
    assert "beside others that are chats: 2 (row 1, 3); --data.as_chat makes chats of all" in text
    assert "beside others" not in say(tmp_path, capsys, [PAIR, chat], "--data.as_chat", "true")


def test_a_file_whose_rows_cannot_be_read(tmp_path, capsys):
    (tmp_path / "a.csv").write_text('prompt,chosen,rejected\n"a,b,c\nx,y,z\n')
    assert main(["data", str(tmp_path / "a.csv")]) == 2
    error = capsys.readouterr().err
    assert "a.csv row 1: " in error and "of its" in error and "can be read" in error


def test_an_unquoted_pattern(capsys):
    with pytest.raises(SystemExit):
        main(["data", "a.jsonl", "b.jsonl"])
    assert "'data/*.jsonl', in quotes" in capsys.readouterr().err


def test_control_characters_do_not_act(tmp_path, capsys):
    assert "\x1b" not in say(tmp_path, capsys, [PAIR | {"prompt": "a\x1b[2Jb"}])
