"""The `data:` block."""

from dataclasses import dataclass, field
from typing import Any, Literal

from qstar_jax.config.ranges import ranged
from qstar_jax.config.variants import path


@dataclass(frozen=True)
class DataOptions:
    r"""Where examples come from and how they become tokens.

    Args:
        train: A file: JSONL or a JSON array (.jsonl, .json), CSV (.csv, .tsv), each also .gz, Parquet or Arrow; a
            folder or a pattern ("data/*.jsonl") of such files of one kind; a folder of `save_to_disk`; or a dataset
            name on the hub.
        eval: Held-out examples, in any of the same forms; null: no evaluation.
        train_split: Split to read if `train` is a hub name, or a folder that has splits.
        eval_split: Split to read if `eval` is a hub name, or a folder that has splits.
        name: Configuration of a dataset on the hub that has several; null: its default.
        prompt: Column of the prompt (text or chat messages); files of whole dialogues need none.
        chosen: Column of the preferred response.
        rejected: Column of the other response.
        completion: Column of the response in files of single responses, or of several responses in rankings (there
            `completions`, `responses` and `answers` are known too); for supervised fine-tuning, `chosen` is read if it
            is missing.
        label: Column that says whether a single response is desirable (kto, implicit_prm).
        reward: Column of the reward of a single response (a_star, qrpo), or of the scores in rankings (a key of each
            response, or a column with a list); dots lead into nested dictionaries (annotations.honesty.Rating); null:
            the only one that can be it.
        reference_rewards: Column of the rewards that responses of the reference to the same prompt got (a_star, qrpo):
            a list, or their soft value as one number; in files without it, these are the rewards of all rows of the
            prompt.
        format: What the columns are: `pairs`, `arena`, `ranking` or `single`; null: found out.
        pairs: Which pairs rankings become: `best_worst`, `best_random` (the best and any worse one) or `all` of
            different scores; null: best_worst. plackett_luce reads whole rankings instead.
        tools: Column of the tools that the chat template shows to the model (a list of JSON schemas, or a JSON string
            of one), in files that have it; null ignores it.
        system: Column of the system message, in files that have it; it goes before the prompt's messages; null ignores
            it. In rankings it may be a key of each response (custom_system_prompt): then only responses to the same
            system message are compared.
        as_chat: Wrap a plain-text prompt as a user's message and apply the tokenizer's chat template.
        turns: Which turns of the assistant are learned and scored: `all` after the prompt, the `last`, or of the last
            only the `final_answer` (its words, without reasoning and tool calls). What users, tools and templates write
            is never learned, nor are messages with weight 0.
        chat_template: Name of one of the tokenizer's chat templates, or a file that holds one (Jinja); null: the
            tokenizer's default, or `tool_use` for dialogues with tools. A run's tokenizer keeps the choice as its
            default.
        chat_template_kwargs: Further variables that the chat template reads, such as {"enable_thinking": false}.
        date: Day (such as 2026-01-31) that chat templates print as today's; null: the day on which the run or folder
            was begun, which is stored with it.
        step_delimiter: What ends a step of a response (`qstar score --steps`) and belongs to it: a text, in which \n
            and \t stand for a line break and a tab; `re:` and a regular expression, such as `re:(?=Step [0-9]+:)`; or
            `column:` and the name of a column that lists the texts of the steps.
        repeated_prompt: What to do if most responses of a file begin with their prompt: `remove` removes it, `keep`
            keeps it, to be learned and scored with the rest.
        bad_rows: What to do with rows that cannot be used: a missing column, a null, broken JSON, an empty response,
            messages that the chat template refuses, and the like. `drop` drops and reports them, but stops if they are
            more than a tenth of the file; `stop` stops at the first. Pairs of equal responses are always dropped.
        max_length: Longest prompt and response together; a longer response is truncated and loses its EOS.
        max_prompt_length: Longest prompt; a longer one loses its beginning. null: half of `max_length`.
        layout: How prompts and responses share sequences in training: `packed` computes a prompt once for all its
            responses, and packs several prompts into a sequence; `shared` gives each prompt a sequence; `plain` repeats
            the prompt for every response.
        row_length: Slots of a packed sequence; 0: the length of the longest example.
        cache: Keep tokens on disk for the next start, in the folder of the library datasets (the environment variable
            HF_DATASETS_CACHE), under a fingerprint of all that they depend on.
        max_train_rows: Read only the first N rows of `train`.
        max_eval_rows: Read only the first N rows of `eval`.
    """

    train: str = path("")
    eval: str | None = path(None)
    train_split: str = "train"
    eval_split: str = "test"
    name: str | None = None
    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    completion: str = "completion"
    label: str = "label"
    reward: str | None = None
    reference_rewards: str = "reference_rewards"
    format: Literal["pairs", "arena", "ranking", "single"] | None = None
    pairs: Literal["best_worst", "best_random", "all"] | None = None
    tools: str | None = "tools"
    system: str | None = "system"
    as_chat: bool = False
    turns: Literal["all", "last", "final_answer"] = "all"
    chat_template: str | None = path(None)
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    date: str | None = None
    step_delimiter: str = "\\n"
    repeated_prompt: Literal["remove", "keep"] = "remove"
    bad_rows: Literal["drop", "stop"] = "drop"
    max_length: int = 1024
    max_prompt_length: int | None = None
    layout: Literal["packed", "shared", "plain"] = "packed"
    row_length: int = ranged(0, "[0, inf)")
    cache: bool = True
    max_train_rows: int | None = ranged(None, "[1, inf)")
    max_eval_rows: int | None = ranged(None, "[1, inf)")

    @property
    def prompt_limit(self) -> int:
        """Longest prompt, in tokens: `max_prompt_length`, or its default."""
        return self.max_length // 2 if self.max_prompt_length is None else self.max_prompt_length
