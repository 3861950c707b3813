"""A response with the numbers of each of its tokens: the record that every view reads."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import accumulate, compress
from pathlib import Path
from typing import Any, Self

from qstar_jax.console import shorten_middle
from qstar_jax.evaluation.steps import StepTotals, step_totals
from qstar_jax.untrusted import check_types, read_json_lines

SCORE_LINE = "a line of `qstar score`"
_PER_TOKEN = ("logp", "ref_logp", "reward", "q", "v")
_TYPES = {"row": int, "role": str, "prompt": str, "pieces": list[str], "token_ids": list[int]}
_TYPES |= dict.fromkeys(_PER_TOKEN, list[float]) | {"truncated": bool, "beta": float}
_OPTIONAL_TYPES = {
    "alternatives": list[list[dict]],
    "prompt_truncated": bool,
    "action_mask": list[bool],
    "turn": list[int],
    "wrong": list[bool],
    "endogenous": list[float | None],
    "entropy": list[float],
    "step": list[int],
    "first_error": int | None,
    "total_reward": float,
    "steps": list[dict] | None,
}
_REPR_CHARACTERS = 60
_IF_KNOWN = (
    "wrong",
    "endogenous",
    "entropy",
    "step",
    "alternatives",
)  # empty where they were not computed or asked for


@dataclass(frozen=True)
class Alternative:
    """A token that the policy could have chosen instead.

    Args:
        piece: Its text.
        logp: Its log pi (nats).
        reward: Its implicit reward.
    """

    piece: str
    logp: float
    reward: float


@dataclass(frozen=True)
class Turn:
    """What the actions of one turn earned together.

    Args:
        turn: Its number, from 0.
        text: Its actions, spelled.
        actions: How many they are.
        reward: Sum of their rewards.
        value: Sum of the rewards up to its end. If rewards are paid at the end of the response, it estimates
            V*(s) - V*(s_0) of the state after the turn (and after the last one, the return less V*(s_0)), up to the
            luck of an environment that answers at random.
    """

    turn: int
    text: str
    actions: int
    reward: float
    value: float


@dataclass(frozen=True)
class Step:
    """What the actions of one step of reasoning earned together: the scores of an implicit process reward model.

    Args:
        step: Its number, from 0.
        text: Its actions, spelled.
        actions: How many they are.
        reward: Sum of their rewards: how much the step raised or lowered the value.
        value: Sum of the rewards up to its end, as of a turn: q after the step in arXiv 2412.01981.
    """

    step: int
    text: str
    actions: int
    reward: float
    value: float


@dataclass(frozen=True)
class ScoredResponse:
    """A response, its tokens, and five numbers for each of its actions; log-probabilities in nats.

    Args:
        row: Row of the data file; the responses of one row share their prompt.
        role: "chosen", "rejected" or "answer".
        prompt: Text before the response.
        pieces: Text of each token; joined they spell the response, EOS included.
        token_ids: Id of each token.
        logp: log pi of each token; this and the other numbers are 0 at tokens that are no actions.
        ref_logp: log pi_ref of each token.
        reward: Implicit reward of each token (`TokenScores.rewards`).
        q: Q-value of each token (`TokenScores.q`).
        v: Value of the state before each token (`TokenScores.v`).
        truncated: The response was truncated: it has no EOS, and its total is not that of a finished response.
        beta: Temperature of the rewards: reward per nat.
        alternatives: The policy's most likely tokens at each position, most likely first; empty where they were not
            asked for.
        prompt_truncated: The beginning of the prompt was truncated.
        action_mask: Whether the policy chose each token (see `Response`); all if empty.
        turn: Turn of the assistant to which each token belongs, from 0; -1 where the environment speaks; 0 if empty.
        wrong: Whether the data mark each token as wrong; empty where nothing is marked.
        endogenous: Reward of each token by the policy's logits alone (`mdp.endogenous_rewards`); None at the last
            action of a truncated response, whose next value is not known.
        entropy: Entropy of the reference's next token before each token, in nats; empty where it was not asked for.
        step: Step of reasoning to which each token belongs, from 0; -1 where it is no action; empty where steps were
            not asked for.
        first_error: First step that is suspected to be wrong; -1: none; None where steps were not asked for.
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
    action_mask: tuple[bool, ...] = ()
    turn: tuple[int, ...] = ()
    wrong: tuple[bool, ...] = ()
    endogenous: tuple[float | None, ...] = ()
    entropy: tuple[float, ...] = ()
    step: tuple[int, ...] = ()
    first_error: int | None = None

    def __post_init__(self) -> None:
        """Fills in the mask and the turns of a single turn, and checks that every token has every number."""
        count = len(self.token_ids)
        object.__setattr__(self, "action_mask", self.action_mask or (True,) * count)
        object.__setattr__(self, "turn", self.turn or (0,) * count)
        names = ("pieces", "token_ids", *_PER_TOKEN, "action_mask", "turn")
        names += tuple(name for name in _IF_KNOWN if getattr(self, name))
        lengths = {name: len(getattr(self, name)) for name in names}
        if len(set(lengths.values())) > 1:
            raise ValueError(
                f"row {self.row}, {self.role}: expected one entry per token in each field, found {lengths}"
            )

    def __repr__(self) -> str:
        """One line: its text, shortened, its tokens and its reward."""
        text = shorten_middle("".join(self.pieces), _REPR_CHARACTERS)
        return f"<{self.role} {text!r}: {sum(self.action_mask)} tokens, reward {self.total_reward:+.3f}>"

    @property
    def action_rewards(self) -> tuple[float, ...]:
        """Rewards of the actions alone."""
        return tuple(compress(self.reward, self.action_mask))

    @property
    def total_reward(self) -> float:
        """The sum of the token rewards: the implicit return of the response."""
        return float(sum(self.reward))

    @property
    def lowest(self) -> int:
        """Index of the action with the lowest reward."""
        return min(compress(range(len(self.reward)), self.action_mask), key=self.reward.__getitem__)

    @property
    def running_reward(self) -> tuple[float, ...]:
        """The sum of the token rewards up to and including each token."""
        return tuple(accumulate(float(reward) for reward in self.reward))

    @property
    def turns(self) -> tuple[Turn, ...]:
        """Its turns that have actions, in order."""
        return tuple(Turn(*part) for part in self._parts(self.turn))

    @property
    def steps(self) -> tuple[Step, ...]:
        """Its steps that have tokens, in order; none where steps were not asked for."""
        return tuple(Step(*part) for part in self._parts(self.step))

    @property
    def step_totals(self) -> StepTotals | None:
        """Sum (which is `total_reward`), minimum and mean of the rewards of its steps, and that of the last."""
        return step_totals([step.reward for step in self.steps]) if self.step else None

    def _parts(self, part_of: Sequence[int]) -> list[tuple[int, str, int, float, float]]:
        """Number, text, number of actions, reward, and reward so far of each part of the response, in order."""
        numbers = sorted(set(compress(part_of, self.action_mask)))
        parts, value = [], 0.0
        for number in numbers:
            places = [t for t, part in enumerate(part_of) if part == number and self.action_mask[t]]
            reward = float(sum(self.reward[t] for t in places))
            value += reward
            parts.append((number, "".join(self.pieces[t] for t in places), len(places), reward, value))
        return parts

    def to_json(self) -> dict[str, Any]:
        """Turns the record into what `json.dumps` takes: one line of scores.jsonl.

        Returns:
            The fields by name, tuples as lists of plain numbers; `total_reward`; `turns`, a record of each turn (see
            `Turn`) without its text; `steps` and `step_totals`, the same of each step with its text (see `Step`,
            `StepTotals`), None where steps were not asked for; and `reason`, which is None here.
        """
        record = asdict(self)
        record |= {"alternatives": [list(place) for place in record["alternatives"]]}
        record |= {"pieces": list(self.pieces), "token_ids": [int(token) for token in self.token_ids]}
        record |= {name: list(map(bool, getattr(self, name))) for name in ("action_mask", "wrong")}
        record |= {"turn": list(map(int, self.turn))}
        record |= {name: list(getattr(self, name)) for name in ("endogenous", "entropy", "step")}
        record |= {name: [float(value) for value in getattr(self, name)] for name in _PER_TOKEN}
        turns = [{name: value for name, value in asdict(turn).items() if name != "text"} for turn in self.turns]
        totals = self.step_totals
        steps = (
            {"steps": None, "step_totals": None}
            if totals is None
            else {"steps": list(map(asdict, self.steps)), "step_totals": asdict(totals)}
        )
        return record | {"total_reward": self.total_reward, "turns": turns, **steps, "reason": None}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Self:
        """Reads back what `to_json` wrote, so that views can be drawn from scores.jsonl.

        Fields with a default may be missing. Keys that are no field (`turns`, `step_totals`) are ignored, except that
        `total_reward` and the rewards of `steps` must be those of the tokens.

        Raises:
            ValueError: If a field is missing or of another type, or rewards do not add up. Others are errors of Python.
        """
        check_types(record, _TYPES)
        check_types(record, {name: kind for name, kind in _OPTIONAL_TYPES.items() if name in record})
        values = {field.name: record[field.name] for field in fields(cls) if field.name in record}
        values["alternatives"] = [
            tuple(Alternative(**alternative) for alternative in place) for place in record.get("alternatives", ())
        ]
        response = cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
        response._check_sums(record)
        return response

    def _check_sums(self, record: dict[str, Any]):
        """Refuses sums beside the tokens that are not theirs."""
        total = record.get("total_reward", self.total_reward)
        if not _are_close(total, self.total_reward):
            raise ValueError(f"total_reward is {total}, and the rewards of the tokens add up to {self.total_reward}")
        if (steps := record.get("steps")) is None:
            return
        for step in steps:
            check_types(step, {"reward": float})
        found, own = [step["reward"] for step in steps], [step.reward for step in self.steps]
        if len(found) != len(own) or not all(map(_are_close, found, own)):
            raise ValueError(f"steps have the rewards {found}, and the rewards of their tokens add up to {own}")


def _are_close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-4)  # sums of float32 in another order


def unscored_line(row: int, reason: str) -> dict[str, Any]:
    """The line of scores.jsonl for a row that could not be scored: it has all keys, and the reason."""
    empty = dict.fromkeys(field.name for field in fields(ScoredResponse))
    return empty | {
        "row": row,
        "total_reward": None,
        "turns": None,
        "steps": None,
        "step_totals": None,
        "reason": reason,
    }


def read_scores(path: Path) -> list[ScoredResponse]:
    """Reads the responses of scores.jsonl in file order, without rows that have no score.

    Raises:
        InputError: A line is not what `ScoredResponse.to_json` or `unscored_line` writes.
    """

    def parse(record: dict[str, Any]) -> ScoredResponse | None:
        return ScoredResponse.from_json(record) if record.get("reason") is None else None

    return [response for response in read_json_lines(path, parse, SCORE_LINE) if response is not None]


def by_row(responses: Iterable[ScoredResponse]) -> list[list[ScoredResponse]]:
    """Groups responses by row; rows and responses stay in the order in which they came."""
    rows: dict[int, list[ScoredResponse]] = {}
    for response in responses:
        rows.setdefault(response.row, []).append(response)
    return list(rows.values())


def pair_margin(responses: Sequence[ScoredResponse]) -> float | None:
    """Total reward of the chosen minus that of the rejected response; None if the row is not such a pair."""
    totals = {response.role: response.total_reward for response in responses}
    if len(responses) != 2 or set(totals) != {"chosen", "rejected"}:
        return None
    return totals["chosen"] - totals["rejected"]
