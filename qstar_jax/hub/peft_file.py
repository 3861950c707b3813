"""adapter_model.safetensors of PEFT; what is taken of it is ticked off."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from qstar_jax.errors import InputError
from qstar_jax.hub.reader import NUMBER_TYPES

TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."


class AdapterFile:
    """The tensors of an adapter's file, by their names without the prefix that PEFT puts before all of them.

    Args:
        folder: A folder in PEFT's format.

    Raises:
        InputError: If the file is missing, unreadable or a pickle, or holds other numbers than floats.
    """

    def __init__(self, folder: Path):
        from safetensors import SafetensorError, safe_open

        self.path = folder / TENSORS
        if not self.path.is_file():
            pickle = folder / "adapter_model.bin"
            why = f"; {pickle.name} is a pickle file, which is never opened" if pickle.exists() else ""
            raise InputError(f"{folder}: no {TENSORS}{why}")
        try:
            self._file = safe_open(self.path, framework="numpy")
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self.path}: not a readable safetensors file ({error})") from error
        self.names = set(self._file.keys())
        self.left = set(self.names)
        for name in sorted(self.names):
            kind = self._file.get_slice(name).get_dtype()
            if kind not in NUMBER_TYPES:
                raise InputError(
                    f"{self.path}: {name} has numbers of type {kind}; expected {', '.join(NUMBER_TYPES)}: quantised "
                    "adapters must be dequantised first"
                )

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Reads a tensor.

        Args:
            name: Its name.
            shape: Its shape.

        Returns:
            The tensor, float32.

        Raises:
            InputError: If it is missing or has another shape.
        """
        name = PREFIX + name
        found = tuple(self._file.get_slice(name).get_shape()) if name in self.names else None
        if found != shape:
            has = "no such tensor" if found is None else f"shape {found}"
            raise InputError(
                f"{self.path}: {name}: {has}; expected shape {shape} "
                f"(the file's tensors begin with: {', '.join(sorted(self.names)[:2])})"
            )
        self.left.discard(name)
        return self._file.get_slice(name)[:].astype(np.float32)

    def take_one_of(self, names: Iterable[str], shape: tuple[int, ...]) -> np.ndarray | None:
        """Reads a tensor that the file holds under one or several names; None if it does not.

        Raises:
            InputError: If it has another shape, or is another one under each name.
        """
        found = [(name, self.take(name, shape)) for name in names if self.holds(name)]
        for name, value in found[1:]:
            if not np.array_equal(found[0][1], value):
                raise InputError(
                    f"{self.path}: {found[0][0]} and {name} are one weight, and differ; save the adapter again"
                )
        return found[0][1] if found else None

    def holds(self, name: str) -> bool:
        """Whether the file has a tensor of that name."""
        return PREFIX + name in self.names

    def rows(self, name: str) -> int:
        """Size of a tensor's first dimension."""
        return self._file.get_slice(PREFIX + name).get_shape()[0]

    def refuse_what_is_left(self, speaker: str):
        """Checks that all of the file has been taken.

        Args:
            speaker: File that says what should be in it.

        Raises:
            InputError: If it has not.
        """
        if self.left:
            some = min(self.left)
            why = "; the base has no biases" if some.endswith(".bias") else ""
            raise InputError(
                f"{self.path}: holds {len(self.left)} tensors that {speaker} does not speak of, for instance {some}"
                f"{why}"
            )
