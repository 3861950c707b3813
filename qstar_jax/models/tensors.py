"""Layout of parameters in Hugging Face files, shared by the reader, the writer and PEFT.

Each layout has two inverse functions: `Tensor.read` slices a parameter, or one device's shard of it, out of a stored
tensor, and `join` assembles a stored tensor from the parameters in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Part:
    """Part of the outputs of a fused layer: outputs `start` to `stop` of each of `groups` groups of `size` outputs.

    Attributes:
        start: First output in each group.
        stop: End of the outputs in each group, exclusive.
        size: Outputs per group.
        groups: Number of groups; 1 where the parts are simply concatenated.
    """

    start: int
    stop: int
    size: int
    groups: int = 1

    @property
    def outputs(self) -> int:
        """Number of outputs of the fused layer."""
        return self.groups * self.size

    def indices(self) -> np.ndarray:
        """Returns the indices of these outputs among those of the fused layer, ascending."""
        return np.arange(self.outputs).reshape(self.groups, self.size)[:, self.start : self.stop].ravel()


@dataclass(frozen=True)
class Tensor:
    """Name and layout of a stored parameter.

    Attributes:
        name: Name of the tensor; "{layer}" stands for one tensor per layer, which are stacked along the first axis.
        transposed: Whether it is stored as [outputs, inputs], as in torch; kernels are [inputs, outputs] here.
        part: The outputs that belong to the parameter, if several parameters share the tensor.
    """

    name: str
    transposed: bool = False
    part: Part | None = None

    @property
    def in_layers(self) -> bool:
        """Whether there is one tensor per layer."""
        return "{layer}" in self.name

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of the stored tensor, given that of the parameter (of one layer)."""
        if self.part is not None:
            shape = (*shape[:-1], self.part.outputs)
        return shape[::-1] if self.transposed else shape

    def read(self, stored, index: tuple[slice, ...]) -> np.ndarray:
        """Reads a slice of the parameter from the stored tensor.

        Args:
            stored: The tensor, or an object that reads its bytes when indexed with slices.
            index: Slices with a start and a stop along the axes of the parameter.
        """
        if self.part is None:
            return self._slice(stored, index)
        # Files are read in whole ranges: read what lies between the outputs of the part too, and drop it.
        outputs = self.part.indices()[index[-1]]
        first, last = (outputs[0], outputs[-1] + 1) if len(outputs) else (0, 0)
        return self._slice(stored, (*index[:-1], slice(int(first), int(last))))[..., outputs - first]

    def _slice(self, stored, index: tuple[slice, ...]) -> np.ndarray:
        return stored[index[::-1]].T if self.transposed else stored[index]


def join(parts: Sequence[tuple[Tensor, np.ndarray]]) -> np.ndarray:
    """Assembles a stored tensor from all parameters in it.

    Args:
        parts: (layout, parameter) pairs, all with the same tensor name.
    """
    tensor, value = parts[0]
    if tensor.part is not None:
        value = np.empty((*value.shape[:-1], tensor.part.outputs), value.dtype)
        for layout, parameter in parts:
            value[..., layout.part.indices()] = parameter
    return np.ascontiguousarray(value.T if tensor.transposed else value)


def linear(path: str, name: str, bias: bool, *, part: Part | None = None, transposed: bool = True) -> dict[str, Tensor]:
    """Returns the tensors of a linear layer.

    Args:
        path: Path of its parameters.
        name: Name of the layer in the file.
        bias: Whether it has a bias.
        part: Its part of a fused layer.
        transposed: False for the layers of GPT-2, which are stored as [inputs, outputs].
    """
    tensors = {f"{path}/kernel": Tensor(f"{name}.weight", transposed, part)}
    return tensors | ({f"{path}/bias": Tensor(f"{name}.bias", part=part)} if bias else {})


def norm(path: str, name: str, bias: bool = False) -> dict[str, Tensor]:
    """Returns the tensors of a norm; arguments as for `linear`."""
    return {f"{path}/scale": Tensor(f"{name}.weight")} | ({f"{path}/bias": Tensor(f"{name}.bias")} if bias else {})


def fused(*sizes: int) -> list[Part]:
    """Returns the parts of a fused layer that concatenates its outputs."""
    ends = np.cumsum(sizes).tolist()
    return [Part(stop - size, stop, ends[-1]) for size, stop in zip(sizes, ends, strict=True)]
