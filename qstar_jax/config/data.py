"""The `data:` block."""

from dataclasses import dataclass, field
from typing import Any, Literal

from qstar_jax.config.variants import path


@dataclass(frozen=True)
class DataOptions:
    """Where examples come from and how they become tokens.

    Args:
        train: JSONL or a JSON array (.jsonl, .json, also .gz), Parquet, or a data-set name on the hub.
        eval: Held-out examples, in any of the same forms; none: no evaluation.
        train_split: Split to take when `train` is a hub name.
        eval_split: Split to take when `eval` is a hub name.
        prompt: Column of the prompt (text or chat messages); may be missing in files of whole dialogues.
        chosen: Column of the preferred answer.
        rejected: Column of the other answer.
        completion: Column of the answer in files for supervised fine-tuning; where it is missing, `chosen` is used.
        tools: Column of the tools that the chat template shows to the model (a list of JSON schemas, or a JSON string
            of one), in files that have it; null leaves it out.
        system: Column of the system message, in files that have it; it goes before the prompt's messages; null leaves
            it out.
        as_chat: Wrap a plain-text prompt as a user's message and apply the tokenizer's chat template.
        chat_template: Name of one of the tokenizer's chat templates, or a file that holds one (Jinja); not set: the
            tokenizer's default, or `tool_use` for dialogues with tools. A run's tokenizer keeps the choice as its
            default.
        chat_template_kwargs: Further variables that the chat template reads, such as {"enable_thinking": false}.
        date: Day (such as 2026-01-31) that chat templates print as today's; not set: the day on which the run or
            folder was begun, which is kept with it.
        repeated_prompt: What to do where most answers of a file begin with their prompt: `remove` takes it off them,
            `keep` leaves it there, to be learnt and scored with the rest.
        bad_rows: What becomes of rows that cannot be used: a missing column, a null, broken JSON, an empty answer,
            messages that the chat template refuses, and the like. `drop` leaves them out and says so, but stops if
            they are more than a tenth of the file; `stop` stops at the first. Pairs of equal answers are always
            left out.
        max_length: Longest prompt and answer together; a longer answer loses its end, and its EOS.
        max_prompt_length: Longest prompt; a longer one loses its beginning.
        layout: How prompts and answers share rows in training: `packed` computes a prompt once for all its answers, and
            puts several prompts into a row; `shared` gives each prompt a row; `plain` repeats the prompt for every
            answer.
        row_length: Slots of a row where examples are packed; 0 takes those of the longest example.
        max_train_rows: Use the first so many rows of `train` only.
        max_eval_rows: Use the first so many rows of `eval` only.
    """

    train: str = path("")
    eval: str | None = path(None)
    train_split: str = "train"
    eval_split: str = "test"
    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    completion: str = "completion"
    tools: str | None = "tools"
    system: str | None = "system"
    as_chat: bool = False
    chat_template: str | None = path(None)
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    date: str | None = None
    repeated_prompt: Literal["remove", "keep"] = "remove"
    bad_rows: Literal["drop", "stop"] = "drop"
    max_length: int = 1024
    max_prompt_length: int = 512
    layout: Literal["packed", "shared", "plain"] = "packed"
    row_length: int = 0
    max_train_rows: int | None = None
    max_eval_rows: int | None = None
