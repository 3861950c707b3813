"""A prompt and its answers as token ids: two that belong together, cut where the prompt ends.

Chats: the whole dialogue is rendered and tokenised at once, so prompt and answer together have the ids that the
template's own tokenisation gives, whatever the tokenizer. A token that spans the end of the prompt, or that the answers
of a pair do not share, belongs to the answers; the prompt ends before it.

Plain text: prompt and answer are joined as they stand, and tokenised at once, but the prompt keeps the ids that it has
alone, which are those from which an answer will be generated. So no token spans the boundary: where one would, the
answer's ids are those that it has apart, without the space that some tokenizers put in front of a text. A prompt that
begins with BOS gets no other one.
"""

from itertools import takewhile
from typing import Any

from qstar_jax.data.chat_templates import ChatTemplate
from qstar_jax.data.columns import Messages
from qstar_jax.data.dropped import BadRow
from qstar_jax.data.records import Record

_NEIGHBOURS = ("\n", "a", ".")  # with one of them a text's beginning does not merge
_SHOWN = 40  # characters of a text that errors quote


def split_text(record: Record, tokenizer: Any) -> tuple[list[int], list[list[int]]]:
    """Token ids of a prompt in plain text, and of its answers, without EOS where they do not say it.

    Args:
        record: Prompt and answers as text.
        tokenizer: A fast Hugging Face tokenizer.
    """
    specials = not (tokenizer.bos_token and record.prompt.startswith(tokenizer.bos_token))
    ids, _ = _encode(tokenizer, record.prompt, specials=specials)
    answers = []
    for text in record.responses:
        found = _behind(ids, record.prompt, text, tokenizer, specials=specials)
        answers.append(_apart(text, tokenizer) if found is None else found)
    while ids and ids[-1] == tokenizer.eos_token_id:  # nothing is said behind an end
        ids.pop()
    return ids, answers


def split_chat(
    record: Record, tokenizer: Any, template: ChatTemplate, eos_ids: frozenset[int]
) -> tuple[list[int], list[list[int]]]:
    """Token ids of a dialogue's prompt, with the opening of the assistant's turn, and of its answers.

    Args:
        record: Prompt and answers as chat messages.
        tokenizer: A fast Hugging Face tokenizer.
        template: What renders the dialogue.
        eos_ids: Tokens that end an answer of the model.

    Raises:
        BadRow: The template refuses the dialogue, leaves something out, or does not show the prompt before an answer
            as it does alone.
    """
    prompt = template(record.prompt, record.tools, answer_next=True)
    if not record.responses:
        _check_place(record, [], template, prompt)
        return _encode(tokenizer, prompt)[0], []
    dialogues, boundaries = [], []
    for answer in record.responses:
        text = template(record.prompt + answer, record.tools)
        _check_extends(prompt, text)
        _check_place(record, answer, template, text)
        ids, ends = _encode(tokenizer, text)
        boundaries.append(len(list(takewhile(lambda end: end <= len(prompt), ends))))
        dialogues.append(ids[: _end_of_turn(ids, ends, text, eos_ids)])
    shared = min(boundaries)
    while any(ids[:shared] != dialogues[0][:shared] for ids in dialogues):
        shared -= 1
    return dialogues[0][:shared], [ids[shared:] for ids in dialogues]


def _encode(tokenizer: Any, text: str, *, specials: bool = False) -> tuple[list[int], list[int]]:
    """Token ids of a text, and where each ends in it, in characters; `specials` puts BOS before it.

    What some tokenizers put behind a text ([SEP], say) is left out: an answer follows there, or its own end.
    """
    found = tokenizer(text, add_special_tokens=specials, return_offsets_mapping=True, verbose=False)
    ids, ends = found.input_ids, [end for _, end in found.offset_mapping]
    begun = int(ids[:1] == [tokenizer.bos_token_id])  # of a text without any token
    text_ends = max((place + 1 for place, of in enumerate(found.sequence_ids(0)) if of is not None), default=begun)
    return ids[:text_ends], ends[:text_ends]


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


def _check_extends(prompt: str, text: str):
    if text.startswith(prompt):
        return
    at = next((at for at, both in enumerate(zip(prompt, text, strict=False)) if both[0] != both[1]), len(text))
    before, alone, followed = prompt[max(at - _SHOWN, 0) : at], prompt[at : at + _SHOWN], text[at : at + _SHOWN]
    raise BadRow(
        "the chat template does not extend its prompt when an answer follows",
        f" (behind {before!r} the prompt alone has {alone!r}, and with the answer there is {followed!r}); choose "
        "another template by --data.chat_template, or other arguments by --data.chat_template_kwargs",
    )


def _check_place(record: Record, answer: Messages, template: ChatTemplate, text: str):
    if lost := template.lost(record.prompt, answer, record.tools, text):
        fix = "; choose one that shows them by --data.chat_template"
        fix += ", or leave the column out with --data.tools null" if lost == "tools" else ""
        raise BadRow(f"the chat template has no place for {lost}", fix)


def _end_of_turn(ids: list[int], ends: list[int], text: str, eos_ids: frozenset[int]) -> int:
    """How many tokens there are without the white space that a template writes behind the end of a turn."""
    last = max((index for index, token in enumerate(ids) if token in eos_ids), default=None)
    return len(ids) if last is None or text[ends[last] :].strip() else last + 1
