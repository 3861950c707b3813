"""adapter_model.safetensors of PEFT; what is taken of it is ticked off."""

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np

from qstar_jax.errors import InputError
from qstar_jax.models.family import Family
from qstar_jax.store.hub.reader import NUMBER_TYPES, tell_outside

TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."


class AdapterFile:
    """The tensors of an adapter's file, by the names that their modules have in files of the base.

    Args:
        folder: A folder in PEFT's format.
        family: Of the base; tensors of other parts of a multimodal model than its decoder are left out.

    Raises:
        InputError: If the file is missing, unreadable or a pickle, or holds other numbers than floats, or two tensors
            for one name.
    """

    def __init__(self, folder: Path, family: Family):
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
        self._stored: dict[str, str] = {}  # name in files of the base -> name in this one
        self.left = set()
        tell_outside(self.path, (name.removeprefix(PREFIX) for name in self._file.keys()), family)  # noqa: SIM118
        for name in sorted(self._file.keys()):
            own = family.canonical(name.removeprefix(PREFIX))
            if own is None:
                continue
            if own in self._stored:
                raise InputError(f"{self.path}: {self._stored[own]} and {name} are one tensor; remove one of them")
            if name.startswith(PREFIX):
                self._stored[own] = name
            self.left.add(name)
            kind = self._file.get_slice(name).get_dtype()
            if kind not in NUMBER_TYPES:
                raise InputError(
                    f"{self.path}: {name} has numbers of type {kind}; expected {', '.join(NUMBER_TYPES)}: quantised "
                    "adapters must be dequantised first"
                )

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Reads a tensor.

        Args:
            name: Its name, behind that of its module in files of the base.
            shape: Its shape.

        Returns:
            The tensor, float32.

        Raises:
            InputError: If it is missing or has another shape.
        """
        stored = self._stored.get(name)
        found = None if stored is None else tuple(self._file.get_slice(stored).get_shape())
        if found != shape:
            has = "no such tensor" if found is None else f"shape {found}"
            raise InputError(
                f"{self.path}: {stored or PREFIX + self.called(name)}: {has}; expected shape {shape} "
                f"(the file's tensors begin with: {', '.join(sorted(self._file.keys())[:2])})"
            )
        self.left.discard(stored)
        return self._file.get_slice(stored)[:].astype(np.float32)

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
        return name in self._stored

    def rows(self, name: str) -> int:
        """Size of a tensor's first dimension."""
        return self._file.get_slice(self._stored[name]).get_shape()[0]

    def called(self, module: str) -> str:
        """What the model of transformers for which the adapter was made calls a module (or one of its tensors).

        Files of the base may have another name for it, or another beginning of all names, where the decoder is a part
        of a multimodal model; which, the file's own names tell.

        Args:
            module: Its name in files of the base.
        """
        ours, theirs = self._beginnings
        parts = module.split(".")
        return ".".join(theirs + parts[len(ours) :]) if parts[: len(ours)] == ours else module

    @cached_property
    def _beginnings(self) -> tuple[list[str], list[str]]:
        """How names begin in files of the base, and how in this one; both are empty where all names are the same."""
        for own, stored in self._stored.items():
            ours, theirs = own.split("."), stored.removeprefix(PREFIX).split(".")
            if ours != theirs:
                while ours and theirs and ours[-1] == theirs[-1]:
                    ours.pop()
                    theirs.pop()
                return ours, theirs
        return [], []

    def refuse_what_is_left(self, speaker: str, biases: str):
        """Checks that all of the file has been taken.

        Args:
            speaker: File that says what should be in it.
            biases: Why biases should not.

        Raises:
            InputError: If it has not.
        """
        if self.left:
            some = min(self.left)
            why = f"; {biases}" if some.endswith(".bias") else ""
            raise InputError(
                f"{self.path}: holds {len(self.left)} tensors that {speaker} does not speak of, for instance {some}"
                f"{why}"
            )
