"""Finds the assistant's turns in a rendered dialogue: where each begins and ends, in characters.

A turn is the difference between two rendered prefixes of a dialogue: the messages before it, with the header of the
assistant's turn, and the messages up to it. Both must begin the whole text; otherwise the model would learn its turns
in contexts that it never sees. Where a template rewrites earlier turns, its `{% generation %}` spans say what the
assistant writes; one without such spans is refused.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Literal

from qstar_jax.data.chat_templates import ChatTemplate
from qstar_jax.data.columns import Messages
from qstar_jax.data.dropped import BadRow, DroppedRow
from qstar_jax.data.records import Record

Learned = Literal["all", "last", "final_answer"]
Span = tuple[int, int]
ENVIRONMENT = -1  # turn of tokens that are no actions
_EXCERPT = 40  # characters of a text to quote in errors
_REASONING_END = "</think>"


def find_turns(record: Record, response: Messages, template: ChatTemplate, text: str, learned: Learned) -> list[Span]:
    """Finds the turns to be learned.

    Args:
        record: The dialogue up to the response.
        response: The messages after it; the last one is the assistant's.
        template: Renders them.
        text: The whole dialogue as rendered.
        learned: Which turns: all of the response, the last, or of the last only the final answer: its words, without
            reasoning and tool calls.

    Returns:
        Start and end of each turn, in order.

    Raises:
        BadRow: The template does not show where the turns are, or there is no final answer.
    """
    messages, tools = record.prompt + response, record.tools
    turns = [i for i in range(len(record.prompt), len(messages)) if messages[i]["role"] == "assistant"]
    turns = turns if learned == "all" else turns[-1:]
    try:
        spans = [_difference(messages, turn, tools, template, text) for turn in turns]
    except BadRow:
        marked = _marked(messages, tools, template, text)
        if marked is None:
            raise
        spans = [_without_header(messages[:turn], marked[turn], tools, template, text) for turn in turns]
    return spans if learned != "final_answer" else [_final_answer(messages[-1], spans[-1], text)]


def _difference(messages: Messages, turn: int, tools: list[dict] | None, template: ChatTemplate, text: str) -> Span:
    """Start and end of message number `turn`: between the prefix that opens it and the one that ends with it."""
    opened = template(messages[:turn], tools, open_turn=True)
    closed = text if turn + 1 == len(messages) else template(messages[: turn + 1], tools)
    # Some templates strip white space at the end of a dialogue only.
    closed = closed if text.startswith(closed) else closed.rstrip()
    for prefix in (opened, closed):
        _check_begins(text, prefix)
    if not closed.startswith(opened):
        _check_begins(closed, opened)
    return len(opened), len(closed)


def _check_begins(text: str, prefix: str):
    if text.startswith(prefix):
        return
    at = next((at for at, both in enumerate(zip(prefix, text, strict=False)) if both[0] != both[1]), len(text))
    before, alone, followed = prefix[max(at - _EXCERPT, 0) : at], prefix[at : at + _EXCERPT], text[at : at + _EXCERPT]
    raise BadRow(
        "the chat template rewrites a turn of the assistant when another follows",
        f" (after {before!r} it first has {alone!r}, and later {followed!r}); learn the last turn only with "
        "--data.turns last, or name a template that keeps earlier turns, or marks them with {% generation %}, with "
        "--data.chat_template FILE",
    )


def _marked(messages: Messages, tools: list[dict] | None, template: ChatTemplate, text: str) -> dict[int, Span] | None:
    """Spans that the template marks with `{% generation %}`, by message; None if it does not mark every turn."""
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    rendered, spans = template.generation_spans(messages, tools)
    if rendered != text or len(spans) != len(turns):
        return None
    words = ["".join(messages[turn]["content"].split()) for turn in turns]
    shown = ["".join(text[start:end].split()) for start, end in spans]
    if not all(word in span for word, span in zip(words, shown, strict=True)):
        return None
    return dict(zip(turns, spans, strict=True))


def _without_header(before: Messages, span: Span, tools: list[dict] | None, template: ChatTemplate, text: str) -> Span:
    """Leaves out the header of the assistant's turn, which some templates mark too."""
    opened = template(before, tools, open_turn=True)
    return (max(span[0], len(opened)) if text.startswith(opened) else span[0]), span[1]


def _final_answer(message: dict, span: Span, text: str) -> Span:
    words = message["content"].rpartition(_REASONING_END)[2].strip()
    if not words:
        raise BadRow(
            "the last turn has no final answer", ", only reasoning or tool calls; --data.turns last learns them"
        )
    start = text.rfind(words, *span)
    if start < 0:
        raise BadRow("the chat template does not render the final answer as it is", f" ({words[:_EXCERPT]!r})")
    return start, span[1]


def turn_of_tokens(
    ids: Sequence[int], offsets: Sequence[Span], spans: Sequence[Span], text: str, eos_ids: frozenset[int]
) -> list[int]:
    """Finds the turn to which each token of a dialogue belongs; -1 outside of all turns.

    A token that covers a part of a turn belongs to it. A turn ends with its first EOS, even where the template counts
    that token to the next message; white space after it is the template's.

    Args:
        ids: Tokens of the dialogue; its last turn reaches up to their end.
        offsets: Where each begins and ends in the text, in characters.
        spans: The turns.
        text: The dialogue as rendered.
        eos_ids: Tokens that end a turn.

    Raises:
        DroppedRow: EOS inside a turn, which would teach the model to continue after its end.
    """
    starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
    turns = [ENVIRONMENT] * len(ids)
    for number, (start, end) in enumerate(spans):
        first, stop = bisect_right(ends, start), bisect_left(starts, end)
        if number + 1 == len(spans):
            stop = len(ids)
        elif (last := _last(ids[first:stop], eos_ids)) is not None:
            # Leave the template's white space after the end, and further EOS, to the environment.
            last += first
            stop = stop if text[ends[last] : end].strip() else last + 1
            while stop - first > 1 and ids[stop - 1] in eos_ids and ids[stop - 2] in eos_ids:
                stop -= 1
            if not eos_ids.isdisjoint(ids[first : stop - 1]):
                raise DroppedRow("EOS token inside a response")
        elif stop < len(ids) and ids[stop] in eos_ids:
            stop += 1
        turns[first:stop] = [number] * (stop - first)
    return turns


def _last(ids: Sequence[int], eos_ids: frozenset[int]) -> int | None:
    return max((index for index, token in enumerate(ids) if token in eos_ids), default=None)
