"""Text or chat messages in the columns of a row: how dialogues are split and prompts taken off, one form for all."""

from qstar_jax.data.columns import Turns
from qstar_jax.data.dropped import BadRow

ASSISTANT_MARKER = "\n\nAssistant:"  # dialogues in text, as Anthropic's HH data ships them
HUMAN_MARKER = "\n\nHuman:"


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
        BadRow: The prompts differ, or a dialogue holds no answer or no prompt.
    """
    prompts, answers = zip(*map(_split, dialogues), strict=True)
    if any(prompt != prompts[0] for prompt in prompts):
        raise BadRow("prompts of the two dialogues differ")
    return prompts[0], list(answers)


def _split(turns: Turns) -> tuple[Turns, Turns]:
    if isinstance(turns, str):
        before, marker, answer = turns.rpartition(ASSISTANT_MARKER)
        if HUMAN_MARKER in answer:
            raise BadRow("dialogue does not end with an assistant turn")
        return before + marker, answer
    if not turns or turns[-1]["role"] != "assistant":
        raise BadRow("dialogue does not end with an assistant turn")
    if len(turns) == 1:
        raise BadRow("dialogue has no turn before the answer")
    return turns[:-1], turns[-1:]


def without_prompt(prompt: Turns, answers: list[Turns]) -> tuple[Turns, list[Turns]]:
    """Takes the prompt off answers that repeat it as whole dialogues, as UltraFeedback's rows do.

    Args:
        prompt: What the prompt's column holds.
        answers: Answers alone (returned as they are) or whole dialogues: chats, or texts that begin with a human's turn
            where the prompt does not.

    Returns:
        The prompt, that of the dialogues where there are any, and the answers alone.

    Raises:
        BadRow: The dialogues do not hold the prompt, differ in theirs, or do not end with an answer.
    """
    if not any(_repeats_as_dialogue(prompt, answer) for answer in answers):
        return prompt, answers
    repeated, answers = split_dialogues(answers)
    if isinstance(repeated, str):
        there = isinstance(prompt, str) and prompt.strip() in repeated
    else:
        there = prompt == repeated or any(message["content"] == prompt for message in repeated)
    if not there:
        raise BadRow("the prompt column and the prompt of the dialogues differ")
    return repeated, answers


def _repeats_as_dialogue(prompt: Turns, answer: Turns) -> bool:
    if isinstance(answer, list):
        return bool(answer) and answer[0]["role"] != "assistant"
    return ASSISTANT_MARKER in answer and _begins_dialogue(answer) and not _begins_dialogue(prompt)


def _begins_dialogue(turns: Turns) -> bool:
    return isinstance(turns, str) and turns.lstrip().startswith(HUMAN_MARKER.strip())


def same_form(prompt: Turns, answers: list[Turns], as_chat: bool) -> tuple[Turns, list[Turns]]:
    """Makes prompt and answers chat messages where one of them is, or where it is asked for.

    Args:
        prompt: Text or messages.
        answers: Text or messages each.
        as_chat: Make messages of plain text too.

    Returns:
        The prompt and the answers, all text or all messages.

    Raises:
        BadRow: The prompt is a chat without messages.
    """
    if not (as_chat or any(isinstance(turns, list) for turns in (prompt, *answers))):
        return prompt, answers
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not prompt:
        raise BadRow("prompt without messages")
    return prompt, [[{"role": "assistant", "content": a}] if isinstance(a, str) else a for a in answers]


def text_of(answer: Turns) -> str:
    """The words of an answer, whatever its form."""
    return answer if isinstance(answer, str) else "".join(message["content"] for message in answer)
