"""Where a parameter lies in a Hugging Face file: a table that reader, writer and PEFT share.

Every layout is a pair of inverse functions: `Tensor.read` takes a parameter, or a device's piece of it, out of a stored
tensor, and `join` makes the stored tensor of all the parameters that lie in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Part:
    """A part of the outputs of a fused layer: the outputs `start` to `stop` of each of `groups` groups of `size`.

    Attributes:
        start: First output in a group.
        stop: The one behind the last.
        size: Outputs of a group.
        groups: How many groups there are; 1 where the parts simply follow each other.
    """

    start: int
    stop: int
    size: int
    groups: int = 1

    @property
    def outputs(self) -> int:
        """How many outputs the fused layer has."""
        return self.groups * self.size

    def rows(self) -> np.ndarray:
        """Indices of the part's outputs among those of the fused layer, ascending."""
        return np.arange(self.outputs).reshape(self.groups, self.size)[:, self.start : self.stop].ravel()


@dataclass(frozen=True)
class Tensor:
    """Place and layout of a parameter.

    Attributes:
        name: The tensor's name. "{layer}" stands for one tensor a layer; here they are stacked along the first axis.
        transposed: Whether it is stored as [outputs, inputs], as torch does it; kernels are [inputs, outputs] here.
        part: Which outputs are the parameter's, where several parameters are stored in one tensor.
    """

    name: str
    transposed: bool = False
    part: Part | None = None

    @property
    def in_layers(self) -> bool:
        """Whether there is one for each layer."""
        return "{layer}" in self.name

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the stored tensor, from the parameter's (in one layer)."""
        if self.part is not None:
            shape = (*shape[:-1], self.part.outputs)
        return shape[::-1] if self.transposed else shape

    def read(self, stored, index: tuple[slice, ...]) -> np.ndarray:
        """Takes a piece of the parameter out of the stored tensor.

        Args:
            stored: The tensor, or what reads its bytes when it is indexed with slices.
            index: The piece, as slices with a start and a stop along the parameter's axes.

        Returns:
            The piece.
        """
        if self.part is None:
            return self._sliced(stored, index)
        rows = self.part.rows()[index[-1]]
        # Files are read in whole ranges: what lies between a part's rows is read, and dropped here.
        first, last = (rows[0], rows[-1] + 1) if len(rows) else (0, 0)
        return self._sliced(stored, (*index[:-1], slice(int(first), int(last))))[..., rows - first]

    def _sliced(self, stored, index: tuple[slice, ...]) -> np.ndarray:
        return stored[index[::-1]].T if self.transposed else stored[index]


def join(parts: Sequence[tuple[Tensor, np.ndarray]]) -> np.ndarray:
    """Makes a stored tensor of all parameters that lie in it.

    Args:
        parts: Each with its place; all have the same name.

    Returns:
        The tensor as it lies in a file, contiguous.
    """
    tensor, value = parts[0]
    if tensor.part is not None:
        value = np.empty((*value.shape[:-1], tensor.part.outputs), value.dtype)
        for other, own in parts:
            value[..., other.part.rows()] = own
    return np.ascontiguousarray(value.T if tensor.transposed else value)


def linear(path: str, name: str, bias: bool, *, part: Part | None = None, transposed: bool = True) -> dict[str, Tensor]:
    """The tensors of a linear layer.

    Args:
        path: Of its parameters here.
        name: Of the layer in the file.
        bias: Whether it has a bias.
        part: Of a fused layer.
        transposed: False for GPT-2's layers, which are stored as [inputs, outputs].
    """
    found = {f"{path}/kernel": Tensor(f"{name}.weight", transposed, part)}
    return found | ({f"{path}/bias": Tensor(f"{name}.bias", part=part)} if bias else {})


def norm(path: str, name: str, bias: bool = False) -> dict[str, Tensor]:
    """The tensors of a norm; arguments as those of `linear`."""
    return {f"{path}/scale": Tensor(f"{name}.weight")} | ({f"{path}/bias": Tensor(f"{name}.bias")} if bias else {})


def fused(*sizes: int) -> list[Part]:
    """The parts of a fused layer whose outputs simply follow each other.

    Args:
        *sizes: Outputs of each part.
    """
    ends = np.cumsum(sizes).tolist()
    return [Part(stop - size, stop, ends[-1]) for size, stop in zip(sizes, ends, strict=True)]
