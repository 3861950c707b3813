"""Splits dialogues into prompt and response, and brings text and chat messages into one form."""

from qstar_jax.data.columns import Turns
from qstar_jax.data.dropped import BadRow

ASSISTANT_MARKER = "\n\nAssistant:"  # dialogues in plain text, in the format of Anthropic's HH data
_HUMAN_MARKER = "\n\nHuman:"


def is_dialogue(turns: Turns) -> bool:
    """Whether the turns can hold both a prompt and a response: any messages, or text with an assistant's turn."""
    return isinstance(turns, list) or ASSISTANT_MARKER in turns


def split_dialogues(dialogues: list[Turns]) -> tuple[Turns, list[Turns]]:
    """Splits whole dialogues before the assistant's last turn; a prompt in plain text keeps the marker of that turn.

    Args:
        dialogues: One or more for which `is_dialogue` holds.

    Returns:
        The prompt that all share, and the responses (for chats, one message each).

    Raises:
        BadRow: The prompts differ, or a dialogue has no response or no prompt.
    """
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
    if not turns or turns[-1]["role"] != "assistant":
        raise BadRow("dialogue does not end with an assistant turn")
    if len(turns) == 1:
        raise BadRow("dialogue has no turn before the response")
    return turns[:-1], turns[-1:]


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
    repeated, responses = split_dialogues(responses)
    if isinstance(repeated, str):
        matches = isinstance(prompt, str) and prompt.strip() in repeated
    else:
        matches = prompt == repeated or any(message["content"] == prompt for message in repeated)
    if not matches:
        raise BadRow("the prompt column and the prompt of the dialogues differ")
    return repeated, responses


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
