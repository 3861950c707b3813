"""Finds the assistant's turns in a rendered dialogue: where each begins and ends, in characters.

A turn is the difference between two rendered prefixes of a dialogue: the messages before it, with the header of the
assistant's turn, and the messages up to it. Both must begin the whole text: the first, or the model would learn its
turns in contexts that it never sees, and the second, or it would learn other words than it says. Where a template
rewrites a turn once another follows, its `{% generation %}` spans say what is to be learned; one without such spans is
refused.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Literal

from qstar_jax.data.chat_templates import ChatTemplate
from qstar_jax.data.columns import WEIGHT, Messages
from qstar_jax.data.dropped import BadRow, DroppedRow
from qstar_jax.data.encoding import Span
from qstar_jax.data.records import Record

Learned = Literal["all", "last", "final_answer"]
ENVIRONMENT = -1  # turn of tokens that are no actions
_EXCERPT = 40  # characters of a text to quote in errors
_REASONING_END = "</think>"
_MARK = "\u2063"  # an invisible separator, which no text needs


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
        Start and end of each turn, in order; without those of weight 0.

    Raises:
        BadRow: The template does not show where the turns are, or there is no final answer.
    """
    messages, tools = record.prompt + response, record.tools
    turns = [i for i in range(len(record.prompt), len(messages)) if messages[i]["role"] == "assistant"]
    if not messages[turns[-1]].get(WEIGHT, 1):
        raise BadRow("the last turn of the assistant has weight 0", "; end the dialogue with one to be learned")
    turns = [turn for turn in turns if messages[turn].get(WEIGHT, 1)] if learned == "all" else turns[-1:]
    way_out = "learn the last turn only with --data.turns last, or " if learned == "all" else ""
    starts = [_start(messages[:turn], tools, template, text, way_out) for turn in turns]
    try:
        ends = [_end(messages[: turn + 1], tools, template, text) for turn in turns[:-1]] + [len(text)]
    except _Rewritten as change:
        marked = _marked(messages, tools, template, text)
        if marked is None:
            raise BadRow(
                "the chat template rewrites a turn of the assistant when another follows",
                f" ({change}); {way_out}name a template that keeps earlier turns, or marks them with "
                "{% generation %}, with --data.chat_template FILE",
            ) from change
        # Leave out the header of the assistant's turn, which some templates mark too.
        starts = [max(start, marked[turn][0]) for start, turn in zip(starts, turns, strict=True)]
        ends = [marked[turn][1] for turn in turns]
    spans = list(zip(starts, ends, strict=True))
    return spans if learned != "final_answer" else [_final_answer(messages, tools, template, text, spans[-1])]


class _Rewritten(Exception):
    """A prefix of the dialogue does not begin its text; says where they differ."""


def _start(before: Messages, tools: list[dict] | None, template: ChatTemplate, text: str, way_out: str) -> int:
    """Where generation begins a turn, after the messages before it."""
    opened = template(before, tools, open_turn=True)
    if not text.startswith(opened):
        raise BadRow(
            "the chat template rewrites what comes before a turn of the assistant when this follows",
            f" ({_change(opened, text)}); {way_out}name a template that keeps it with --data.chat_template FILE",
        )
    return len(opened)


def _end(dialogue: Messages, tools: list[dict] | None, template: ChatTemplate, text: str) -> int:
    """Where a dialogue ends that ends with a turn."""
    closed = template(dialogue, tools)
    # Some templates strip white space, or write EOS, at the end of a dialogue only.
    for prefix in (closed, closed.rstrip(), closed.removesuffix(template.tokenizer.eos_token)):
        if text.startswith(prefix):
            return len(prefix)
    raise _Rewritten(_change(closed, text))


def _change(prefix: str, text: str) -> str:
    before, first, later = difference(prefix, text)
    return f"after {before!r} it first has {first!r}, and later {later!r}"


def difference(prefix: str, text: str) -> tuple[str, str, str]:
    """Excerpts of a text that a prefix does not begin: what both share, then what each has instead of the other."""
    differ = (at for at, (one, other) in enumerate(zip(prefix, text, strict=False)) if one != other)
    shared = next(differ, len(text))
    return prefix[max(shared - _EXCERPT, 0) : shared], *(part[shared : shared + _EXCERPT] for part in (prefix, text))


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


def _final_answer(messages: Messages, tools: list[dict] | None, template: ChatTemplate, text: str, span: Span) -> Span:
    """Where the words of the last turn begin, and the turn ends."""
    content = messages[-1]["content"].rstrip()
    words = content.rpartition(_REASONING_END)[2].strip()
    if not words:
        raise BadRow(
            "the last turn has no final answer", ", only reasoning or tool calls; --data.turns last learns them"
        )
    # Words may occur in their own end, as "im_end" does in <|im_end|>; it is what follows a mark behind the words.
    last = {key: value for key, value in messages[-1].items() if key != "tool_calls"} | {"content": content + _MARK}
    end = template([*messages[:-1], last], tools).rpartition(_MARK)[2]
    before = text.removesuffix(end).rstrip()
    start = len(before) - len(words)
    if not (text.endswith(end) and before.endswith(words) and start >= span[0]):
        raise BadRow(
            "the chat template does not render the final answer as the end of the last turn",
            f" ({words[:_EXCERPT]!r}); --data.turns last learns the turn",
        )
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
        BadRow: The last turn ends with EOS, but an earlier one does not, so that the model would not learn to stop.
        DroppedRow: EOS inside a turn, which would teach the model to continue after its end.
    """
    starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
    turns = [ENVIRONMENT] * len(ids)
    for number, (start, end) in enumerate(spans):
        first, stop = bisect_right(ends, start), bisect_left(starts, end)
        if number + 1 == len(spans):
            stop = len(ids)
        else:
            stop = _end_of_turn(ids, ends, first, stop, text[:end], eos_ids)
            if ids[-1] in eos_ids and ids[stop - 1] not in eos_ids:
                excerpt = text[max(end - _EXCERPT, 0) : end + _EXCERPT]
                raise BadRow(
                    "the chat template ends earlier turns of the assistant with another token than the last",
                    f" ({excerpt!r} has no EOS of the model); learn the last turn only with --data.turns last, or name "
                    "a template that ends all alike with --data.chat_template FILE",
                )
        turns[first:stop] = [number] * (stop - first)
    return turns


def _end_of_turn(
    ids: Sequence[int], ends: Sequence[int], first: int, stop: int, text: str, eos_ids: frozenset[int]
) -> int:
    """Returns the end of a turn of tokens `first` to `stop` - 1, up to its EOS; `text` ends with the turn."""
    in_turn = [index for index in range(first, stop) if ids[index] in eos_ids]
    if not in_turn:
        return stop + int(stop < len(ids) and ids[stop] in eos_ids)
    # Leave the template's white space after the end, and further EOS, to the environment.
    stop = stop if text[ends[in_turn[-1]] :].strip() else in_turn[-1] + 1
    while stop - first > 1 and ids[stop - 1] in eos_ids and ids[stop - 2] in eos_ids:
        stop -= 1
    if not eos_ids.isdisjoint(ids[first : stop - 1]):
        raise DroppedRow("EOS token inside a response")
    return stop
