import json

import pytest

from qstar_jax.config import DataOptions
from qstar_jax.data.preferences import completion_records
from qstar_jax.data.records import Record, last_turn
from qstar_jax.evaluation.trials import REPEATED, _texts, read_trials
from qstar_jax.store.open import LoadedModel

USER, ANSWER = {"role": "user", "content": "Wet?"}, {"role": "assistant", "content": "Water."}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "Wet?", "completion": "Water."}, "Wet?"),
        ({"prompt": "Wet? ", "completion": "Wet? Water."}, "Wet? "),
        ({"prompt": "Wet?", "completion": None, "chosen": [USER, ANSWER]}, "Wet?"),
        ({"prompt": "Wet?", "chosen": json.dumps([USER, ANSWER])}, "Wet?"),
        ({"messages": [USER, ANSWER]}, "Wet?"),
        ({"prompt": [USER], "completion": [ANSWER], "system": "Be brief."}, "system: Be brief.\n\nuser: Wet?"),
    ],
)
def test_prompt_and_answer_as_a_judge_reads_them(row, prompt):
    [record], _ = completion_records([row], DataOptions(), "data.jsonl")
    assert _texts(record) == (prompt, "Water.")


@pytest.fixture
def read(tiny_model, tiny_params, tiny_tokenizer, tmp_path):
    """`read(rows, **options)`: the trials of a file with these rows."""

    def make(rows, **options):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        policy = LoadedModel(tiny_model, tiny_params, tiny_tokenizer, tmp_path)
        return read_trials(DataOptions(eval=str(path), **options), policy)

    return make


def test_of_rows_with_one_prompt_the_first_counts_and_the_others_are_named(read):
    prompts = ["w1", "w2", "w1", "w3", "w2", "w1"]
    found, dataset = read([{"prompt": prompt, "chosen": f"w{9 + i}"} for i, prompt in enumerate(prompts)])
    assert [(t.row, t.prompt, t.baseline) for t in found] == [(0, "w1", "w9"), (1, "w2", "w10"), (3, "w3", "w12")]
    assert [(one.row, one.reason) for one in dataset.dropped] == [(2, REPEATED), (4, REPEATED), (5, REPEATED)]
    assert [example.row for example in dataset.examples] == [0, 1, 3]
    assert f"6 rows read, 3 used; 3 dropped: 3 {REPEATED} (row 3, 5, 6)" in dataset.summary


def test_the_answer_to_beat_in_a_dialogue_is_its_last_turn(read, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(tiny_tokenizer, "chat_template", "{% for m in messages %}{{ m.content }} [EOS]{% endfor %}")
    talk = [{"role": role, "content": f"w{i}"} for i, role in enumerate(("user", "assistant", "tool", "assistant"))]
    called = [talk[0], {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}, *talk[2:]]
    assert _texts(last_turn(Record(called[:1], (called[1:],), 0))) == (
        'user: w0\n\nassistant: [{"name": "f"}]\n\ntool: w2',
        "w3",
    )
    [trial], _ = read([{"messages": talk}])
    assert trial.baseline == "w3" and trial.prompt == "user: w0\n\nassistant: w1\n\ntool: w2"
    assert tiny_tokenizer.decode(trial.example.prompt).split() == "w0 [EOS] w1 [EOS] w2 [EOS]".split()


def test_the_answer_to_beat_is_the_one_that_is_scored(read):
    rows = [{"prompt": f"w{i}", "chosen": f"w{i} w20 w21"} for i in range(1, 4)]
    found, dataset = read(rows)
    assert [trial.baseline.strip() for trial in found] == ["w20 w21"] * 3 and "which was removed" in dataset.summary
    found, _ = read(rows, repeated_prompt="keep")
    assert [trial.baseline for trial in found] == ["w1 w20 w21", "w2 w20 w21", "w3 w20 w21"]
