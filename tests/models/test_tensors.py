"""Layouts of tensors are inverse functions, whatever part of a parameter is asked for."""

import numpy as np
import pytest

from qstar_jax.models.tensors import Part, Tensor, fused, join

SHAPE = (6, 12)  # inputs, outputs of each part
LAYOUTS = {
    "as it is": [Tensor("x")],
    "transposed": [Tensor("x", transposed=True)],
    "one after the other": [Tensor("x", True, part) for part in fused(12, 12, 12)],
    "of GPT-2": [Tensor("x", False, part) for part in fused(12, 12, 12)],
    "head by head": [Tensor("x", True, Part(4 * i, 4 * i + 4, 12, groups=3)) for i in range(3)],
    "head by head, as it is": [Tensor("x", False, Part(4 * i, 4 * i + 4, 12, groups=3)) for i in range(3)],
}
PIECES = [np.s_[0:6, 0:12], np.s_[2:5, 3:11], np.s_[1:2, 7:8], np.s_[0:6, 4:4]]


def test_a_fused_tensor_by_hand():
    q, k = (Tensor("qk.weight", transposed=True, part=part) for part in fused(1, 2))
    stored = join([(q, np.array([[1.0]])), (k, np.array([[2.0, 3.0]]))])
    np.testing.assert_array_equal(stored, [[1.0], [2.0], [3.0]])  # [outputs, inputs], as in torch
    np.testing.assert_array_equal(k.read(stored, (slice(0, 1), slice(1, 2))), [[3.0]])


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_joined_is_read_back(name):
    values = np.random.default_rng(0).normal(size=(len(LAYOUTS[name]), *SHAPE))
    stored = join(list(zip(LAYOUTS[name], values, strict=True)))
    assert stored.flags.c_contiguous and stored.size == values.size
    for tensor, value in zip(LAYOUTS[name], values, strict=True):
        assert stored.shape == tensor.stored_shape(SHAPE)
        for piece in PIECES:
            np.testing.assert_array_equal(tensor.read(stored, piece), value[piece])


def test_what_is_read_is_joined_again():
    stored = np.random.default_rng(0).normal(size=(36, 6))
    for name in ("one after the other", "head by head"):
        parts = [(tensor, tensor.read(stored, (slice(0, 6), slice(0, 12)))) for tensor in LAYOUTS[name]]
        np.testing.assert_array_equal(join(parts), stored)


def test_biases_are_cut_like_their_layers():
    stored = np.arange(36)
    actual = [Tensor("x", part=tensor.part).read(stored, (slice(0, 12),)) for tensor in LAYOUTS["head by head"]]
    np.testing.assert_array_equal(actual[1], [4, 5, 6, 7, 16, 17, 18, 19, 28, 29, 30, 31])
    np.testing.assert_array_equal(np.sort(np.concatenate(actual)), stored)


def test_files_are_read_in_whole_ranges():
    class OnlySlices:  # as a file of safetensors
        def __getitem__(self, index):
            assert all(isinstance(part, slice) and part.step is None for part in index)
            return np.arange(36 * 6).reshape(36, 6)[index]

    piece = (slice(0, 6), slice(5, 9))
    np.testing.assert_array_equal(
        LAYOUTS["head by head"][2].read(OnlySlices(), piece), np.arange(36 * 6).reshape(36, 6)[[21, 22, 23, 32]].T
    )
