"""Which tokens are actions in the templates of published models; expectations are written by hand, as stretches."""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from qstar_jax.config import DataOptions
from qstar_jax.data.loading import load_examples
from qstar_jax.errors import InputError

pytestmark = [pytest.mark.real, pytest.mark.slow]

ENVIRONMENT = -1


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"id": "call12345", "type": "function", "function": {"name": "add", "arguments": '{"x": 1, "y": 2}'}}
SUM = {"role": "tool", "tool_call_id": "call12345", "name": "add", "content": "3"}
NUMBERS = {"type": "object", "properties": {"x": {"type": "number"}, "y": {"type": "number"}}}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": NUMBERS}}]
DIALOGUES = {
    "talk": [SYSTEM, user("Hello"), assistant("Hi there."), user("Bye?"), assistant("Bye!")],
    "tool": [SYSTEM, user("1+2?"), assistant(None, tool_calls=[CALL]), SUM, assistant("It is 3.")],
    "thoughts": [
        user("1+2?"),
        assistant("3.", reasoning_content="I add."),
        user("Sure?"),
        assistant("Yes.", reasoning_content="Check."),
    ],
    "thoughts+tool": [
        user("1+2?"),
        assistant(None, tool_calls=[CALL], reasoning_content="I add."),
        SUM,
        assistant("It is 3.", reasoning_content="Done."),
    ],
}
# What ChatML and its heirs write.
CHATML_CALL = '<tool_call>\n{"name": "add", "arguments": {"x": 1, "y": 2}}\n</tool_call><|im_end|>'
CHATML_SUM = "\n<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
CHATML_BYE = "\n<|im_start|>user\nBye?<|im_end|>\n<|im_start|>assistant\n"
CHATML_SURE = "\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
# What Llama 3.1 and gpt-oss write between turns.
LLAMA_TURN = "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
OSS_CALL = ' to=functions.add<|channel|>commentary json<|message|>{"x": 1, "y": 2}<|call|>'
OSS_SUM = '<|start|>functions.add to=assistant<|channel|>commentary<|message|>"3"<|end|><|start|>assistant'
HEADERS = {
    "gemma3": "<start_of_turn>model\n",
    "gptoss": "<|start|>assistant",
    "llama3_1": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "qwen2_5": "<|im_start|>assistant\n",
    "qwen3": "<|im_start|>assistant\n",
}
# Tokenizer, its own template or one of TRL, dialogue and turns -> stretches of the response.
MASKS = {
    "llama3_1 own talk all": [
        (0, "Hi there.<|eot_id|>"),
        (ENVIRONMENT, LLAMA_TURN.format("user", "Bye?")),
        (1, "Bye!<|eot_id|>"),
    ],
    "llama3_1 llama3_1 tool all": [
        (0, '{"name": "add", "parameters": {"x": 1, "y": 2}}<|eot_id|>'),
        (ENVIRONMENT, LLAMA_TURN.format("ipython", '"3"')),
        (1, "It is 3.<|eot_id|>"),
    ],
    "qwen2_5 own talk all": [(0, "Hi there.<|im_end|>"), (ENVIRONMENT, CHATML_BYE), (1, "Bye!<|im_end|>")],
    "qwen2_5 own tool all": [(0, CHATML_CALL), (ENVIRONMENT, CHATML_SUM), (1, "It is 3.<|im_end|>")],
    "qwen2_5 own tool last": [(0, "It is 3.<|im_end|>")],
    "gemma3 own talk all": [
        (0, "Hi there.<end_of_turn>"),
        (ENVIRONMENT, "\n<start_of_turn>user\nBye?<end_of_turn>\n<start_of_turn>model\n"),
        (1, "Bye!<end_of_turn>"),
    ],
    # Qwen3 keeps the reasoning of turns after the last user's, and drops that of earlier ones.
    "qwen3 own thoughts+tool all": [
        (0, "<think>\nI add.\n</think>\n\n" + CHATML_CALL),
        (ENVIRONMENT, CHATML_SUM),
        (1, "<think>\nDone.\n</think>\n\nIt is 3.<|im_end|>"),
    ],
    "qwen3 own thoughts last": [(0, "<think>\nCheck.\n</think>\n\nYes.<|im_end|>")],
    "qwen3 own thoughts final_answer": [
        (ENVIRONMENT, "<think>\nCheck.\n</think>\n\n"),
        (0, "Yes.<|im_end|>"),
    ],
    "qwen3 qwen3_training thoughts all": [
        (0, "<think>\nI add.\n</think>\n\n3.<|im_end|>"),
        (ENVIRONMENT, CHATML_SURE),
        (1, "<think>\nCheck.\n</think>\n\nYes.<|im_end|>"),
    ],
    "gptoss gptoss tool all": [
        (0, OSS_CALL),
        (ENVIRONMENT, OSS_SUM),
        (1, "<|channel|>final<|message|>It is 3.<|return|>"),
    ],
    "gptoss gptoss thoughts last": [
        (0, "<|channel|>analysis<|message|>Check.<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|return|>"),
    ],
    "gptoss gptoss thoughts final_answer": [
        (ENVIRONMENT, "<|channel|>analysis<|message|>Check.<|end|><|start|>assistant<|channel|>final<|message|>"),
        (0, "Yes.<|return|>"),
    ],
}
# The same -> why it cannot be learned.
REFUSALS = {
    "qwen2_5 own thoughts all": "the chat template omits reasoning_content; choose one that",
    "gemma3 own tool all": r"the chat template refuses the messages \(Conversation roles must alternate",
    "llama3_1 own tool all": "the chat template omits tools; choose one that renders them with",
    "qwen3 own thoughts all": (
        r"rewrites a turn of the assistant when another follows \(after '.*assistant\\n' it first has "
        r"'<think>\\nI add.* and later '3.<\|im_end\|>.*; learn the last turn only with --data.turns last, or name"
    ),
    "qwen3 own talk all": r"it first has '<think>\\n\\n</think>\\n\\nHi there.*, and later 'Hi there",
    "gptoss gptoss talk all": r"another token than the last \(.*Hi there.<\|end\|><\|start\|>user.* has no EOS",
    "gptoss gptoss thoughts+tool last": "renders the prompt differently when a response follows",
    "gptoss gptoss_training thoughts all": "the chat template omits thinking; choose one that",
}


def template_file(template):
    """A template of TRL as a file; None for the tokenizer's own."""
    if template == "own":
        return None
    if (trl := find_spec("trl")) is None:
        pytest.skip("TRL, which has the template, is not installed (extra `parity`)")
    return str(Path(trl.origin).parent / "chat_templates" / f"{template}.jinja")


@pytest.fixture
def read(name, tokenizer, eos_ids, tmp_path):
    """`read(row, **options)`: the example of a row, as a model of this tokenizer reads it."""

    def make(row, **options):
        text = json.dumps(row)
        text = text.replace("reasoning_content", "thinking") if name == "gptoss" else text  # which it reads
        (tmp_path / "rows.jsonl").write_text(text)
        known = {"vocabulary": len(tokenizer), "eos_ids": eos_ids}
        data = load_examples(
            str(tmp_path / "rows.jsonl"), "", "completions", tokenizer, DataOptions(**options), **known
        )
        return data.examples[0]

    return make


def row_of(dialogue):
    return {"messages": DIALOGUES[dialogue]} | ({"tools": TOOLS} if "tool" in dialogue else {})


def assert_is(response, stretches, tokenizer):
    """Compares tokens and turns with those of stretches of text, each tokenized on its own."""
    ids = [tokenizer(text, add_special_tokens=False).input_ids for _, text in stretches]
    expected = [(token, turn) for (turn, _), tokens in zip(stretches, ids, strict=True) for token in tokens]
    assert list(zip(response.ids.tolist(), response.turns.tolist(), strict=True)) == expected
    np.testing.assert_array_equal(response.action_mask, response.turns != ENVIRONMENT)


def cases(table):
    return pytest.mark.parametrize(
        ("name", "template", "dialogue", "turns", "expected"),
        [(*case.split(), expected) for case, expected in table.items()],
        ids=list(table),
        indirect=["name"],
    )


@cases(MASKS)
def test_actions_of_real_templates(name, template, dialogue, turns, expected, tokenizer, read):
    example = read(row_of(dialogue), turns=turns, chat_template=template_file(template))
    [response] = example.responses
    assert_is(response, expected, tokenizer)
    assert not response.truncated and not example.prompt_truncated
    assert tokenizer.decode(example.prompt).endswith(HEADERS[name])


@cases(REFUSALS)
def test_what_real_templates_do_not_show(template, dialogue, turns, expected, read):
    with pytest.raises(InputError, match=f"row 1: .*{expected}"):
        read(row_of(dialogue), turns=turns, chat_template=template_file(template))
