"""Tokenized examples in Arrow tables, in memory or mapped from a file: an `Example` is made only when asked for."""

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int

from qstar_jax.data.ragged import Lengths, Ragged
from qstar_jax.data.tokenization import Example, Response

CHUNK = 1024  # examples of a record batch; the last one may have fewer
_COUNTS = ("lengths", "num_actions", "num_turns", "truncated")
_INTS, _FLAGS = pa.list_(pa.int32()), pa.list_(pa.uint8())
# Lists of a prompt and its responses: lengths, tokens, what was truncated. `turns` and `actions` are those of the
# responses' tokens; null where all tokens are actions of a single turn.
SCHEMA = pa.schema(
    {
        "row": pa.int64(),
        "lengths": _INTS,
        "num_actions": _INTS,
        "num_turns": _INTS,
        "truncated": _FLAGS,
        "ids": _INTS,
        "actions": _FLAGS,
        "turns": _INTS,
        "labels": pa.bool_(),
        "rewards": pa.float32(),
        "reference_rewards": pa.list_(pa.float32()),
    }
)


def record_batches(examples: Iterable[Example]) -> Iterator[pa.RecordBatch]:
    """Writes examples into record batches of `CHUNK` examples each."""
    chunk: list[Example] = []
    for example in examples:
        chunk.append(example)
        if len(chunk) == CHUNK:
            yield _record_batch(chunk)
            chunk = []
    if chunk:
        yield _record_batch(chunk)


def _record_batch(examples: list[Example]) -> pa.RecordBatch:
    single = [all(r.action_mask.all() and not r.turns.any() for r in e.responses) for e in examples]
    lists = {
        "lengths": [[len(e.prompt), *(len(r.ids) for r in e.responses)] for e in examples],
        "num_actions": [[r.num_actions for r in e.responses] for e in examples],
        "num_turns": [
            [int(len(r.ids) > 0) if one else r.num_turns for r in e.responses]
            for e, one in zip(examples, single, strict=True)
        ],
        "truncated": [[e.prompt_truncated, *(r.truncated for r in e.responses)] for e in examples],
        "ids": [_joined([e.prompt, *(r.ids for r in e.responses)]) for e in examples],
        "actions": _unless(single, [[r.action_mask for r in e.responses] for e in examples]),
        "turns": _unless(single, [[r.turns for r in e.responses] for e in examples]),
        "reference_rewards": [e.outcome.get("reference_rewards") for e in examples],
    }
    columns = {name: _list_array(values, SCHEMA.field(name).type) for name, values in lists.items()}
    columns["row"] = pa.array([e.row for e in examples], pa.int64())
    for name in ("labels", "rewards"):
        values = [None if (value := e.outcome.get(name)) is None else value.item() for e in examples]
        columns[name] = pa.array(values, SCHEMA.field(name).type)
    return pa.RecordBatch.from_arrays([columns[name] for name in SCHEMA.names], schema=SCHEMA)


def _unless(single: list[bool], parts: list[list[np.ndarray]]) -> list[np.ndarray | None]:
    return [None if skipped else _joined(arrays) for arrays, skipped in zip(parts, single, strict=True)]


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0, np.int32)


def _list_array(lists: list, kind: pa.ListType) -> pa.ListArray:
    """Makes a column of lists, of which some may be None, without a Python object per item."""
    lengths = [0 if one is None else len(one) for one in lists]
    offsets = np.cumsum([0, *lengths]).astype(np.int32)
    dtype = kind.value_type.to_pandas_dtype()
    values = np.concatenate([np.zeros(0, dtype), *(np.asarray(one, dtype) for one in lists if one is not None)])
    missing = pa.array([one is None for one in lists])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, kind.value_type), mask=missing).cast(kind)


class _Lists:
    """A column of lists of one record batch as numpy arrays, without a copy."""

    def __init__(self, batch: pa.RecordBatch, name: str):
        column = batch.column(name)
        self.offsets, self.values = column.offsets.to_numpy(), column.values.to_numpy()
        self.present = column.is_valid().to_numpy(zero_copy_only=False)

    def __getitem__(self, i: int) -> np.ndarray:
        return self.values[self.offsets[i] : self.offsets[i + 1]]

    def padded(self, columns: int, fill: float = 0) -> np.ndarray:
        """Returns all lists as rows of a matrix."""
        lengths = np.diff(self.offsets)
        matrix = np.full((len(lengths), columns), fill, self.values.dtype)
        matrix[np.arange(columns) < lengths[:, None]] = self.values[self.offsets[0] : self.offsets[-1]]
        return matrix


class _Chunk:
    """The lists of one record batch."""

    def __init__(self, batch: pa.RecordBatch):
        self.ids, self.actions, self.turns = (_Lists(batch, name) for name in ("ids", "actions", "turns"))


class ExampleTable(Sequence[Example]):
    """Examples of a dataset, all with the same number of responses: shorter rankings are filled up with empty ones.

    Rewards of the reference's responses are filled up with NaN.

    Args:
        batches: What `record_batches` made: all but the last with `CHUNK` examples.
        identity: See below.

    Attributes:
        identity: What `examples_identity` returns, where it is known already.
        lengths: What is known of the examples without their tokens.
        outcome: What was said of single responses, stacked along the first axis.
    """

    def __init__(self, batches: Sequence[pa.RecordBatch], identity: dict[str, Any] | None = None):
        self.identity = identity
        self._chunks = [_Chunk(batch) for batch in batches]
        self.lengths = _lengths(batches)
        self.outcome = _outcome(batches)

    @classmethod
    def of(cls, examples: Iterable[Example]) -> "ExampleTable":
        """Makes a table in memory."""
        return cls(list(record_batches(examples)))

    def __len__(self) -> int:
        return len(self.lengths.rows)

    def __getitem__(self, which):
        """Makes the example of an index, or a list of those of a slice."""
        if isinstance(which, slice):
            return [self[i] for i in range(*which.indices(len(self)))]
        if not -len(self) <= which < len(self):
            raise IndexError(f"example {which} of {len(self)}")
        return self._example(which % len(self))

    def _example(self, i: int) -> Example:
        chunk, place = self._chunks[i // CHUNK], i % CHUNK
        prompt, *responses = np.split(chunk.ids[place], self._ends[i, :-1])
        many = {}
        if chunk.turns.present[place]:
            ends = np.cumsum(self.lengths.responses[i])[:-1]
            many = {
                "action_mask": np.split(chunk.actions[place].view(bool), ends),
                "turns": np.split(chunk.turns[place], ends),
            }
        prompt_truncated, *truncated = self.lengths.truncated[i].tolist()
        return Example(
            prompt,
            prompt_truncated,
            tuple(
                Response(ids, truncated[r], **{name: parts[r] for name, parts in many.items()})
                for r, ids in enumerate(responses)
            ),
            int(self.lengths.rows[i]),
            {name: np.asarray(values[i]) for name, values in self.outcome.items()},
        )

    @cached_property
    def _ends(self) -> Int[np.ndarray, "N 1+R"]:
        """Where prompts and responses end among the tokens of their example."""
        return np.cumsum(np.column_stack([self.lengths.prompts, self.lengths.responses]), 1)

    def take(self, indices: Int[np.ndarray, " B"]) -> Ragged:
        """Gathers the tokens of some examples."""
        lengths = self.lengths[indices]
        places = [(self._chunks[i // CHUNK], i % CHUNK) for i in indices.tolist()]
        ids = np.concatenate([chunk.ids[place] for chunk, place in places])
        # Unless something else is stored, all tokens of responses are actions of one turn.
        totals = lengths.prompts + lengths.responses.sum(1)
        starts = np.cumsum(totals) - totals
        begun = np.arange(len(ids)) - np.repeat(starts, totals)
        action_mask = begun >= np.repeat(lengths.prompts, totals)
        turns = action_mask.astype(np.int32) - 1
        for (chunk, place), start, end in zip(places, starts + lengths.prompts, starts + totals, strict=True):
            if chunk.turns.present[place]:
                action_mask[start:end], turns[start:end] = chunk.actions[place], chunk.turns[place]
        outcome = {name: values[indices] for name, values in self.outcome.items()}
        return Ragged(lengths, ids, action_mask, turns, outcome)


def _lengths(batches: Sequence[pa.RecordBatch]) -> Lengths:
    columns = {name: [_Lists(batch, name) for batch in batches] for name in _COUNTS}
    places = max((int(np.diff(column.offsets).max()) for column in columns["num_actions"]), default=0)

    def stacked(name: str, width: int, dtype: type) -> np.ndarray:
        parts = [column.padded(width) for column in columns[name]]
        return np.concatenate([np.zeros((0, width), dtype), *parts]).astype(dtype, copy=False)

    lengths = stacked("lengths", 1 + places, np.int32)
    rows = np.concatenate([np.zeros(0, np.int64), *(batch.column("row").to_numpy() for batch in batches)])
    actions, turns = (stacked(name, places, np.int32) for name in ("num_actions", "num_turns"))
    return Lengths(rows, lengths[:, 0], lengths[:, 1:], actions, turns, stacked("truncated", 1 + places, bool))


def _outcome(batches: Sequence[pa.RecordBatch]) -> dict[str, np.ndarray]:
    outcome = {}
    for name in ("labels", "rewards"):
        columns = [batch.column(name) for batch in batches]
        if columns and not any(column.null_count for column in columns):
            outcome[name] = np.concatenate([column.to_numpy(zero_copy_only=False) for column in columns])
    lists = [_Lists(batch, "reference_rewards") for batch in batches]
    if lists and all(column.present.all() for column in lists):
        most = max(int(np.diff(column.offsets).max()) for column in lists)
        outcome["reference_rewards"] = np.concatenate([column.padded(most, np.nan) for column in lists])
    return outcome
