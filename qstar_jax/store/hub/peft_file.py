"""The adapter_model.safetensors of PEFT, tracking which of its tensors have been read."""

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np

from qstar_jax.errors import InputError
from qstar_jax.models.family import Family
from qstar_jax.store.hub.reader import NUMBER_TYPES, warn_outside

TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."


class AdapterFile:
    """The tensors of an adapter, by their names in files of the base.

    Args:
        folder: Folder of a PEFT adapter.
        family: Family of the base; tensors outside of the decoder of a multimodal model are left out.

    Raises:
        InputError: If the file is missing, unreadable or a pickle, or holds numbers other than floats or two tensors
            with the same name.
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
        self._stored: dict[str, str] = {}  # name in files of the base -> name in this file
        self.unread = set()
        warn_outside(self.path, (name.removeprefix(PREFIX) for name in self._file.keys()), family)  # noqa: SIM118
        for name in sorted(self._file.keys()):
            canonical = family.canonical(name.removeprefix(PREFIX))
            if canonical is None:
                continue
            if canonical in self._stored:
                raise InputError(
                    f"{self.path}: {self._stored[canonical]} and {name} are the same tensor; remove one of them"
                )
            if name.startswith(PREFIX):
                self._stored[canonical] = name
            self.unread.add(name)
            kind = self._file.get_slice(name).get_dtype()
            if kind not in NUMBER_TYPES:
                raise InputError(
                    f"{self.path}: {name} has numbers of type {kind}; expected {', '.join(NUMBER_TYPES)}: dequantize "
                    "quantized adapters first"
                )

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Reads a tensor as float32.

        Args:
            name: Its name, starting with that of its module in files of the base.
            shape: Its expected shape.

        Raises:
            InputError: If it is missing, has another shape, or is not finite.
        """
        stored = self._stored.get(name)
        actual = None if stored is None else tuple(self._file.get_slice(stored).get_shape())
        if actual != shape:
            problem = "no such tensor" if actual is None else f"shape {actual}"
            raise InputError(
                f"{self.path}: {stored or PREFIX + self.peft_name(name)}: {problem}; expected shape {shape} "
                f"(the file's tensors begin with: {', '.join(sorted(self._file.keys())[:2])})"
            )
        self.unread.discard(stored)
        values = self._file.get_slice(stored)[:].astype(np.float32)
        if not np.isfinite(values).all():
            raise InputError(f"{self.path}: {stored} holds numbers that are not finite; save the adapter again")
        return values

    def take_one_of(self, names: Iterable[str], shape: tuple[int, ...]) -> np.ndarray | None:
        """Reads a tensor that is stored under one or more of several names; returns None if there is none.

        Raises:
            InputError: If it has another shape, or different values under different names.
        """
        values = [(name, self.take(name, shape)) for name in names if self.holds(name)]
        for name, value in values[1:]:
            if not np.array_equal(values[0][1], value):
                raise InputError(
                    f"{self.path}: {values[0][0]} and {name} are the same weight but differ; save the adapter again"
                )
        return values[0][1] if values else None

    def holds(self, name: str) -> bool:
        """Whether the file has a tensor of that name."""
        return name in self._stored

    def rows(self, name: str) -> int:
        """Returns the size of a tensor's first dimension."""
        return self._file.get_slice(self._stored[name]).get_shape()[0]

    def peft_name(self, module: str) -> str:
        """Returns the name of a module (or tensor) in the transformers model on which the adapter was trained.

        It may differ from the name in files of the base by a prefix, if the decoder is part of a multimodal model; the
        prefix is inferred from the names in the adapter's file.
        """
        ours, theirs = self._prefixes
        parts = module.split(".")
        return ".".join(theirs + parts[len(ours) :]) if parts[: len(ours)] == ours else module

    @cached_property
    def _prefixes(self) -> tuple[list[str], list[str]]:
        """The prefixes of names in files of the base and in this file, without what they share at the end."""
        for canonical, stored in self._stored.items():
            ours, theirs = canonical.split("."), stored.removeprefix(PREFIX).split(".")
            if ours != theirs:
                while ours and theirs and ours[-1] == theirs[-1]:
                    ours.pop()
                    theirs.pop()
                return ours, theirs
        return [], []

    def check_all_read(self, config: str, biases: str):
        """Checks that every tensor has been read.

        Args:
            config: Name of the file that determines which tensors are expected.
            biases: Why no biases are expected.

        Raises:
            InputError: If a tensor was not read.
        """
        if self.unread:
            example = min(self.unread)
            why = f"; {biases}" if example.endswith(".bias") else ""
            raise InputError(
                f"{self.path}: holds {len(self.unread)} tensors that {config} does not mention, for instance {example}"
                f"{why}"
            )
