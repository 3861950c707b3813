"""Removes prompts that some files repeat in their responses, where they would be trained on and scored."""

from dataclasses import replace
from typing import Literal

from qstar_jax.data.columns import Turns
from qstar_jax.data.dropped import BadRow, Dropped, first_rows, sift
from qstar_jax.data.records import Record


def remove_repeated_prompts(
    records: list[Record], repeated_prompt: Literal["remove", "keep"]
) -> tuple[list[Record], list[Dropped]]:
    """Removes repeated prompts from the responses of a file, if that is its format.

    It is if all responses begin with their prompt in more than half of the rows that have a prompt. In other files, a
    response may happen to begin with the words of a short prompt, so nothing is changed.

    Returns:
        The records, with `repeats` set, and the rows where only one response repeats the prompt.
    """
    # What each response holds after its prompt; None if it does not begin with it.
    remainders = [[_remainder(record.prompt, text) for text in record.responses] for record in records]
    # Decide for the whole file: is repetition the rule, or a coincidence in a few rows?
    num_prompts = sum(bool(_last_text(record.prompt).strip()) for record in records)
    num_repeating = sum(None not in remainder for remainder in remainders)
    remove = repeated_prompt == "remove" and 2 * num_repeating > num_prompts

    def resolve(item: tuple[Record, list]) -> Record:
        record, remainder = item
        if None not in remainder:
            changes = {"responses": tuple(remainder), "repeats": "removed"} if remove else {"repeats": "kept"}
            return replace(record, **changes)
        if remove and any(rest is not None for rest in remainder):
            raise BadRow("only one of the responses repeats the prompt")
        return record

    return sift(((record.row, (record, rest)) for record, rest in zip(records, remainders, strict=True)), resolve)


def repeats_note(records: list[Record]) -> str:
    """Returns a sentence on the responses that repeat their prompt in the file; empty if none do."""
    removed = [record.row for record in records if record.repeats == "removed"]
    kept = [record.row for record in records if record.repeats == "kept"]
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
