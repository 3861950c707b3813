import jax
import numpy as np
import pytest

from qstar_jax.config import DataOptions
from qstar_jax.data import feeder as feeder_module
from qstar_jax.data.feeder import Feeder
from qstar_jax.data.loading import Dataset
from qstar_jax.data.tokenization import Example, Response
from qstar_jax.errors import InputError


def example(row, length):
    """A prompt of two tokens with two responses; `length` is that of the first."""
    ids = np.full(length, 10 + row, np.int32)
    return Example(np.array([5, 6], np.int32), False, (Response(ids, False), Response(ids[:1], False)), row)


DATASET = Dataset([example(row, length) for row, length in enumerate((1, 2, 40, 3))], (), "pairs.jsonl")


def feeder_of(mesh, batch_size=4, **options):
    return Feeder(DATASET, batch_size, mesh, DataOptions(layout="shared"), "train.batch_size", **options)


def test_a_step_takes_each_example_once(one_device):
    feeder = feeder_of(one_device)
    batch = feeder.at_step(seed=0, step=0)
    (order,) = feeder.indices_at_step(seed=0, step=0)
    assert sorted(order) == [0, 1, 2, 3]
    np.testing.assert_array_equal(batch.response_lengths[:, 0], np.array([1, 2, 40, 3])[order])


def test_micro_batches_are_stacked_on_the_largest_size_and_packed_once(one_device, monkeypatch):
    whole = feeder_of(one_device).at_step(seed=0, step=0)
    packed = []
    plan_batch = feeder_module.plan_batch
    monkeypatch.setattr(feeder_module, "plan_batch", lambda *args: packed.append(args) or plan_batch(*args))
    monkeypatch.setattr("qstar_jax.data.batches.plan_batch", None)  # a call would raise
    feeder = feeder_of(one_device, accumulate=2)
    batch = feeder.at_step(seed=0, step=0)
    feeder._maker.submit(int).result()  # the next step is made as well
    assert len(packed) == 2 * 2 and batch.tokens.shape[:2] == (2, 2) and batch.response_lengths.shape == (2, 2, 2)
    np.testing.assert_array_equal(batch.response_lengths.reshape(4, 2), whole.response_lengths)


def test_all_examples_in_order_with_a_last_batch_that_is_filled_up(one_device):
    first, last = feeder_of(one_device, batch_size=3).in_order()
    assert first.response_lengths[:, 0].tolist() == [1, 2, 40] and first.weights.tolist() == [1, 1, 1]
    assert last.response_lengths[:, 0].tolist() == [3, 0, 0] and last.weights.tolist() == [1, 0, 0]
    assert jax.tree.map(jax.numpy.shape, first) == jax.tree.map(jax.numpy.shape, last)  # one program serves both
    assert [batch.response_lengths[0, 0] for batch in feeder_of(one_device, batch_size=2).in_order(start=1)] == [2, 3]


def test_batches_that_do_not_divide_evenly_are_refused(one_device):
    with pytest.raises(InputError, match=r"batch_size 8 .* 3 micro-batches \(train\.accumulate\).* multiple of 3"):
        feeder_of(one_device, batch_size=8, accumulate=3)


def test_the_next_batch_is_made_ahead_and_is_the_same(one_device, monkeypatch):
    expected = [feeder_of(one_device).at_step(0, step) for step in (0, 1, 5)]
    feeder, made = feeder_of(one_device), []
    make = Feeder._make_step
    monkeypatch.setattr(Feeder, "_make_step", lambda *args: made.append(args[1:]) or make(*args))
    batches = [feeder.at_step(0, 0)]
    feeder._maker.submit(int).result()  # what was asked of the thread before is done
    assert made == [(0, 0), (0, 1)]
    batches += [feeder.at_step(0, 1), feeder.at_step(0, 5)]
    feeder._maker.submit(int).result()
    assert sorted(made) == [(0, 0), (0, 1), (0, 2), (0, 5), (0, 6)]
    for batch, other in zip(batches, expected, strict=True):
        jax.tree.map(np.testing.assert_array_equal, batch, other)
    # With other arrays, nothing that was made ahead without them is used.
    logps = [[np.full(len(r.ids), -1.0) for r in e.responses] for e in DATASET.examples]
    assert feeder.with_reference(logps).at_step(0, 6).ref_logp is not None
