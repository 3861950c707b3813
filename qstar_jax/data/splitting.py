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
from qstar_jax.data.encoding import Encoded, Encoding, Span, Text
from qstar_jax.data.records import Record
from qstar_jax.data.turns import Learned, difference, find_turns, turn_of_tokens

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


def split_text(record: Record, tokenizer: Any) -> Encoding[tuple[list[int], list[Continuation]]]:
    """Tokenizes a plain-text prompt and its responses, without adding EOS; see `encoding` for the generator."""
    # The prompt keeps the ids that it has on its own.
    specials = not (tokenizer.bos_token and record.prompt.startswith(tokenizer.bos_token))
    texts = [record.prompt, *(record.prompt + text for text in record.responses)]
    encoded, *wholes = yield [Text(text, specials) for text in texts]
    # Each response takes its ids from the concatenation, unless a token would span the boundary.
    ids, responses = encoded.ids, []
    for text, whole in zip(record.responses, wholes, strict=True):
        continuation = _after(ids, len(record.prompt), whole)
        continuation = (yield from _encode_alone(text)) if continuation is None else continuation
        responses.append(Continuation(continuation, [0] * len(continuation)))
    # Some tokenizers append EOS to the prompt, but nothing follows an EOS.
    while ids and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]
    return ids, responses


def split_chat(
    record: Record, template: ChatTemplate, eos_ids: frozenset[int], learned: Learned = "all"
) -> Encoding[tuple[list[int], list[Continuation]]]:
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
        (encoded,) = yield [Text(prompt)]
        return encoded.ids, []
    # Render each whole dialogue, and find its turns.
    texts, spans = [], []
    for response in record.responses:
        text = template(record.prompt + response, record.tools)
        _check_extends(prompt, text)
        texts.append(text)
        spans.append(find_turns(record, response, template, text, learned))
        _check_rendered(record, response, template, text, learned)
    # Tokenize them, and count the tokens that end within the prompt.
    dialogues, boundaries, turns = [], [], []
    encoded = yield list(map(Text, texts))
    for text, of_text, whole in zip(texts, spans, encoded, strict=True):
        ids, offsets = whole.ids, whole.offsets
        length = _end_of_turn(ids, offsets, text, eos_ids)
        boundaries.append(len(list(takewhile(lambda offset: offset[1] <= len(prompt), offsets))))
        dialogues.append(ids[:length])
        turns.append(turn_of_tokens(dialogues[-1], offsets[:length], of_text, text, eos_ids))
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


def _encode_alone(text: str) -> Encoding[list[int]]:
    """Tokenizes a continuation, without the space that some tokenizers prepend to a text."""
    for context in _CONTEXTS:
        before, whole = yield [Text(context), Text(context + text)]
        continuation = _after(before.ids, len(context), whole)
        if continuation is not None:
            return continuation
    (alone,) = yield [Text(text)]
    return alone.ids


def _after(ids: list[int], length: int, whole: Encoded) -> list[int] | None:
    """Returns the ids after those of a text of some length in characters; None if these would change."""
    unchanged = whole.ids[: len(ids)] == ids and whole.end_of(len(ids)) <= length
    return whole.ids[len(ids) :] if unchanged else None


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
    """Returns the number of tokens without what a template writes after the end of a turn: white space, further EOS."""
    length = len(ids)
    for index in reversed(range(len(ids))):
        if ids[index] in eos_ids:
            length = index + 1
        elif text[slice(*offsets[index])].strip():
            break
    return length
