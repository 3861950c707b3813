"""Parses battles of an arena: two answers to the same user, and which of them won."""

from collections.abc import Collection
from typing import Any

from qstar_jax.data.dropped import BadRow, DroppedRow
from qstar_jax.data.outcomes import decoded, number

_CONVERSATIONS, _RESPONSES = ("conversation_a", "conversation_b"), ("response_a", "response_b")
_WINNER = "winner"
_FLAGS = ("winner_model_a", "winner_model_b", "winner_tie")  # one of them is 1
_WINNERS = {"model_a": 0, "model_b": 1, "a": 0, "b": 1}
_TIES = ("tie", "tie (bothbad)", "both_bad", "bothbad", "both bad")


def holds_battles(columns: Collection[str]) -> bool:
    """Whether these columns are those of battles: two conversations or responses, and the winner."""
    columns = frozenset(columns)
    return any(columns.issuperset(pair) for pair in (_CONVERSATIONS, _RESPONSES)) and (
        _WINNER in columns or columns.issuperset(_FLAGS)
    )


def parse_battle(row: dict, prompt: str) -> tuple[Any, Any, bool]:
    """Finds the better and the worse answer of a battle.

    Args:
        row: The row.
        prompt: Column of the prompt that responses answer: text, or a list of the user's turns.

    Returns:
        Both, and whether they are whole conversations: as they are in the row, or joined from lists of turns.

    Raises:
        DroppedRow: It is a tie.
        BadRow: The winner is unknown, or the turns do not fit together.
    """
    best, conversations = _winner(row), True
    if row.get(_CONVERSATIONS[0]) is not None:
        sides = [row.get(name) for name in _CONVERSATIONS]
    else:
        sides = [row.get(name) for name in _RESPONSES]
        users, *answers = (decoded(value) for value in (row.get(prompt), *sides))
        conversations = all(isinstance(turns, list) and not _are_messages(turns) for turns in (users, *answers))
        if conversations:
            sides = [_conversation(users, turns) for turns in answers]
    return sides[best], sides[1 - best], conversations


def first_prompt(row: dict, prompt: str) -> dict:
    """Returns a row with the first turn of its user as the prompt, where the column lists several."""
    users = decoded(row.get(prompt))
    if not isinstance(users, list) or not users or not isinstance(users[0], str):
        return row
    return row | {prompt: [{"role": "user", "content": users[0]}]}


def _winner(row: dict) -> int:
    """Returns 0 if the first answer won, 1 if the second did."""
    winner = row.get(_WINNER)
    if winner is None and any(row.get(name) is not None for name in _FLAGS):
        flags = [number(row.get(name)) for name in _FLAGS]
        if (flags.count(1), flags.count(0)) != (1, 2):
            raise BadRow("not one winner", f" ({', '.join(_FLAGS)} are {flags}; expected one 1 and two 0)")
        winner = _FLAGS[flags.index(1)].removeprefix("winner_")
    name = str(winner).strip().lower()
    if name in _TIES or name.startswith("tie ("):
        raise DroppedRow("tie")
    if name not in _WINNERS:
        raise BadRow("unknown winner", f" ({winner!r}; expected {', '.join((*_WINNERS, *_TIES))})")
    return _WINNERS[name]


def _are_messages(turns: list) -> bool:
    return bool(turns) and isinstance(turns[0], dict)


def _conversation(users: list, answers: list) -> list[dict]:
    """Joins the turns of a user with those of a model."""
    if len(users) != len(answers) or not all(isinstance(text, str) for text in (*users, *answers)):
        raise BadRow(
            "turns of the user and answers do not alternate",
            f" ({len(users)} turns, {len(answers)} answers, of which {answers.count(None)} are null)",
        )
    pairs = zip(users, answers, strict=True)
    return [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
