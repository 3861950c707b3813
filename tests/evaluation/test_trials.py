import json

import pytest

from qstar_jax.config import DataOptions
from qstar_jax.data.preferences import completion_records
from qstar_jax.evaluation.trials import _texts

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
