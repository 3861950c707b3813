"""Records -> token ids: those of prompt and answer as one text, cut where the prompt ends.

An answer ends exactly once, with EOS, which counts in the loss; a truncated answer has none and says so. What follows
the first token of a chat's end that ends answers for the model (`<|im_end|>`, say, in a list of EOS ids) is left out.
Where a template ends turns by something else, that is kept, and EOS follows.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import numpy as np
from jaxtyping import Int
from numpy.typing import ArrayLike

from qstar_jax.config import DataOptions
from qstar_jax.data.chat_templates import ChatTemplate, check_without_chats
from qstar_jax.data.dropped import BadRow, Dropped, DroppedRow, sift
from qstar_jax.data.records import Record
from qstar_jax.data.splitting import split_chat, split_text
from qstar_jax.errors import InputError


@dataclass(frozen=True)
class Response:
    """One answer as tokens.

    Args:
        ids: Token ids; the last one ends the answer (see `tokenize`) unless `truncated`.
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


def tokenize(
    records: list[Record],
    tokenizer: Any,
    options: DataOptions,
    *,
    vocabulary: int | None = None,
    eos_ids: Collection[int] = (),
    source: str = "data",
) -> tuple[list[Example], list[Dropped]]:
    """Tokenises records and cuts them to the longest lengths allowed.

    Args:
        records: Prompts and answers, as text or chat messages.
        tokenizer: A fast Hugging Face tokenizer with an EOS token; with a chat template, if there are chat messages.
        options: Longest lengths, in tokens: `max_prompt_length` and `max_length` (prompt and answer together); how
            dialogues are rendered.
        vocabulary: Rows of the model's embedding; token ids beyond it are refused.
        eos_ids: Tokens that end an answer of the model, beside the tokenizer's EOS.
        source: Name of the data, for errors.

    Returns:
        The examples (maybe none) and the rows that were dropped, both in order.

    Raises:
        InputError: The tokenizer cannot do what is needed, the lengths leave no room, a token is none of the model's,
            or options have no effect.
    """
    _check_lengths(options)
    _check_tokenizer(tokenizer)
    template = chat_template(records, tokenizer, options)
    eos_ids = frozenset((tokenizer.eos_token_id, *eos_ids))

    def example(record: Record) -> Example:
        found = _example(record, tokenizer, template, eos_ids, options)
        if vocabulary is not None:
            for ids in (found.prompt, *(response.ids for response in found.responses)):
                check_known(ids, vocabulary, tokenizer, f"{source} row {record.row + 1}")
        return found

    return sift(((record.row, record) for record in records), example)


def chat_template(records: list[Record], tokenizer: Any, options: DataOptions) -> ChatTemplate | None:
    """Finds what renders the dialogues among records.

    Args:
        records: Prompts and answers, as text or chat messages.
        tokenizer: A Hugging Face tokenizer.
        options: `chat_template`, `chat_template_kwargs` and `date` are read.

    Returns:
        The template; None where no record is a dialogue.

    Raises:
        InputError: There is no such template, or an option has no effect.
    """
    chats = [record for record in records if isinstance(record.prompt, list)]
    if chats:
        return ChatTemplate.find(tokenizer, options, {record.tools is not None for record in chats})
    if records:
        check_without_chats(options)
    return None


def settle_date(options: DataOptions, records: list[Record], tokenizer: Any) -> DataOptions:
    """Writes today's date into options that name none, where a chat template prints it: from now on it is that day."""
    template = chat_template(records, tokenizer, options)
    if template is None or options.date is not None or not template.prints_date:
        return options
    return replace(options, date=datetime.now().date().isoformat())


def check_known(ids: ArrayLike, vocabulary: int, tokenizer: Any, where: str, model: str = "the model") -> None:
    """Refuses token ids for which a model has no embedding.

    Args:
        ids: Token ids, at least one.
        vocabulary: Rows of the model's embedding.
        tokenizer: Of these ids.
        where: What holds them, for the error.
        model: Who does not know them, for the error.

    Raises:
        InputError: One of them is at or beyond `vocabulary`.
    """
    worst = int(np.max(ids))
    if worst >= vocabulary:
        raise InputError(
            f"{where}: the token {tokenizer.convert_ids_to_tokens(worst)!r} has id {worst}, and {model} knows "
            f"{vocabulary} tokens only (ids below that); resize its embedding, or use its own tokenizer"
        )


def _check_lengths(options: DataOptions) -> None:
    if options.max_prompt_length < 1:
        raise InputError(f"data.max_prompt_length is {options.max_prompt_length}; expected at least 1 token")
    if options.max_prompt_length >= options.max_length:
        raise InputError(
            f"data.max_prompt_length ({options.max_prompt_length}) leaves no room for an answer within data.max_length "
            f"({options.max_length} tokens, prompt and answer together); lower the one or raise the other"
        )


def _check_tokenizer(tokenizer: Any) -> None:
    if tokenizer.eos_token_id is None:
        raise InputError(
            "the tokenizer has no EOS token, so answers could not end; set `eos_token` in tokenizer_config.json"
        )
    if not tokenizer.is_fast:
        raise InputError(
            f"{type(tokenizer).__name__} is a slow tokenizer, which does not tell where its tokens lie in a text; "
            "expected a fast one (a folder with tokenizer.json)"
        )


def _example(
    record: Record, tokenizer: Any, template: ChatTemplate | None, eos_ids: frozenset[int], options: DataOptions
) -> Example:
    if isinstance(record.prompt, str):
        prompt, answers = split_text(record, tokenizer)
    else:
        prompt, answers = split_chat(record, tokenizer, template, eos_ids)
    if not prompt:
        if tokenizer.bos_token_id is None:
            raise BadRow("empty prompt", ", and the tokenizer has no BOS token to stand for it")
        prompt = [tokenizer.bos_token_id]
    kept = _last(prompt, options.max_prompt_length, tokenizer.bos_token_id)
    room = options.max_length - len(kept)
    responses = tuple(_response(ids, tokenizer.eos_token_id, eos_ids, room) for ids in answers)
    if len(responses) > 1 and np.array_equal(responses[0].ids, responses[1].ids):
        raise DroppedRow("the tokens of the two answers are equal within max_length")
    return Example(np.asarray(kept, np.int32), len(kept) < len(prompt), responses, record.row)


def _last(prompt: list[int], length: int, bos: int | None) -> list[int]:
    """The last tokens of a prompt, behind its BOS if it has one."""
    if len(prompt) <= length:
        return prompt
    head = prompt[:1] if prompt[0] == bos else []
    return head + prompt[len(prompt) - (length - len(head)) :]


def _response(ids: list[int], eos: int, eos_ids: frozenset[int], room: int) -> Response:
    length = len(ids)
    while length and ids[length - 1] in eos_ids:
        length -= 1
    if not eos_ids.isdisjoint(ids[:length]):  # what follows would be learnt as if an episode went on behind its end
        raise DroppedRow("EOS token inside an answer")
    end = ids[length : length + 1] or [eos]
    truncated = length >= room
    return Response(np.asarray(ids[:room] if truncated else ids[:length] + end, np.int32), truncated)
