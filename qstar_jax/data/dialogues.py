"""Splits dialogues into prompt and responses, and brings text and chat messages into one form."""

import json
from itertools import takewhile

from qstar_jax.data.columns import Messages, Turns
from qstar_jax.data.dropped import BadRow

ASSISTANT_MARKER = "\n\nAssistant:"  # dialogues in plain text, in the format of Anthropic's HH data
_HUMAN_MARKER = "\n\nHuman:"


def is_dialogue(turns: Turns) -> bool:
    """Whether the turns can hold both a prompt and a response: any messages, or text with an assistant's turn."""
    return isinstance(turns, list) or ASSISTANT_MARKER in turns


def split_dialogues(dialogues: list[Turns], *, last: bool = False) -> tuple[Turns, list[Turns]]:
    """Splits whole dialogues into a prompt that all share, and what follows it.

    Chats part before the turn of the assistant in which they begin to differ, or a single one before its first turn;
    texts before the last turn, whose marker the prompt keeps.

    Args:
        dialogues: One or more for which `is_dialogue` holds.
        last: Whether a single chat is split before the assistant's last turn.

    Returns:
        The prompt and the responses.

    Raises:
        BadRow: The prompts differ, or a dialogue has no response or no prompt.
    """
    if all(isinstance(turns, list) for turns in dialogues):
        return _split_chats(dialogues, last)
    prompts, responses = zip(*map(_split, dialogues), strict=True)
    if any(prompt != prompts[0] for prompt in prompts):
        raise BadRow("prompts of the two dialogues differ")
    return prompts[0], list(responses)


def _split(turns: Turns) -> tuple[Turns, Turns]:
    if isinstance(turns, str):
        before, marker, response = turns.rpartition(ASSISTANT_MARKER)
        if _HUMAN_MARKER in response:
            raise BadRow("dialogue does not end with an assistant turn")
        return before + marker, response
    raise BadRow("one of the dialogues is chat messages, and another is plain text")


def _split_chats(dialogues: list[Messages], last: bool) -> tuple[Messages, list[Messages]]:
    if any(not turns or turns[-1]["role"] != "assistant" for turns in dialogues):
        raise BadRow("dialogue does not end with an assistant turn")
    if any(len(turns) == 1 for turns in dialogues):
        raise BadRow("dialogue has no turn before the response")
    starts = _shared_starts(dialogues)
    if not starts:
        raise BadRow("prompts of the two dialogues differ" if len(dialogues) > 1 else "dialogue has no turn of others")
    start = starts[0] if len(dialogues) == 1 and not last else starts[-1]
    return dialogues[0][:start], [turns[start:] for turns in dialogues]


def _shared_starts(dialogues: list[Messages]) -> list[int]:
    """Where all dialogues have a turn of the assistant, after equal messages and a turn of somebody else."""
    starts, first = [], dialogues[0]
    for index, messages in enumerate(zip(*dialogues, strict=False)):
        if index and all(m["role"] == "assistant" for m in messages) and first[index - 1]["role"] != "assistant":
            starts.append(index)
        if any(message != messages[0] for message in messages):
            break
    return starts


def share_turns(prompt: Messages, responses: list[Messages]) -> tuple[Messages, list[Messages]]:
    """Moves the messages that all responses begin with to the prompt, up to a turn of the assistant.

    Responses that do not begin with a turn of the assistant are left as they are.
    """
    starts = _shared_starts([prompt + response for response in responses])
    start = max((start for start in starts if start >= len(prompt)), default=len(prompt))
    moved = start - len(prompt)
    return prompt + responses[0][:moved], [response[moved:] for response in responses]


def remove_prompt(prompt: Turns, responses: list[Turns]) -> tuple[Turns, list[Turns]]:
    """Removes the prompt from responses that are whole dialogues, as in UltraFeedback.

    Args:
        prompt: Value of the prompt's column.
        responses: Responses alone (returned unchanged) or whole dialogues: chats, or texts that begin with a human turn
            although the prompt does not.

    Returns:
        The prompt (that of the dialogues, if there are any), and the responses alone.

    Raises:
        BadRow: The dialogues lack the prompt, have different ones, or do not end with a response.
    """
    if not any(_is_whole_dialogue(prompt, response) for response in responses):
        return prompt, responses
    differs = BadRow("the prompt column and the prompt of the dialogues differ")
    if all(isinstance(response, list) for response in responses):
        end = _end_of_prompt(prompt, responses)
        if end is None:
            raise differs
        return responses[0][:end], [response[end:] for response in responses]
    repeated, responses = split_dialogues(responses)
    if not isinstance(prompt, str) or prompt.strip() not in repeated:
        raise differs
    return repeated, responses


def _end_of_prompt(prompt: Turns, dialogues: list[Messages]) -> int | None:
    """Number of messages up to the end of the prompt, in what all dialogues share; None if it is not there."""
    messages = zip(*dialogues, strict=False)
    shared = len(list(takewhile(lambda each: all(message == each[0] for message in each), messages)))
    first = dialogues[0][:shared]
    if isinstance(prompt, list):
        return len(prompt) if first[: len(prompt)] == prompt else None
    ends = [end for end, m in enumerate(first, start=1) if m["role"] != "assistant" and m["content"] == prompt]
    return max(ends, default=None)


def _is_whole_dialogue(prompt: Turns, response: Turns) -> bool:
    if isinstance(response, list):
        return bool(response) and response[0]["role"] != "assistant"
    return ASSISTANT_MARKER in response and _begins_dialogue(response) and not _begins_dialogue(prompt)


def _begins_dialogue(turns: Turns) -> bool:
    return isinstance(turns, str) and turns.lstrip().startswith(_HUMAN_MARKER.strip())


def unify_form(prompt: Turns, responses: list[Turns], as_chat: bool) -> tuple[Turns, list[Turns]]:
    """Turns prompt and responses into chat messages if any of them is one, or on request; else all stay text.

    Raises:
        BadRow: The prompt is a chat without messages.
    """
    if not (as_chat or any(isinstance(turns, list) for turns in (prompt, *responses))):
        return prompt, responses
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not prompt:
        raise BadRow("prompt without messages")
    return prompt, [[{"role": "assistant", "content": r}] if isinstance(r, str) else r for r in responses]


def text_of(response: Turns) -> str:
    """Returns the text of a response, whatever its form."""
    return response if isinstance(response, str) else "".join(message["content"] for message in response)


def plain_text(turns: Turns) -> str:
    """Returns the text of one chat message, with its tool calls as JSON; several are labelled with their roles."""
    if isinstance(turns, str):
        return turns
    calls = [json.dumps(turn["tool_calls"], ensure_ascii=False) if turn.get("tool_calls") else "" for turn in turns]
    texts = ["\n".join(filter(None, [turn["content"], call])) for turn, call in zip(turns, calls, strict=True)]
    if len(turns) == 1:
        return texts[0]
    return "\n\n".join(f"{turn['role']}: {text}" for turn, text in zip(turns, texts, strict=True))
