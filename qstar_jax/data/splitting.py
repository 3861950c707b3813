"""Tokenizes a prompt together with its responses, and splits the ids where the prompt ends.

Chats: the whole dialogue is rendered and tokenized at once, so that prompt and response together have exactly the ids
of the rendered text, with any tokenizer. A token that spans the end of the prompt, or that the responses of a pair do
not share, belongs to the responses; the prompt ends before it.

Plain text: prompt and response are concatenated and tokenized at once, but the prompt keeps the ids that it has on its
own, as in generation. So no token spans the boundary: where one would, the response is tokenized separately, without
the space that some tokenizers prepend to a text. A prompt that begins with BOS does not get a second one.
"""

from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from qstar_jax.data.chat_templates import ChatTemplate
from qstar_jax.data.columns import Messages
from qstar_jax.data.dropped import BadRow
from qstar_jax.data.records import Record
from qstar_jax.data.turns import Learned, Span, difference, find_turns, turn_of_tokens

_CONTEXTS = ("\n", "a", ".")  # the beginning of a text does not merge with at least one of these


@dataclass(frozen=True)
class Continuation:
    """What follows a prompt.

    Attributes:
        ids: Its tokens.
        turns: Turn of the assistant to which each belongs, from 0; -1 where the environment speaks.
    """

    ids: list[int]
    turns: list[int]


def split_text(record: Record, tokenizer: Any) -> tuple[list[int], list[Continuation]]:
    """Tokenizes a plain-text prompt and its responses, without adding EOS."""
    # The prompt keeps the ids that it has on its own.
    specials = not (tokenizer.bos_token and record.prompt.startswith(tokenizer.bos_token))
    ids, _ = _encode(tokenizer, record.prompt, specials=specials)
    # Each response takes its ids from the concatenation, unless a token would span the boundary.
    responses = []
    for text in record.responses:
        continuation = _encode_after(ids, record.prompt, text, tokenizer, specials=specials)
        continuation = _encode_alone(text, tokenizer) if continuation is None else continuation
        responses.append(Continuation(continuation, [0] * len(continuation)))
    # Some tokenizers append EOS to the prompt, but nothing follows an EOS.
    while ids and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids, responses


def split_chat(
    record: Record, tokenizer: Any, template: ChatTemplate, eos_ids: frozenset[int], learned: Learned = "all"
) -> tuple[list[int], list[Continuation]]:
    """Tokenizes the prompt of a dialogue, including the header of the assistant's turn, and its responses.

    Of these, only the turns that are to be learned count as the assistant's.

    Raises:
        BadRow: The template refuses the dialogue, omits a part of it, renders the prompt differently when a response
            follows, or does not show where the assistant's turns are.
        DroppedRow: EOS inside a turn.
    """
    prompt = template(record.prompt, record.tools, open_turn=True)
    if not record.responses:
        _check_rendered(record, [], template, prompt, learned)
        return _encode(tokenizer, prompt)[0], []
    # Render and tokenize each whole dialogue, and count its tokens that end within the prompt.
    dialogues, boundaries, turns = [], [], []
    for response in record.responses:
        text = template(record.prompt + response, record.tools)
        _check_extends(prompt, text)
        spans = find_turns(record, response, template, text, learned)
        _check_rendered(record, response, template, text, learned)
        ids, offsets = _encode(tokenizer, text)
        length = _end_of_turn(ids, offsets, text, eos_ids)
        boundaries.append(len(list(takewhile(lambda offset: offset[1] <= len(prompt), offsets))))
        dialogues.append(ids[:length])
        turns.append(turn_of_tokens(dialogues[-1], offsets[:length], spans, text, eos_ids))
    # The prompt is what all dialogues share.
    shared = min(boundaries)
    while any(ids[:shared] != dialogues[0][:shared] for ids in dialogues):
        shared -= 1
    # Its last tokens, if the responses do not share them, belong to the first turn.
    for of_tokens, boundary in zip(turns, boundaries, strict=True):
        if of_tokens[boundary : boundary + 1] == [0]:
            of_tokens[shared:boundary] = [0] * (boundary - shared)
    responses = zip(dialogues, turns, strict=True)
    return dialogues[0][:shared], [Continuation(ids[shared:], of_tokens[shared:]) for ids, of_tokens in responses]


def _encode(tokenizer: Any, text: str, *, specials: bool = False) -> tuple[list[int], list[Span]]:
    """Returns the token ids of a text and where each begins and ends in it, in characters; `specials` prepends BOS.

    Tokens that some tokenizers append to a text ([SEP], say) are dropped: a response or EOS follows instead.
    """
    encoding = tokenizer(text, add_special_tokens=specials, return_offsets_mapping=True, verbose=False)
    ids, offsets = encoding.input_ids, encoding.offset_mapping
    bos_only = int(ids[:1] == [tokenizer.bos_token_id])  # the length if the text has no token
    of_text = (i + 1 for i, sequence in enumerate(encoding.sequence_ids(0)) if sequence is not None)
    length = max(of_text, default=bos_only)
    return ids[:length], offsets[:length]


def _encode_alone(text: str, tokenizer: Any) -> list[int]:
    """Tokenizes a continuation, without the space that some tokenizers prepend to a text."""
    for context in _CONTEXTS:
        continuation = _encode_after(_encode(tokenizer, context)[0], context, text, tokenizer)
        if continuation is not None:
            return continuation
    return _encode(tokenizer, text)[0]


def _encode_after(
    ids: list[int], before: str, text: str, tokenizer: Any, *, specials: bool = False
) -> list[int] | None:
    """Tokenizes a text after another one with these ids; None if the ids of that one would change."""
    whole, offsets = _encode(tokenizer, before + text, specials=specials)
    unchanged = whole[: len(ids)] == ids and max((end for _, end in offsets[: len(ids)]), default=0) <= len(before)
    return whole[len(ids) :] if unchanged else None


def _check_extends(prompt: str, text: str):
    if text.startswith(prompt):
        return
    before, alone, followed = difference(prompt, text)
    raise BadRow(
        "the chat template renders the prompt differently when a response follows",
        f" (after {before!r} the prompt alone has {alone!r}, and with the response {followed!r}); choose another "
        "template with --data.chat_template, or other arguments with --data.chat_template_kwargs",
    )


def _check_rendered(record: Record, response: Messages, template: ChatTemplate, text: str, learned: Learned):
    # Reasoning of earlier turns, which many templates omit, may be missing where these are not learned.
    first = 0 if learned == "all" else max(len(response) - 1, 0)
    earlier, response = record.prompt + response[:first], response[first:]
    if omitted := template.omitted(earlier, response, record.tools, text):
        fix = "; choose one that renders them with --data.chat_template"
        fix += ", or drop the column with --data.tools null" if omitted == "tools" else ""
        raise BadRow(f"the chat template omits {omitted}", fix)


def _end_of_turn(ids: list[int], offsets: list[Span], text: str, eos_ids: frozenset[int]) -> int:
    """Returns the number of tokens without the white space that a template writes after the end of a turn."""
    last = max((index for index, token in enumerate(ids) if token in eos_ids), default=None)
    return len(ids) if last is None or text[offsets[last][1] :].strip() else last + 1
