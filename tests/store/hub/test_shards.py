"""Weights in several files: where they are cut, what the index says, and how much is in memory meanwhile."""

import json
import weakref

import numpy as np
import pytest
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.numpy import load_file

from qstar_jax.errors import InputError
from qstar_jax.store.hub.shards import INDEX, StoredTensor, shard_bytes, write_shards

SIZES = {"a": 6, "b": 3, "c": 25, "d": 3, "e": 4, "f": 1}  # numbers of each tensor
ARRAYS = {name: np.arange(size, dtype=np.float32) for name, size in SIZES.items()}


def stored(arrays):
    return [StoredTensor(name, array.shape, lambda array=array: array) for name, array in arrays.items()]


def files_of(folder):
    return {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


def test_a_tensor_that_is_larger_than_a_file_has_one_of_its_own(tmp_path):
    write_shards(tmp_path, stored(ARRAYS), "float32", max_bytes=10 * 4)
    actual = files_of(tmp_path)
    assert list(actual) == [f"model-{i}-of-00003.safetensors" for i in ("00001", "00002", "00003")]
    assert [set(tensors) for tensors in actual.values()] == [{"c"}, {"a", "b"}, {"d", "e", "f"}]
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(next(tensors[name] for tensors in actual.values() if name in tensors), array)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"total_parameters": 42, "total_size": 168}
    assert index["weight_map"] == {name: file for file, tensors in actual.items() for name in tensors}


@pytest.mark.parametrize(("dtype", "max_bytes"), [("float32", 168), ("bfloat16", 84)])
def test_what_fits_is_one_file_without_an_index(dtype, max_bytes, tmp_path):
    write_shards(tmp_path, stored(ARRAYS), dtype, max_bytes)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    write_shards(tmp_path / "..", stored(ARRAYS), dtype, max_bytes - 1)
    assert (tmp_path / ".." / INDEX).exists()


def test_no_more_than_one_file_is_in_memory(tmp_path):
    made, most = [], 0

    def make():
        nonlocal most
        array = np.ones(100, np.float32)
        made.append(weakref.ref(array))
        most = max(most, sum(reference() is not None for reference in made))
        return array

    write_shards(tmp_path, [StoredTensor(f"t{i}", (100,), make) for i in range(12)], "float32", max_bytes=3 * 400)
    assert len(made) == 12 and most <= 3 and len(files_of(tmp_path)) == 4


@pytest.mark.parametrize("size", ["5GB", "500MB", "1.5KB", " 2 tb ", "0.25 kb"])
def test_sizes_are_those_of_huggingface_hub(size):
    """A tensor of just so many bytes fits in a file of that size, one more does not."""
    size_of = {"first": shard_bytes(size) - 1, "second": 1, "third": 1}
    split = split_state_dict_into_shards_factory(
        size_of, get_storage_size=int, filename_pattern="{suffix}", max_shard_size=size
    )
    assert list(split.filename_to_tensors.values()) == [["first", "second"], ["third"]]


@pytest.mark.parametrize("size", ["", "5", "GB", "5GiB", "5 gigabytes", "-1GB", "0GB", "nanGB", "1e3MB", "0.0001KB"])
def test_other_spellings_are_refused(size):
    with pytest.raises(InputError, match=rf"--max_shard_size is '{size}'; expected a positive number .* such as 5GB"):
        shard_bytes(size)
