"""One answer with what the model thinks of each of its tokens: the record that every view reads."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol, Self

_PER_TOKEN = ("logp", "ref_logp", "reward", "q", "v")
_UNFINISHED = "\ufffd"
_LONGEST_CHARACTER = 4  # bytes of UTF-8, so also the most tokens that one character can be spread over


@dataclass(frozen=True)
class Alternative:
    """A token that the policy could have said instead.

    Args:
        piece: Its text.
        logp: log pi of it (nats).
        reward: beta * (log pi - log pi_ref) of it (nats).
    """

    piece: str
    logp: float
    reward: float


@dataclass(frozen=True)
class ScoredResponse:
    """An answer, its tokens, and five numbers for each of them (nats).

    Args:
        row: Row of the data file; the answers of one row share their prompt.
        role: "chosen", "rejected" or "answer".
        prompt: Text before the answer.
        pieces: Text of each token; together they spell the answer, EOS included.
        token_ids: Id of each token.
        logp: log pi of each token.
        ref_logp: log pi_ref of each token.
        reward: beta * (logp - ref_logp), the implicit token reward.
        q: beta * (logp + logz), the value of this token in this state.
        v: beta * logz, the value of the state before this token.
        truncated: The answer was cut, so it has no EOS and its total is not that of a finished answer.
        beta: Temperature of the rewards.
        alternatives: The policy's likeliest tokens at the place of each token, likeliest first; empty where nobody
            asked for them.
        prompt_truncated: The prompt lost its beginning.
    """

    row: int
    role: str
    prompt: str
    pieces: tuple[str, ...]
    token_ids: tuple[int, ...]
    logp: tuple[float, ...]
    ref_logp: tuple[float, ...]
    reward: tuple[float, ...]
    q: tuple[float, ...]
    v: tuple[float, ...]
    truncated: bool
    beta: float
    alternatives: tuple[tuple[Alternative, ...], ...] = ()
    prompt_truncated: bool = False

    def __post_init__(self) -> None:
        """Checks that every token has every number."""
        names = ("pieces", "token_ids", *_PER_TOKEN, *(["alternatives"] if self.alternatives else []))
        lengths = {name: len(getattr(self, name)) for name in names}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"row {self.row}, {self.role}: one entry a token expected in each field, found {lengths}")

    @property
    def total_reward(self) -> float:
        """The sum of the token rewards: the answer's implicit reward, up to V of the prompt."""
        return float(sum(self.reward))

    @property
    def running_reward(self) -> tuple[float, ...]:
        """The sum of the token rewards up to and including each token."""
        return tuple(accumulate(float(reward) for reward in self.reward))

    def to_json(self) -> dict[str, Any]:
        """Turns the record into what `json.dumps` takes: one line of scores.jsonl.

        Returns:
            The fields by name, tuples as lists of plain numbers, `total_reward`, and `reason`, which is None here.
        """
        record = asdict(self)
        record |= {"alternatives": [list(place) for place in record["alternatives"]]}
        record |= {"pieces": list(self.pieces), "token_ids": [int(token) for token in self.token_ids]}
        record |= {name: [float(value) for value in getattr(self, name)] for name in _PER_TOKEN}
        return record | {"total_reward": self.total_reward, "reason": None}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Self:
        """Reads back what `to_json` wrote, so that views can be drawn from scores.jsonl.

        Args:
            record: One parsed line; keys that are no field (`total_reward`) are left aside, and `alternatives` may be
                missing.

        Returns:
            The record it was made from.
        """
        values = {field.name: record[field.name] for field in fields(cls) if field.name in record}
        values["alternatives"] = [
            tuple(Alternative(**alternative) for alternative in place) for place in record.get("alternatives", ())
        ]
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def unscored_line(row: int, reason: str) -> dict[str, Any]:
    """The one line of scores.jsonl for a row that could not be scored: it has all keys, and says why."""
    nothing = dict.fromkeys(field.name for field in fields(ScoredResponse))
    return nothing | {"row": row, "total_reward": None, "reason": reason}


def read_scores(path: Path) -> list[ScoredResponse]:
    """Reads the answers of scores.jsonl, rows without a score left aside.

    Args:
        path: The file.

    Returns:
        One record an answer, in file order.
    """
    with path.open(encoding="utf-8") as file:  # texts may hold what `splitlines` splits at
        records = [json.loads(line) for line in file]
    return [ScoredResponse.from_json(record) for record in records if record.get("reason") is None]


def by_row(responses: Iterable[ScoredResponse]) -> list[list[ScoredResponse]]:
    """Gathers the answers to each prompt.

    Args:
        responses: Answers in any order.

    Returns:
        One list for each row, rows and answers in the order in which they came.
    """
    rows: dict[int, list[ScoredResponse]] = {}
    for response in responses:
        rows.setdefault(response.row, []).append(response)
    return list(rows.values())


def pair_margin(answers: Sequence[ScoredResponse]) -> float | None:
    """Says by how much the model prefers the chosen answer of a row.

    Args:
        answers: The answers of one row.

    Returns:
        Total reward of the chosen minus that of the rejected answer; None if the row is not such a pair.
    """
    totals = {answer.role: answer.total_reward for answer in answers}
    if len(answers) != 2 or set(totals) != {"chosen", "rejected"}:
        return None
    return totals["chosen"] - totals["rejected"]


class Tokenizer(Protocol):
    """What is needed of a Hugging Face tokenizer."""

    def decode(self, token_ids: list[int], **options: bool) -> str:
        """Spells token ids as text."""
        ...


def token_pieces(ids: Sequence[int], tokenizer: Tokenizer) -> tuple[str, ...]:
    """Finds the text of each token, special tokens included.

    A token can hold a part of a character only; the token that completes the character then carries all of it. The
    text is cut by decoding short windows: the token alone would lose its leading space in some tokenizers, and the
    whole prefix would cost quadratic time.

    Args:
        ids: Token ids of one answer.
        tokenizer: The tokenizer that they belong to.

    Returns:
        One piece for each id; joined, they are the decoded text, to the letter.
    """
    spell = partial(_spell, tokenizer)
    ends: list[int] = []
    window = fresh = 0  # the window opens with the tokens before `fresh`, already spelled, as context
    offset = 0  # where the window's text begins in the whole text
    for position in range(len(ids)):
        spelled = spell(ids[window : position + 1])
        settled = spelled.rstrip(_UNFINISHED)
        ends.append(max(offset + len(settled), ends[-1] if ends else 0))
        # Bytes that never become a character must not make the window grow for ever.
        if settled == spelled or position - fresh >= _LONGEST_CHARACTER:
            window, fresh = fresh, position + 1
            offset += len(spelled) - len(spell(ids[window:fresh]))
    text = spell(ids)
    starts = [0, *ends[:-1]] if ends else []
    return tuple(text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=False))


def lone_piece(token_id: int, tokenizer: Tokenizer) -> str:
    """Finds the text of a token that may stand anywhere, with its leading space.

    Args:
        token_id: The token.
        tokenizer: The tokenizer that it belongs to.

    Returns:
        Its text behind another token, here itself: some tokenizers take the space from the first token of a text.
    """
    return _spell(tokenizer, [token_id, token_id])[len(_spell(tokenizer, [token_id])) :]


def _spell(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    return tokenizer.decode([int(token) for token in tokens], **options)
