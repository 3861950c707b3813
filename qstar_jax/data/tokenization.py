"""Records -> token ids. Prompt and answer are tokenised apart and joined as ids, so no token spans their boundary.

An answer ends with EOS exactly once, which counts in the loss; a truncated answer has none and says so.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from qstar_jax.config import DataOptions
from qstar_jax.data.dialogues import Messages
from qstar_jax.data.dropped import Dropped, DroppedRow
from qstar_jax.data.preferences import Record
from qstar_jax.errors import InputError


@dataclass(frozen=True)
class Response:
    """One answer as tokens.

    Args:
        ids: Token ids; the last one is EOS unless `truncated`.
        truncated: The answer lost its end, and its EOS.
    """

    ids: Int[np.ndarray, " T"]
    truncated: bool


@dataclass(frozen=True)
class Example:
    """One prompt and its answers as tokens.

    Args:
        prompt: Token ids, at least one.
        prompt_truncated: The prompt lost its beginning.
        responses: (chosen, rejected), (answer,) or ().
        row: Index of the row it came from, counted from 0.
    """

    prompt: Int[np.ndarray, " P"]
    prompt_truncated: bool
    responses: tuple[Response, ...]
    row: int


def tokenize(records: list[Record], tokenizer: Any, options: DataOptions) -> tuple[list[Example], list[Dropped]]:
    """Tokenises records and cuts them to the longest lengths allowed.

    Args:
        records: Prompts and answers, as text or chat messages.
        tokenizer: A Hugging Face tokenizer with an EOS token; with a chat template, if there are chat messages.
        options: Longest lengths, in tokens: `max_prompt_length` and `max_length` (prompt and answer together).

    Returns:
        The examples (maybe none) and the rows that were dropped, both in order.

    Raises:
        InputError: The tokenizer has no EOS or no chat template where one is needed, or the lengths leave no room.
    """
    _check_lengths(options)
    _check_tokenizer(tokenizer, any(isinstance(record.prompt, list) for record in records))
    examples, dropped = [], []
    for record in records:
        try:
            examples.append(_example(record, tokenizer, options))
        except DroppedRow as reason:
            dropped.append(Dropped(record.row, str(reason)))
    return examples, dropped


def _check_lengths(options: DataOptions) -> None:
    if options.max_prompt_length < 1:
        raise InputError(f"data.max_prompt_length is {options.max_prompt_length}; expected at least 1 token")
    if options.max_prompt_length >= options.max_length:
        raise InputError(
            f"data.max_prompt_length ({options.max_prompt_length}) leaves no room for an answer within data.max_length "
            f"({options.max_length} tokens, prompt and answer together); lower the one or raise the other"
        )


def _check_tokenizer(tokenizer: Any, chat: bool) -> None:
    if tokenizer.eos_token_id is None:
        raise InputError(
            "the tokenizer has no EOS token, so answers could not end; set `eos_token` in tokenizer_config.json"
        )
    if chat and not tokenizer.chat_template:
        raise InputError(
            "the rows are chat messages (or data.as_chat is on), but the tokenizer has no chat template; use the "
            "tokenizer of an instruction-tuned model, add chat_template.jinja to the model's folder, or give plain text"
        )


def _example(record: Record, tokenizer: Any, options: DataOptions) -> Example:
    if isinstance(record.prompt, str):
        prompt = _without_eos(tokenizer(record.prompt, verbose=False).input_ids, tokenizer)
        texts = record.responses
    else:
        prompt_text = _render(tokenizer, record.prompt, add_generation_prompt=True)
        prompt = _encode(tokenizer, prompt_text)
        texts = [_chat_answer(tokenizer, prompt_text, record.prompt + answer) for answer in record.responses]
    if not prompt:
        if tokenizer.bos_token_id is None:
            raise DroppedRow("empty prompt")
        prompt = [tokenizer.bos_token_id]
    kept = _last(prompt, options.max_prompt_length, tokenizer.bos_token_id)
    responses = tuple(_response(text, tokenizer, options.max_length - len(kept)) for text in texts)
    if len(responses) > 1 and np.array_equal(responses[0].ids, responses[1].ids):
        raise DroppedRow("the tokens of the two answers are equal within max_length")
    return Example(np.asarray(kept, np.int32), len(kept) < len(prompt), responses, record.row)


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def _without_eos(ids: list[int], tokenizer: Any) -> list[int]:
    end = len(ids)
    while end and ids[end - 1] == tokenizer.eos_token_id:
        end -= 1
    return ids[:end]


def _last(prompt: list[int], length: int, bos: int | None) -> list[int]:
    """The last tokens of a prompt, behind its BOS if it has one."""
    if len(prompt) <= length:
        return prompt
    head = prompt[:1] if prompt[0] == bos else []
    return head + prompt[len(prompt) - (length - len(head)) :]


def _response(text: str, tokenizer: Any, room: int) -> Response:
    ids = _without_eos(_encode(tokenizer, text), tokenizer)
    if tokenizer.eos_token_id in ids:  # what follows would be learnt as if an episode went on behind its end
        raise DroppedRow("EOS token inside an answer")
    truncated = len(ids) >= room
    return Response(np.asarray(ids[:room] if truncated else [*ids, tokenizer.eos_token_id], np.int32), truncated)


def _chat_answer(tokenizer: Any, prompt_text: str, messages: Messages) -> str:
    """What the chat template adds to the prompt for an answer, up to the end of the turn."""
    whole = _render(tokenizer, messages, add_generation_prompt=False)
    if not whole.startswith(prompt_text):
        raise DroppedRow("the chat template does not extend its prompt when an answer follows")
    answer, eos, rest = whole[len(prompt_text) :].rpartition(tokenizer.eos_token)
    return answer if eos and not rest.strip() else answer + eos + rest


def _render(tokenizer: Any, messages: Messages, add_generation_prompt: bool) -> str:
    import jinja2

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except jinja2.TemplateError as error:
        raise DroppedRow(f"the chat template refuses the messages ({error})") from error
