import jax
import numpy as np

from qstar_jax.config import DataOptions
from qstar_jax.data.feeder import Feeder
from qstar_jax.data.loading import Dataset
from qstar_jax.data.tokenization import Example, Response
from qstar_jax.training.source import DatasetSource, Source


def source_of(mesh, count=4, **options):
    """Examples whose responses are as long as their rows of the file, counted from 1; every second row was dropped."""
    ids = np.arange(3, 40, dtype=np.int32)
    examples = [Example(ids[:2], False, (Response(ids[: 2 * i + 1], False),), 2 * i) for i in range(count)]
    return DatasetSource(Feeder(Dataset(examples, (), "rows.jsonl"), 4, mesh, DataOptions(), "b", **options), seed=0)


def test_messages_name_rows_of_the_file(one_device):
    for accumulate in (1, 2):
        source = source_of(one_device, accumulate=accumulate)
        rows = np.asarray(source.at_step(0).response_lengths).reshape(-1)
        assert source.locate(0, [2]) == f"row {rows[2]}"
        assert source.locate(0, [3, 0]) == f"rows {rows[3]}, {rows[0]}"
    assert source.name == "rows.jsonl"


def test_many_rows_are_shortened(one_device):
    assert source_of(one_device).locate(0, [0] * 11).endswith(" and 3 more")


def test_the_state_does_not_matter_and_epochs_are_counted(one_device):
    source = source_of(one_device)
    jax.tree.map(np.testing.assert_array_equal, source.at_step(1), source.at_step(1, state="any"))
    assert source.epochs(3) == 3.0


def test_a_source_needs_only_batches():
    class Endless(Source):
        def at_step(self, step, state):
            return step

    source = Endless()
    assert source.epochs(7) is None and source.locate(0, [2, 3]) == "examples 2, 3 of the batch"
