"""One command reads a file of each format to train on, up to the first batch.

What becomes of every column is tested in tests/data, and that such batches train in tests/training/objectives.
"""

import copy
import csv
import gzip
import json

import datasets
import pytest

from qstar_jax.cli.main import main
from qstar_jax.store import hub
from qstar_jax.training.inputs import load_inputs

TEMPLATE = (
    "{{ mood or '' }} {% for t in tools or [] %}{{ t.function.name }} {% endfor %}{% for m in messages %}"
    "{{ {'system': 'w50', 'user': 'w51', 'assistant': 'w52', 'tool': 'w53'}[m.role] }} "
    "{% for c in m.tool_calls or [] %}{{ c.function.name }} {% for v in c.function.arguments.values() %}{{ v }} "
    "{% endfor %}{% endfor %}{{ m.content }} [EOS] {% endfor %}"
    "{% if add_generation_prompt %}w52 {% endif %}"
)


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def said(who, value):
    return {"from": who, "value": value}


FUNCTION = {"name": "w40", "description": "d", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"id": "1", "type": "function", "function": {"name": "w40", "arguments": '{"x": "w41"}'}}
CALLED = [
    user("w1"),
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "name": "w40", "content": "w2"},
    assistant("w3 w4"),
]
PAIR = {"prompt": "w1 w2", "chosen": "w3 w4", "rejected": "w5"}
TALK = [user("w1"), assistant("w2"), user("w6"), assistant("w3")]
ULTRA = {
    "instruction": "w1",
    "completions": [
        {"response": text, "overall_score": score, "annotations": {"honesty": {"Rating": "3"}}}
        for text, score in (("w2", 7.0), ("w3", 8.5), ("w4", 2.0))
    ],
}
SINGLE = {"prompt": [user("w1")], "completion": [assistant("w2")]}
# Name -> verb and options, rows, and what the assistant says in the responses of the first one.
FORMATS = {
    "trl-standard": ("dpo", [PAIR], ["w3 w4", "w5"]),
    "trl-conversational": (
        "dpo",
        [
            {"prompt": [user("w1")], "chosen": [assistant("w2")], "rejected": [assistant("w3")]}
            | {"tools": json.dumps([TOOL]), "chat_template_kwargs": {"mood": "w4"}}
        ],
        ["w2", "w3"],
    ),
    "trl-implicit-prompt": ("dpo", [{"chosen": TALK, "rejected": [*TALK[:3], assistant("w4")]}], ["w3", "w4"]),
    "trajectories": (
        "dpo --loss.name dmpo",
        [{"prompt": TALK[:1], "chosen": TALK[1:], "rejected": [assistant("w5")]}],
        ["w2 [EOS] w3", "w5"],
    ),
    "messages-with-tools": ("sft", [{"messages": CALLED, "tools": [TOOL]}], ["w40 w41 [EOS] w3 w4"]),
    "share-gpt": (
        "sft",
        [
            {
                "conversations": [
                    said("human", "w1"),
                    said("function_call", json.dumps({"name": "w40", "arguments": {"x": "w41"}})),
                    said("observation", "w2"),
                    said("gpt", "w3"),
                ],
                "tools": json.dumps([FUNCTION]),
            }
        ],
        ["w40 w41 [EOS] w3"],
    ),
    "llama-factory": (
        "dpo",
        [{"conversations": [said("human", "w1")], "chosen": said("gpt", "w2"), "rejected": said("gpt", "w3")}],
        ["w2", "w3"],
    ),
    "ultrafeedback": ("dpo --data.reward overall_score", [ULTRA], ["w3", "w4"]),
    "ultrafeedback-rankings": (
        "dpo --data.reward overall_score --loss.name plackett_luce",
        [ULTRA],
        ["w3", "w2", "w4"],
    ),
    "arena": (
        "dpo",
        [
            {
                "conversation_a": [user("w1"), assistant("w2")],
                "conversation_b": [user("w1"), assistant("w3")],
                "winner": "model_b",
            }
        ],
        ["w3", "w2"],
    ),
    "labels-kto": (
        "dpo --loss.name kto",
        [SINGLE | {"label": True}, {"prompt": [user("w7")], "completion": [assistant("w8")], "label": False}],
        ["w2", "w8"],  # the second is for the baseline
    ),
    "labels-implicit_prm": ("dpo --loss.name implicit_prm", [SINGLE | {"label": n} for n in (True, False)], ["w2"]),
    "returns-a_star": ("dpo --loss.name a_star", [{"messages": TALK, "reward": n} for n in (0.5, 1)], ["w2 [EOS] w3"]),
    "returns-qrpo": ("dpo --loss.name qrpo", [SINGLE | {"reward": 1, "reference_rewards": [0, 2]}], ["w2"]),
    "step-dpo": ("dpo", [PAIR | {"initial_reason_steps": "w7 w8", "answer": "6"}], ["w3 w4", "w5"]),
}


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory, tiny_model, tiny_params, tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = TEMPLATE
    folder = tmp_path_factory.mktemp("chat") / "model"
    hub.write_folder(folder, tiny_model, tiny_params, tokenizer, "float32")
    return folder


class Read(Exception):
    """The run has read its data; nothing is compiled yet."""


@pytest.fixture
def read(chat_folder, tiny_tokenizer, tmp_path, one_device_only, monkeypatch):
    """`read(path, command)`: what the assistant says in the first example, and the first batch."""
    inputs = []

    def load(*arguments):
        inputs.append(load_inputs(*arguments))
        raise Read

    monkeypatch.setattr("qstar_jax.training.run.load_inputs", load)

    def run(path, command="dpo"):
        words = ["--model", chat_folder, "--out", tmp_path / "run", "--data.train", path, "--data.bad_rows", "stop"]
        with pytest.raises(Read):
            main([*command.split(), *map(str, words), "--train.batch_size", "2", "--train.steps", "1"])
        feeder = inputs[-1].train
        said = [tiny_tokenizer.decode(r.ids[r.action_mask]) for r in feeder.dataset.examples[0].responses]
        return [text.removesuffix(" [EOS]") for text in said], feeder.at_step(0, 0)

    return run


@pytest.mark.parametrize(("command", "rows", "expected"), FORMATS.values(), ids=FORMATS)
def test_a_file_of_each_format(command, rows, expected, read, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * 2))
    said, batch = read(path, command)
    assert said == expected and batch.action_mask.shape[:2] == (2, len(expected))


def write(path, kind):
    """Writes two pairs as files of some kind; returns what `--data.train` names."""
    rows = [PAIR, PAIR | {"chosen": "w9"}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if kind == "json":
        (path / "rows.json").write_text(json.dumps(rows, indent=2))
    elif kind in ("csv", "tsv"):
        with open(path / f"rows.{kind}", "w", newline="") as file:
            writer = csv.DictWriter(file, PAIR, delimiter="," if kind == "csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "jsonl.gz":
        (path / "rows.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    elif kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path / "rows.parquet")
    elif kind == "save_to_disk":
        datasets.Dataset.from_list(rows).save_to_disk(path / "rows.save_to_disk")
    else:
        (path / "one.jsonl").write_text(lines)
        (path / "two.jsonl").write_text(lines)
        return path if kind == "folder" else path / "*.jsonl"
    return path / f"rows.{kind}"


@pytest.mark.parametrize("kind", ["json", "csv", "tsv", "jsonl.gz", "parquet", "save_to_disk", "folder", "pattern"])
def test_a_file_of_each_kind(kind, read, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    assert read(write(folder, kind))[0] == ["w3 w4", "w5"]
