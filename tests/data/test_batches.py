from dataclasses import replace

import jax
import numpy as np
import pytest

from qstar_jax.data.batches import Batch, make_batch, step_indices
from qstar_jax.data.packing import Shapes, pack
from qstar_jax.data.tokenization import Example, Response

EOS = 2


def example(prompt, *responses, row=0):
    responses = tuple(Response(np.asarray(ids, np.int32), ids[-1] != EOS) for ids in responses)
    return Example(np.asarray(prompt, np.int32), False, responses, row)


PAIRS = [example([5, 6], [7, 2], [8, 9, 8]), example([5], [7, 2, 7, 2], [2])]


def batch_of(examples, layout="packed", *, row_length=0, fill_to=0, texts=False, **options):
    batch_size = fill_to or len(examples)
    shapes = Shapes.of(examples, layout, batch_size=batch_size, row_length=row_length, multiple=1, texts=texts)
    return make_batch(examples, shapes, fill_to=fill_to, **options)


def test_a_shared_prompt_by_hand():
    batch = batch_of(PAIRS, "shared")
    # 5 | 6 7 | 6 8 9: the prompt's last token begins each branch, and the response's last token is no input.
    np.testing.assert_array_equal(batch.tokens, [[5, 6, 7, 6, 8, 9], [5, 7, 2, 7, 5, 0]])
    np.testing.assert_array_equal(batch.positions, [[0, 1, 2, 1, 2, 3], [0, 1, 2, 3, 0, 0]])
    np.testing.assert_array_equal(batch.branches, [[0, 1, 1, 2, 2, 2], [1, 1, 1, 1, 2, 0]])
    np.testing.assert_array_equal(batch.blocks, [[0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, -1]])
    # All but the first slot, and the padding at the end, predict something that is scored.
    np.testing.assert_array_equal(batch.slots, [range(1, 11)])
    np.testing.assert_array_equal(batch.targets, [[7, 2, 8, 9, 8, 7, 2, 7, 2, 2]])
    np.testing.assert_array_equal(batch.index, [[[0, 1, 0, 0], [2, 3, 4, 0]], [[5, 6, 7, 8], [9, 0, 0, 0]]])
    np.testing.assert_array_equal(batch.prompt_lengths, [2, 1])
    np.testing.assert_array_equal(batch.response_lengths, [[2, 3], [4, 1]])
    np.testing.assert_array_equal(batch.truncated, [[False, True], [False, False]])
    np.testing.assert_array_equal(batch.weights, [1, 1])
    assert batch.ref_logp is None


def test_texts_by_hand():
    texts = batch_of(PAIRS, "shared", texts=True).texts
    # 5 6 7 and 5 6 8 9 share the first slot; 5 7 2 7 and 5 share none.
    np.testing.assert_array_equal(texts.slots, [[0, 1, 2, -1], [0, 3, 4, 5], [6, 7, 8, 9], [10, -1, -1, -1]])
    np.testing.assert_array_equal(texts.places[0], [[0, 4], [1, -1], [2, -1], [5, -1], [6, -1], [7, -1]])
    np.testing.assert_array_equal(texts.places[1], [[8, -1], [9, -1], [10, -1], [11, -1], [12, -1], [-1, -1]])


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("layout", ["packed", "shared", "plain"])
def test_texts_gather_each_prompt_with_each_of_its_responses(layout, shards):
    rng = np.random.default_rng(0)
    ids = [[rng.integers(3, 60, n).tolist() for n in rng.integers(1, 9, 4)] for _ in range(16)]
    examples = [example(*lists, row=row) for row, lists in enumerate(ids)]
    shapes = Shapes.of(examples, layout, batch_size=16, row_length=40, shards=shards, texts=True)
    batch = make_batch(examples, shapes)
    slots, places = batch.texts.slots, batch.texts.places
    assert batch.texts.shards == shards and slots.shape[1] == 16  # no longer than the longest text
    found = []
    # A shard's texts lie within its own sequences, and its places within its own texts.
    arrays = (slots, places, batch.tokens, batch.positions, batch.blocks)
    for slots, places, tokens, positions, blocks in zip(*[np.split(x, shards) for x in arrays], strict=True):
        for number, row in enumerate(slots):
            text = row[row >= 0]
            assert (row[len(text) :] == -1).all()
            np.testing.assert_array_equal(positions.ravel()[text], np.arange(len(text)))
            expected = number * slots.shape[1] + np.arange(len(text))
            assert (places.reshape(tokens.size, -1)[text] == expected[:, None]).sum() == len(text)
            found += [tokens.ravel()[text].tolist()] if len(text) else []
        assert (places >= 0).sum() == (slots >= 0).sum()
        np.testing.assert_array_equal(places[..., 0] >= 0, blocks >= 0)
    expected = [[*prompt, *response[:-1]] for prompt, *responses in ids for response in responses]
    assert sorted(found) == sorted(filter(None, expected))


def test_plain_sequences_by_hand():
    batch = batch_of(PAIRS, "plain")
    np.testing.assert_array_equal(batch.tokens, [[5, 6, 7, 0], [5, 6, 8, 9], [5, 7, 2, 7], [5, 0, 0, 0]])
    np.testing.assert_array_equal(batch.positions, [[0, 1, 2, 0], [0, 1, 2, 3], [0, 1, 2, 3], [0, 0, 0, 0]])
    np.testing.assert_array_equal(batch.branches > 0, [[0, 1, 1, 0], [0, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0]])


def test_two_prompts_in_one_sequence():
    batch = batch_of(PAIRS, row_length=11)
    assert batch.tokens.shape == (1, 11)
    np.testing.assert_array_equal(batch.tokens, [[5, 6, 7, 6, 8, 9, 5, 7, 2, 7, 5]])
    np.testing.assert_array_equal(batch.blocks, [[0] * 6 + [1] * 5])
    np.testing.assert_array_equal(batch.positions, [[0, 1, 2, 1, 2, 3, 0, 1, 2, 3, 0]])


@pytest.mark.parametrize("layout", ["packed", "shared", "plain"])
def test_index_finds_every_token_of_every_response(layout):
    rng = np.random.default_rng(0)
    examples = [
        example(rng.integers(3, 9, rng.integers(1, 9)), *(rng.integers(3, 9, rng.integers(1, 7)) for _ in range(3)))
        for _ in range(13)
    ]
    batch = batch_of(examples, layout, row_length=40)
    for b, r in np.ndindex(13, 3):
        ids = examples[b].responses[r].ids
        where = batch.index[b, r, : len(ids)]
        np.testing.assert_array_equal(batch.targets.reshape(-1)[where], ids)
        slots = batch.slots[0, where]
        np.testing.assert_array_equal(batch.tokens.reshape(-1)[slots], [examples[b].prompt[-1], *ids[:-1]])
        np.testing.assert_array_equal(
            batch.positions.reshape(-1)[slots], len(examples[b].prompt) - 1 + np.arange(len(ids))
        )


def test_first_fit_leaves_little_padding():
    rng = np.random.default_rng(1)
    lengths = rng.integers(5, 60, 200)
    sequences, order = pack(lengths, 100, "packed")
    assert sorted(order) == list(range(200)) and (np.diff(sequences[order]) >= 0).all()
    assert (np.bincount(sequences, weights=lengths) <= 100).all()
    assert sequences.max() + 1 <= 1.05 * lengths.sum() / 100 + 1


def test_an_empty_response_takes_no_slots():
    empty = Response(np.zeros(0, np.int32), True)
    pair = Example(np.array([5, 6], np.int32), False, (Response(np.array([7, 2], np.int32), False), empty), 0)
    batch = batch_of([pair, PAIRS[1]])
    np.testing.assert_array_equal(batch.response_lengths, [[2, 0], [4, 1]])
    assert not batch.action_mask[0, 1].any() and (batch.blocks >= 0).sum() == 3 + 5


@pytest.mark.parametrize("pad_id", [0, EOS, 7])
def test_the_mask_does_not_depend_on_the_padding(pad_id):
    expected = [[[1, 1, 0, 0], [1, 1, 1, 0]], [[1, 1, 1, 1], [1, 0, 0, 0]]]
    batch = batch_of(PAIRS)
    batch = replace(batch, tokens=np.where(batch.blocks < 0, pad_id, batch.tokens))
    np.testing.assert_array_equal(batch.action_mask, np.array(expected, bool))


def test_batch_is_a_pytree_with_a_mask_under_jit():
    batch = batch_of(PAIRS)
    same, mask = jax.jit(lambda b: (b, b.action_mask))(batch)
    assert isinstance(same, Batch)
    np.testing.assert_array_equal(mask, batch.action_mask)


@pytest.mark.parametrize("layout", ["packed", "shared", "plain"])
def test_examples_that_fill_up_have_no_tokens(layout):
    batch, filled = batch_of(PAIRS, layout), batch_of(PAIRS, layout, fill_to=4)
    np.testing.assert_array_equal(filled.weights, [1, 1, 0, 0])
    np.testing.assert_array_equal(filled.response_lengths[2:], 0)
    assert (filled.blocks >= 0).sum() == (batch.blocks >= 0).sum()
    assert len(filled.tokens) == {"packed": 2, "shared": 4, "plain": 8}[layout]


def test_cached_reference_lies_at_its_tokens():
    ref = [[np.array([-1.0, -2.0]), np.array([-3.0, -4.0, -5.0])], [np.arange(4.0), np.array([-9.0])]]
    batch = batch_of(PAIRS, ref_logps=ref, fill_to=3)
    np.testing.assert_array_equal(batch.ref_logp[0], [[-1, -2, 0, 0], [-3, -4, -5, 0]])
    np.testing.assert_array_equal(batch.ref_logp[1], [[0, 1, 2, 3], [-9, 0, 0, 0]])
    assert batch.ref_logp.dtype == np.float32 and not batch.ref_logp[2].any()


@pytest.mark.parametrize(("layout", "length", "response_length"), [("plain", 3, 4), ("packed", 4, 4), ("packed", 6, 3)])
def test_examples_that_do_not_fit(layout, length, response_length):
    shapes = Shapes(layout, length, response_length, 1, 1)
    with pytest.raises(ValueError, match=r"row 1: \d tokens of prompt and responses, and a response of 4, do not fit"):
        make_batch(PAIRS[1:], shapes)


def test_examples_with_other_numbers_of_responses():
    for pair in ([PAIRS[0], example([1], [2])], [example([1], [2]), PAIRS[0]]):
        with pytest.raises(ValueError, match="all examples of a dataset need the same number"):
            batch_of(pair)


def test_shapes_come_in_few_sizes():
    rng = np.random.default_rng(2)
    examples = [
        example(rng.integers(3, 9, rng.integers(1, 90)), *(rng.integers(3, 9, rng.integers(1, 90)) for _ in range(2)))
        for _ in range(400)
    ]
    shapes = Shapes.of(examples, batch_size=16, shards=2)
    assert shapes.length % 8 == 0 and shapes.sequences == 2  # of each shard: a quarter of its examples
    batches = [make_batch([examples[i] for i in rng.choice(400, 16, replace=False)], shapes) for _ in range(60)]
    sizes = {(len(batch.tokens), batch.slots.shape[1]) for batch in batches}
    assert len(sizes) <= 9 and all(sequences % 4 == 0 for sequences, _ in sizes)
    scored, actions = sum(b.slots.size for b in batches), sum(b.num_actions.sum() for b in batches)
    assert actions < scored < 1.3 * actions  # the head sees hardly more than the actions


@pytest.mark.parametrize(("n", "batch_size"), [(10, 3), (7, 7), (3, 8), (1, 2)])
def test_every_epoch_sees_every_row_once(n, batch_size):
    stream = np.concatenate([step_indices(0, step, n, batch_size) for step in range(4 * n)])
    epochs = stream[: len(stream) // n * n].reshape(-1, n)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(n), (len(epochs), 1)))


def test_step_indices_is_a_function_of_seed_and_step():
    first = [step_indices(3, step, 100, 8) for step in range(30)]
    again = [step_indices(3, step, 100, 8) for step in reversed(range(30))][::-1]
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first[0], step_indices(4, 0, 100, 8))


def test_epochs_are_shuffled_apart():
    orders = [tuple(step_indices(0, epoch, 50, 50)) for epoch in range(3)]
    assert len({*orders, tuple(range(50))}) == 4


def test_order_is_pinned():
    """A changed order would break exact resume of running runs."""
    assert step_indices(0, 0, 8, 8).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]


def test_few_actions_come_in_one_width_that_holds_no_more_than_they_need():
    examples = [example(range(60), range(9, 29 + 3 * i), range(9, 39)) for i in range(12)]  # 50 to 83 actions
    shapes = Shapes.of(examples, "shared", batch_size=1)
    widths = {make_batch([one], shapes).slots.shape for one in examples}
    assert widths == {(1, shapes.scored)} and shapes.scored == 88


def test_many_actions_come_in_steps_of_a_quarter_of_a_batch():
    examples = [example(range(400), range(9, 9 + n), range(1000)) for n in (800, 1000, 1800)]
    shapes = Shapes.of(examples, "shared", batch_size=1)
    widths = [make_batch([one], shapes).slots.shape[1] for one in examples]
    assert shapes.scored == 552 and widths == [4 * 552, 4 * 552, 6 * 552]  # 1800, 2000 and 2800 actions


def odd_examples(count, seed):
    """Examples of many lengths, in several turns; some responses have no tokens, or no actions at their end."""
    rng, examples = np.random.default_rng(seed), []

    def response():
        length = int(rng.integers(0, 20))
        turns = np.sort(rng.integers(0, 3, length)).astype(np.int32)
        actions = rng.random(length) < 0.7
        ids = rng.integers(3, 60, length, dtype=np.int32)
        return Response(ids, bool(rng.integers(2)), actions, np.where(actions, turns, -1))

    for row in range(count):
        prompt = rng.integers(3, 60, rng.integers(1, 25), dtype=np.int32)
        examples.append(Example(prompt, False, tuple(response() for _ in range(3)), row))
    return examples


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("layout", ["packed", "shared", "plain"])
@pytest.mark.parametrize("seed", [0, 1])
def test_batches_are_those_made_token_by_token(layout, shards, seed, slow_batch):
    examples = odd_examples(22, seed)
    shapes = Shapes.of(examples, layout, batch_size=24, row_length=90, shards=shards, multiple=4, texts=True)
    batch, expected = make_batch(examples, shapes, fill_to=24), slow_batch(examples, shapes, fill_to=24)
    texts = expected.pop("texts")
    for name, values in expected.items():
        np.testing.assert_array_equal(getattr(batch, name), values, err_msg=name, strict=True)
    np.testing.assert_array_equal(batch.response_lengths[:22], [[len(r.ids) for r in e.responses] for e in examples])
    for (i, r), slots in texts.items():
        row = batch.texts.slots[3 * i + r]
        np.testing.assert_array_equal(row[row >= 0] % shapes.length, slots)
