"""Records -> token ids: those of prompt and answer as one text, cut where the prompt ends.

Chats: the whole dialogue is rendered and tokenised at once, so prompt and answer together have the ids that the
template's own tokenisation gives, whatever the tokenizer. A token that spans the end of the prompt, or that the answers
of a pair do not share, belongs to the answers; the prompt ends before it.

Plain text: prompt and answer are joined as they stand, and tokenised at once, but the prompt keeps the ids that it has
alone, which are those from which an answer will be generated. So no token spans the boundary: where one would, the
answer's ids are those that it has apart, without the space that some tokenizers put in front of a text. A prompt that
begins with BOS gets no other one.

An answer ends exactly once, with EOS, which counts in the loss; a truncated answer has none and says so. What follows
the first token of a chat's end that ends answers for the model (`<|im_end|>`, say, in a list of EOS ids) is left out.
Where a template ends turns by something else, that is kept, and EOS follows.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import takewhile
from typing import Any

import numpy as np
from jaxtyping import Int
from numpy.typing import ArrayLike

from qstar_jax.config import DataOptions
from qstar_jax.data.chat_templates import ChatTemplate, check_without_chats
from qstar_jax.data.dropped import BadRow, Dropped, DroppedRow, sift
from qstar_jax.data.records import Record
from qstar_jax.errors import InputError

_NEIGHBOURS = ("\n", "a", ".")  # with one of them a text's beginning does not merge


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
        prompt, answers = _split_text(record, tokenizer)
    else:
        prompt, answers = _split_chat(record, tokenizer, template, eos_ids)
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


def _encode(tokenizer: Any, text: str, *, specials: bool = False) -> tuple[list[int], list[int]]:
    """Token ids of a text, and where each ends in it, in characters; `specials` puts BOS before it.

    What some tokenizers put behind a text ([SEP], say) is left out: an answer follows there, or its own end.
    """
    found = tokenizer(text, add_special_tokens=specials, return_offsets_mapping=True, verbose=False)
    ids, ends = found.input_ids, [end for _, end in found.offset_mapping]
    begun = int(ids[:1] == [tokenizer.bos_token_id])  # of a text without any token
    text_ends = max((place + 1 for place, of in enumerate(found.sequence_ids(0)) if of is not None), default=begun)
    return ids[:text_ends], ends[:text_ends]


def _split_text(record: Record, tokenizer: Any) -> tuple[list[int], list[list[int]]]:
    specials = not (tokenizer.bos_token and record.prompt.startswith(tokenizer.bos_token))
    ids, _ = _encode(tokenizer, record.prompt, specials=specials)
    answers = []
    for text in record.responses:
        found = _behind(ids, record.prompt, text, tokenizer, specials=specials)
        answers.append(_apart(text, tokenizer) if found is None else found)
    while ids and ids[-1] == tokenizer.eos_token_id:  # nothing is said behind an end
        ids.pop()
    return ids, answers


def _apart(text: str, tokenizer: Any) -> list[int]:
    """Token ids of a text that goes on, without the space that some tokenizers put in front of the first one."""
    for before in _NEIGHBOURS:
        found = _behind(_encode(tokenizer, before)[0], before, text, tokenizer)
        if found is not None:
            return found
    return _encode(tokenizer, text)[0]


def _behind(ids: list[int], before: str, text: str, tokenizer: Any, *, specials: bool = False) -> list[int] | None:
    """Token ids of a text behind another one; None where this does not keep the ids that it has alone."""
    whole, ends = _encode(tokenizer, before + text, specials=specials)
    kept = whole[: len(ids)] == ids and max(ends[: len(ids)], default=0) <= len(before)
    return whole[len(ids) :] if kept else None


def _split_chat(
    record: Record, tokenizer: Any, template: ChatTemplate, eos_ids: frozenset[int]
) -> tuple[list[int], list[list[int]]]:
    prompt = template(record.prompt, record.tools, answer_next=True)
    _check_place(record, template)
    if not record.responses:
        return _encode(tokenizer, prompt)[0], []
    dialogues, boundaries = [], []
    for answer in record.responses:
        text = template(record.prompt + answer, record.tools)
        if not text.startswith(prompt):
            raise BadRow("the chat template does not extend its prompt when an answer follows")
        ids, ends = _encode(tokenizer, text)
        boundaries.append(len(list(takewhile(lambda end: end <= len(prompt), ends))))
        dialogues.append(ids[: _end_of_turn(ids, ends, text, eos_ids)])
    shared = min(boundaries)
    while any(ids[:shared] != dialogues[0][:shared] for ids in dialogues):
        shared -= 1
    return dialogues[0][:shared], [ids[shared:] for ids in dialogues]


def _check_place(record: Record, template: ChatTemplate):
    for messages in [record.prompt + answer for answer in record.responses] or [record.prompt]:
        if lost := template.lost(messages, record.tools):
            fix = "; choose one that shows them by --data.chat_template"
            fix += ", or leave the column out with --data.tools null" if lost == "tools" else ""
            raise BadRow(f"the chat template has no place for {lost}", fix)


def _end_of_turn(ids: list[int], ends: list[int], text: str, eos_ids: frozenset[int]) -> int:
    """How many tokens there are without the white space that a template writes behind the end of a turn."""
    last = max((index for index, token in enumerate(ids) if token in eos_ids), default=None)
    return len(ids) if last is None or text[ends[last] :].strip() else last + 1


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
