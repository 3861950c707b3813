"""Text or chat messages in the columns of a row: what is accepted, how dialogues are split, one form for all."""

from typing import Any

from qstar_jax.data.dropped import DroppedRow
from qstar_jax.errors import InputError

Messages = list[dict[str, Any]]
Turns = str | Messages

ASSISTANT_MARKER = "\n\nAssistant:"  # dialogues in text, as Anthropic's HH data ships them
HUMAN_MARKER = "\n\nHuman:"


def checked_turns(value: Any, where: str) -> Turns:
    """Text as it is, or chat messages without their null entries (columnar files add one for every key of any message).

    Args:
        value: What the column holds.
        where: File, row and column, for the error.

    Returns:
        A string, or a list of dictionaries with at least the strings `role` and `content`.

    Raises:
        InputError: The value is neither text nor chat messages.
    """
    if isinstance(value, str):
        return value
    expected = "expected text or a list of chat messages ({'role': text, 'content': text})"
    if not isinstance(value, list):
        raise InputError(f"{where} holds {type(value).__name__}; {expected}")
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict):
            raise InputError(f"{where} holds a list whose item {number} is {type(message).__name__}; {expected}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                found = type(message[key]).__name__ if key in message else "missing"
                raise InputError(f"{where}: {key!r} of message {number} is {found}; {expected}")
    return [{key: entry for key, entry in message.items() if entry is not None} for message in value]


def is_dialogue(turns: Turns) -> bool:
    """Whether the turns can hold both a prompt and an answer: any messages, or text with an assistant's turn."""
    return isinstance(turns, list) or ASSISTANT_MARKER in turns


def split_dialogues(dialogues: list[Turns]) -> tuple[Turns, list[Turns]]:
    """Splits whole dialogues before the assistant's last turn; the prompt of one in text keeps that turn's marker.

    Args:
        dialogues: One or more, as told by `is_dialogue`.

    Returns:
        The prompt that all share, and the answers (one message each, for chats).

    Raises:
        DroppedRow: The prompts differ, or a dialogue holds no answer or no prompt.
    """
    prompts, answers = zip(*map(_split, dialogues), strict=True)
    if any(prompt != prompts[0] for prompt in prompts):
        raise DroppedRow("prompts of the two dialogues differ")
    return prompts[0], list(answers)


def _split(turns: Turns) -> tuple[Turns, Turns]:
    if isinstance(turns, str):
        before, marker, answer = turns.rpartition(ASSISTANT_MARKER)
        if HUMAN_MARKER in answer:
            raise DroppedRow("dialogue does not end with an assistant turn")
        return before + marker, answer
    if not turns or turns[-1]["role"] != "assistant":
        raise DroppedRow("dialogue does not end with an assistant turn")
    if len(turns) == 1:
        raise DroppedRow("dialogue has no turn before the answer")
    return turns[:-1], turns[-1:]


def without_prompt(prompt: Turns, answers: list[Turns]) -> tuple[Turns, list[Turns]]:
    """Takes the prompt off answers that repeat it as whole chats, as UltraFeedback's rows do.

    Args:
        prompt: What the prompt's column holds.
        answers: Answers alone (returned as they are) or whole chats.

    Returns:
        The prompt, that of the chats where there are any, and the answers alone.

    Raises:
        DroppedRow: The chats do not hold the prompt, differ in theirs, or do not end with an answer.
    """
    if not any(isinstance(answer, list) and answer and answer[0]["role"] != "assistant" for answer in answers):
        return prompt, answers
    repeated, answers = split_dialogues(answers)
    if prompt != repeated and all(message["content"] != prompt for message in repeated):
        raise DroppedRow("the prompt column and the prompt of the dialogues differ")
    return repeated, answers


def same_form(prompt: Turns, answers: list[Turns], as_chat: bool) -> tuple[Turns, list[Turns]]:
    """Makes prompt and answers chat messages where one of them is, or where it is asked for.

    Args:
        prompt: Text or messages.
        answers: Text or messages each.
        as_chat: Make messages of plain text too.

    Returns:
        The prompt and the answers, all text or all messages.

    Raises:
        DroppedRow: The prompt is a chat without messages.
    """
    if not (as_chat or any(isinstance(turns, list) for turns in (prompt, *answers))):
        return prompt, answers
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not prompt:
        raise DroppedRow("prompt without messages")
    return prompt, [[{"role": "assistant", "content": a}] if isinstance(a, str) else a for a in answers]


def text_of(answer: Turns) -> str:
    """The words of an answer, whatever its form."""
    return answer if isinstance(answer, str) else "".join(message["content"] for message in answer)
