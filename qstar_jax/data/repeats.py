"""Removes prompts that some files repeat in their responses, where they would be trained on and scored."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Literal

from qstar_jax.data.columns import Turns
from qstar_jax.data.dropped import BadRow, Dropped, first_rows
from qstar_jax.data.records import Record


def repeated_prompt_remover(
    records: Iterable[Record | Dropped], repeated_prompt: Literal["remove", "keep"]
) -> Callable[[Record], Record]:
    """Decides whether the responses of a file lose the prompts that they repeat.

    They do if all responses begin with their prompt in more than half of the rows that have a prompt. In other files, a
    response may happen to begin with the words of a short prompt, so nothing is changed.

    Args:
        records: All records of the file; dropped rows do not count.
        repeated_prompt: Whether to remove prompts at all.

    Returns:
        A function that sets `repeats` of a record, after removing its prompt from its responses; it raises BadRow if
        only one response repeats the prompt.
    """
    # Is repetition the rule, or a coincidence in a few rows?
    num_prompts = num_repeating = 0
    for record in records:
        if isinstance(record, Record):
            num_prompts += bool(_last_text(record.prompt).strip())
            num_repeating += None not in _remainders(record)
    remove = repeated_prompt == "remove" and 2 * num_repeating > num_prompts

    def resolve(record: Record) -> Record:
        remainders = _remainders(record)
        if None not in remainders:
            return replace(
                record, **({"responses": remainders, "repeats": "removed"} if remove else {"repeats": "kept"})
            )
        if remove and any(rest is not None for rest in remainders):
            raise BadRow("only one of the responses repeats the prompt")
        return record

    return resolve


def _remainders(record: Record) -> tuple[Turns | None, ...]:
    """Returns what each response holds after its prompt; None if it does not begin with it."""
    return tuple(_remainder(record.prompt, response) for response in record.responses)


def repeats_note(removed: Sequence[int], kept: Sequence[int]) -> str:
    """Returns a sentence on the responses that repeat their prompt in the file; empty if none do.

    Args:
        removed: Rows whose prompt was removed.
        kept: Rows whose responses repeat it.
    """
    if removed:
        return (
            f"Responses repeated their prompt, which was removed: {len(removed):,} ({first_rows(removed)}); keep it "
            "with --data.repeated_prompt keep."
        )
    return f"Responses that begin with their prompt, and keep it: {len(kept):,} ({first_rows(kept)})." if kept else ""


def _last_text(prompt: Turns) -> str:
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def _remainder(prompt: Turns, response: Turns) -> Turns | None:
    """Returns what follows the prompt in the response, or None if the response does not begin with it."""
    if isinstance(response, str):
        return _text_remainder(_last_text(prompt), response)
    rest = _text_remainder(_last_text(prompt), response[0]["content"]) if len(response) == 1 else None
    return None if rest is None else [{**response[0], "content": rest.lstrip()}]


def _text_remainder(prompt: str, response: str) -> str | None:
    """White space around the prompt may differ."""
    if not prompt.strip():
        return None
    for repeated, text in ((prompt, response), (prompt.strip(), response.lstrip())):
        rest = text.removeprefix(repeated)
        within_word = repeated[-1].isascii() and repeated[-1].isalnum() and rest[:1].isalnum()
        if text.startswith(repeated) and not within_word:  # "Yesterday" does not repeat "Yes"
            return rest
    return None
