"""Tables of examples against the examples that were put into them."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from qstar_jax.data import table as table_module
from qstar_jax.data.batches import make_batch
from qstar_jax.data.identity import examples_identity
from qstar_jax.data.packing import Shapes
from qstar_jax.data.ragged import Lengths, Ragged
from qstar_jax.data.table import ExampleTable, record_batches
from qstar_jax.data.tokenization import Example, Response


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(table_module, "CHUNK", 4)


def examples(count, responses=2, *, turns=False, **outcome):
    rng, made = np.random.default_rng(0), []

    def ids(low):
        return rng.integers(3, 60, rng.integers(low, 12), dtype=np.int32)

    def response(row):
        tokens = ids(0)
        if not turns or row % 3 == 0:
            return Response(tokens, bool(rng.integers(2)))
        of_tokens = np.sort(rng.integers(-1, 3, len(tokens))).astype(np.int32)
        return Response(tokens, bool(rng.integers(2)), of_tokens > 0, of_tokens)

    for row in range(count):
        own = {name: np.asarray(value(row)) for name, value in outcome.items()}
        parts = tuple(response(row) for _ in range(responses))
        made.append(Example(ids(1), bool(rng.integers(2)), parts, 2 * row, own))
    return made


def assert_same(one, other):
    assert (one.row, one.prompt_truncated, set(one.outcome)) == (other.row, other.prompt_truncated, set(other.outcome))
    np.testing.assert_array_equal(one.prompt, other.prompt, strict=True)
    for name, value in one.outcome.items():
        np.testing.assert_array_equal(value, other.outcome[name], strict=True)
    for a, b in zip(one.responses, other.responses, strict=True):
        assert a.truncated is b.truncated
        for name in ("ids", "action_mask", "turns"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name), strict=True)


KINDS = {
    "pairs": {},
    "dialogues": {"turns": True},
    "prompts": {"responses": 0},
    "labels": {"responses": 1, "labels": lambda row: row % 2 == 0},
    "returns": {
        "responses": 1,
        "rewards": lambda row: np.float32(row / 3),
        "reference_rewards": lambda row: np.float32([row, 0.5]),
    },
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 4, 11])
def test_a_table_holds_the_same_examples(kind, count):
    made = examples(count, **KINDS[kind])
    table = ExampleTable.of(made)
    assert len(table) == count and [batch.num_rows for batch in record_batches(made)][:-1] == [4] * ((count - 1) // 4)
    for one, other in zip(table, made, strict=True):
        assert_same(one, other)
    assert_same(table[-1], made[-1])
    assert [e.row for e in table[1:7:2]] == [e.row for e in made[1:7:2]]
    with pytest.raises(IndexError):
        table[count]
    for name in ("rows", "prompts", "responses", "actions", "turns", "truncated"):
        np.testing.assert_array_equal(getattr(table.lengths, name), getattr(Lengths.of(made), name), err_msg=name)
    assert examples_identity(table) == examples_identity(made)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_gathered_as_they_are_from_a_list(kind):
    made = examples(11, **KINDS[kind])
    indices = np.array([9, 0, 3, 4, 3])
    gathered, expected = Ragged.take(ExampleTable.of(made), indices), Ragged.take(made, indices)
    for name in ("ids", "action_mask", "turns", "prompt_starts", "response_starts"):
        np.testing.assert_array_equal(getattr(gathered, name), getattr(expected, name), err_msg=name)
    assert gathered.outcome.keys() == expected.outcome.keys()
    for name, values in expected.outcome.items():
        np.testing.assert_array_equal(gathered.outcome[name], values, strict=True)
    np.testing.assert_array_equal(gathered.lengths.truncated, expected.lengths.truncated)


def test_shorter_rankings_are_filled_up():
    made = examples(6, 3)
    made[4] = replace(made[4], responses=made[4].responses[:2])
    table = ExampleTable.of(made)
    assert len(table[4].responses[2].ids) == 0 and not table[4].responses[2].truncated
    filled = [*made[:4], table[4], made[5]]
    shapes = Shapes.of(table, batch_size=6)
    jax.tree.map(np.testing.assert_array_equal, make_batch(Ragged.of(table), shapes), make_batch(filled, shapes))


def test_rewards_of_the_reference_are_filled_up():
    rewards = {"rewards": np.float32, "reference_rewards": lambda row: np.float32([1, 2, 3][: 3 - row])}
    table = ExampleTable.of(examples(2, 1, **rewards))
    batch = make_batch(Ragged.of(table), Shapes.of(table, batch_size=2), fill_to=4)
    np.testing.assert_array_equal(batch.outcome["reference_rewards"], [[1, 2, 3], *[[1, 2, np.nan]] * 3])
