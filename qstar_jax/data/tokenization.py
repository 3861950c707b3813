"""Tokenizes records: prompt and response as one text, split where the prompt ends.

A response ends with an EOS token that counts in the loss; a truncated response has none. If a chat
template ends turns with one of the model's EOS tokens (`<|im_end|>`, say), the response ends there; otherwise the
template's ending is kept and followed by the tokenizer's EOS.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from numpy.typing import ArrayLike

from qstar_jax.config import DataOptions
from qstar_jax.data.chat_templates import ChatTemplate, check_without_chats
from qstar_jax.data.dropped import BadRow, Dropped, DroppedRow, separate
from qstar_jax.data.encoding import Encoding, encode_rows
from qstar_jax.data.records import Record
from qstar_jax.data.splitting import Continuation, split_chat, split_text
from qstar_jax.errors import InputError


@dataclass(frozen=True)
class Response:
    """One response as tokens: what follows a prompt, whoever wrote it.

    Actions are the tokens that the policy chose: they are learned, scored and counted. Attention and positions are the
    same for all tokens.

    Attributes:
        ids: Token ids, ending with EOS unless `truncated`.
        truncated: Whether the response lost its end, including EOS.
        action_mask: True at actions, False where the environment speaks (users, tools, headers of the template) and in
            turns that are not learned; None: all are actions.
        turns: Turn of the assistant, from 0, to which a token belongs; -1 where the environment speaks; None: a single
            turn.
    """

    ids: Int[np.ndarray, " T"]
    truncated: bool
    action_mask: Bool[np.ndarray, " T"] | None = None
    turns: Int[np.ndarray, " T"] | None = None

    def __post_init__(self):
        """Fills in the mask and the turns of a single turn, and checks that every token has both."""
        shape = np.shape(self.ids)
        defaults = {"action_mask": np.ones(shape, bool), "turns": np.zeros(shape, np.int32)}
        for name, default in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
            elif np.shape(getattr(self, name)) != shape:
                raise ValueError(f"{name} has shape {np.shape(getattr(self, name))}; the ids have {shape}")

    @property
    def num_actions(self) -> int:
        """Number of actions: the length of the response for everything but attention."""
        return int(self.action_mask.sum())

    @property
    def num_turns(self) -> int:
        """Number of turns that have actions."""
        return len(np.unique(self.turns[self.action_mask]))


@dataclass(frozen=True)
class Example:
    """One prompt and its responses as tokens.

    Attributes:
        prompt: Token ids, at least one.
        prompt_truncated: Whether the prompt lost its beginning.
        responses: (chosen, rejected), a ranking, (response,) or ().
        row: Index of its row, from 0.
        outcome: What was said of a single response, see `Record.outcome`.
    """

    prompt: Int[np.ndarray, " P"]
    prompt_truncated: bool
    responses: tuple[Response, ...]
    row: int
    outcome: Mapping[str, np.ndarray] = field(default_factory=dict)


def tokenize(
    records: list[Record],
    tokenizer: Any,
    options: DataOptions,
    *,
    vocabulary: int | None = None,
    eos_ids: Collection[int] = (),
    source: str = "data",
) -> tuple[list[Example], list[Dropped]]:
    """Tokenizes records and truncates them to the maximum lengths.

    Args:
        records: Prompts and responses, as text or chat messages.
        tokenizer: A fast Hugging Face tokenizer with an EOS token, and a chat template if there are chat messages.
        options: Maximum lengths in tokens, `max_prompt_length` and `max_length` (prompt and response together), and how
            to render dialogues.
        vocabulary: Size of the model's vocabulary; larger token ids are refused.
        eos_ids: EOS ids of the model, besides that of the tokenizer.
        source: Name of the data, for errors.

    Returns:
        The examples (possibly none) and the dropped rows, both in order.

    Raises:
        InputError: The tokenizer is unsuitable, the lengths leave no room, the model lacks a token, or options have no
            effect.
    """
    _check_lengths(options)
    _check_tokenizer(tokenizer)
    template = chat_template(records, tokenizer, options)
    tokens = {"vocabulary": vocabulary, "eos_ids": eos_ids, "source": source}
    return separate(tokenize_rows(records, tokenizer, options, template, **tokens))


def tokenize_rows(
    records: Iterable[Record | Dropped],
    tokenizer: Any,
    options: DataOptions,
    template: ChatTemplate | None,
    *,
    vocabulary: int | None = None,
    eos_ids: Collection[int] = (),
    source: str = "data",
) -> Iterator[Example | Dropped]:
    """Tokenizes records as they come, which need not fit in memory.

    Args:
        records: Records and dropped rows.
        tokenizer: A fast Hugging Face tokenizer.
        options: Maximum lengths.
        template: What `chat_template` found for these records.
        vocabulary: Size of the model's vocabulary; larger token ids are refused.
        eos_ids: EOS ids of the model, besides that of the tokenizer.
        source: Name of the data, for errors.

    Yields:
        For each of them, in order: an example, or why the row is dropped.
    """
    _check_lengths(options)
    _check_tokenizer(tokenizer)
    eos_ids = frozenset((tokenizer.eos_token_id, *eos_ids))

    def make_example(record: Record | Dropped) -> Encoding[Example | Dropped]:
        if isinstance(record, Dropped):
            return record
        example = yield from _make_example(record, tokenizer, template, eos_ids, options)
        if vocabulary is not None:
            for ids in (example.prompt, *(response.ids for response in example.responses)):
                check_vocabulary(ids, vocabulary, tokenizer, f"{source} row {record.row + 1}")
        return example

    yield from encode_rows(((record.row, make_example(record)) for record in records), tokenizer)


def chat_template(records: Iterable[Record | Dropped], tokenizer: Any, options: DataOptions) -> ChatTemplate | None:
    """Finds the chat template that renders the dialogues among records.

    Returns:
        The template; None if no record is a dialogue.

    Raises:
        InputError: There is no such template, or an option has no effect.
    """
    tools, has_responses, has_records = set(), False, False
    for record in records:
        if isinstance(record, Record):
            has_records = True
            if isinstance(record.prompt, list):
                tools.add(record.tools is not None)
                has_responses |= bool(record.responses)
    if tools:
        if options.turns != DataOptions.turns and not has_responses:
            raise InputError(
                f"data.turns {options.turns} has no effect on prompts, which have no responses; remove the option"
            )
        return ChatTemplate.find(tokenizer, options, tools)
    if has_records:
        check_without_chats(options)
    return None


def resolve_date(options: DataOptions, records: list[Record], tokenizer: Any) -> DataOptions:
    """Sets `options.date` to today if it is unset and the chat template prints a date, so that a run keeps its date."""
    return with_date(options, chat_template(records, tokenizer, options))


def with_date(options: DataOptions, template: ChatTemplate | None) -> DataOptions:
    """Does what `resolve_date` does, with the template that was found."""
    if template is None or options.date is not None or not template.prints_date:
        return options
    return replace(options, date=datetime.now().date().isoformat())


def check_vocabulary(ids: ArrayLike, vocabulary: int, tokenizer: Any, where: str, model: str = "the model") -> None:
    """Checks that a model has embeddings for token ids; `where` names what holds the ids, for the error.

    Raises:
        InputError: An id is not below `vocabulary`.
    """
    largest = int(np.max(ids))
    if largest >= vocabulary:
        raise InputError(
            f"{where}: the token {tokenizer.convert_ids_to_tokens(largest)!r} has id {largest}, but {model} has only "
            f"{vocabulary} tokens; resize its embedding, or use its own tokenizer"
        )


def _check_lengths(options: DataOptions) -> None:
    if options.max_length < 2:
        raise InputError(f"data.max_length is {options.max_length}; expected at least 2 tokens, of prompt and response")
    if options.prompt_limit < 1:
        raise InputError(f"data.max_prompt_length is {options.prompt_limit}; expected at least 1 token")
    if options.prompt_limit >= options.max_length:
        raise InputError(
            f"data.max_prompt_length ({options.prompt_limit}) leaves no room for a response within "
            f"data.max_length ({options.max_length} tokens, prompt and response together); lower the former or raise "
            "the latter"
        )


def _check_tokenizer(tokenizer: Any) -> None:
    if tokenizer.eos_token_id is None:
        raise InputError(
            "the tokenizer has no EOS token, so responses could not end; set `eos_token` in tokenizer_config.json"
        )
    if not tokenizer.is_fast:
        raise InputError(
            f"{type(tokenizer).__name__} is a slow tokenizer, which does not return the offsets of its tokens; "
            "expected a fast one (a folder with tokenizer.json)"
        )


def _make_example(
    record: Record, tokenizer: Any, template: ChatTemplate | None, eos_ids: frozenset[int], options: DataOptions
) -> Encoding[Example]:
    # Tokenize prompt and responses together, then split them.
    if isinstance(record.prompt, str):
        prompt, continuations = yield from split_text(record, tokenizer)
    else:
        template = template.with_variables(record.template_kwargs)
        prompt, continuations = yield from split_chat(record, template, eos_ids, options.turns)
    # The first token of a response must be predicted from something.
    if not prompt:
        if tokenizer.bos_token_id is None:
            raise BadRow("empty prompt", ", and the tokenizer has no BOS token to use instead")
        prompt = [tokenizer.bos_token_id]
    # Truncate the prompt first, then the responses to the remaining room.
    truncated_prompt = _truncate_prompt(prompt, options.prompt_limit, tokenizer.bos_token_id)
    room = options.max_length - len(truncated_prompt)
    end = [] if record.open_end else [tokenizer.eos_token_id]
    responses = tuple(_make_response(continuation, end, eos_ids, room) for continuation in continuations)
    if len(responses) > 1 and np.array_equal(responses[0].ids, responses[1].ids):
        raise DroppedRow("the tokens of the two responses are equal within max_length")
    prompt_truncated = len(truncated_prompt) < len(prompt)
    return Example(np.asarray(truncated_prompt, np.int32), prompt_truncated, responses, record.row, record.outcome)


def _truncate_prompt(prompt: list[int], length: int, bos: int | None) -> list[int]:
    """Keeps the last tokens of a prompt, and its BOS if it has one."""
    if len(prompt) <= length:
        return prompt
    head = prompt[:1] if prompt[0] == bos else []
    return head + prompt[len(prompt) - (length - len(head)) :]


def _make_response(continuation: Continuation, end: list[int], eos_ids: frozenset[int], room: int) -> Response:
    # Strip all EOS tokens at the end.
    ids, turns = continuation.ids, continuation.turns
    length = len(ids)
    while length and ids[length - 1] in eos_ids:
        length -= 1
    # Any other inside a turn would teach the model to continue after the end of its turn.
    last_turn = max(turns, default=0)
    if not eos_ids.isdisjoint(ids[:length]):
        inside = zip(ids, turns, turns[1:length], strict=False)
        if any(token in eos_ids for token, turn, following in inside if turn == following >= 0):
            raise DroppedRow("EOS token inside a response")
    # End with the first EOS that was stripped, or that of the tokenizer, if there is room for it; steps have no end.
    end = end and (ids[length : length + 1] or end)
    truncated = length + len(end) > room
    ids, turns = ids[:length] + end, np.asarray(turns[:length] + [last_turn] * len(end), np.int32)[:room]
    # What the environment says after the last action within max_length does not matter.
    actions = np.flatnonzero(turns >= 0)
    if not len(actions):
        raise DroppedRow("no token of the assistant within max_length")
    length = actions[-1] + 1
    turns = turns[:length]
    return Response(np.asarray(ids[:length], np.int32), truncated or not end, turns >= 0, turns)
