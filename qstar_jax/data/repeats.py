"""Answers that begin with their own prompt, as some files have them: it would be learnt, and scored, as answer."""

from dataclasses import replace
from typing import Literal

from qstar_jax.data.columns import Turns
from qstar_jax.data.dropped import BadRow, Dropped, first_rows, sift
from qstar_jax.data.records import Record


def settle_repeats(
    records: list[Record], repeated_prompt: Literal["remove", "keep"]
) -> tuple[list[Record], list[Dropped]]:
    """Takes prompts off the answers that repeat them, where that is the file's form.

    It is if all answers begin with their prompt in more than half of the rows (that have one). In other files an answer
    may well begin with the words of a short prompt, so nothing is changed there.

    Args:
        records: All of a file, with one answer or two each.
        repeated_prompt: `keep` leaves all answers as they are.

    Returns:
        The records, which say what became of them, and the rows where only one of the answers repeats the prompt.
    """
    rests = {record.row: [_rest_of(record.prompt, answer) for answer in record.responses] for record in records}
    asked = sum(bool(_question(record.prompt).strip()) for record in records)
    remove = repeated_prompt == "remove" and 2 * sum(None not in rest for rest in rests.values()) > asked

    def settle(record: Record) -> Record:
        rest = rests[record.row]
        if None not in rest and remove:
            return replace(record, responses=tuple(rest), repeats="removed")
        if None not in rest:
            return replace(record, repeats="kept")
        if remove and any(part is not None for part in rest):
            raise BadRow("the prompt is repeated by one of the answers only")
        return record

    return sift(((record.row, record) for record in records), settle)


def repeats_note(records: list[Record]) -> str:
    """A sentence on the records whose answers repeat the prompt in the file; empty where none do."""
    removed = [record.row for record in records if record.repeats == "removed"]
    kept = [record.row for record in records if record.repeats == "kept"]
    if removed:
        return (
            f"Answers repeated their prompt, which was taken off them: {len(removed):,} ({first_rows(removed)}); "
            "--data.repeated_prompt keep leaves it there."
        )
    return f"Answers that begin with their prompt, and keep it: {len(kept):,} ({first_rows(kept)})." if kept else ""


def _question(prompt: Turns) -> str:
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def _rest_of(prompt: Turns, answer: Turns) -> Turns | None:
    """What follows the prompt's text in the answer, or None where the answer does not begin with it."""
    if isinstance(answer, str):
        return _rest(_question(prompt), answer)
    rest = _rest(_question(prompt), answer[0]["content"]) if len(answer) == 1 else None
    return None if rest is None else [{**answer[0], "content": rest.lstrip()}]


def _rest(prompt: str, answer: str) -> str | None:
    """White space around the prompt may differ."""
    if not prompt.strip():
        return None
    for repeated, text in ((prompt, answer), (prompt.strip(), answer.lstrip())):
        rest = text.removeprefix(repeated)
        within_a_word = repeated[-1].isascii() and repeated[-1].isalnum() and rest[:1].isalnum()
        if text.startswith(repeated) and not within_a_word:  # "Yes" is not repeated by "Yesterday"
            return rest
    return None
