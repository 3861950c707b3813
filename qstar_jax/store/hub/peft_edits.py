"""What an adapter of PEFT does to each weight of its base, read from adapter_model.safetensors.

Weights are spoken of as those of torch's modules: [outputs, inputs] for linear layers, whatever way round they are
stored, [tokens, width] for embeddings. Every tensor of the file is used, or refused by its name.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np

from qstar_jax.errors import InputError
from qstar_jax.models import CausalLM
from qstar_jax.models.tensors import Part
from qstar_jax.store.hub.peft_config import CONFIG, AdapterConfig
from qstar_jax.store.hub.peft_file import AdapterFile
from qstar_jax.store.hub.peft_modules import EMBED, UNEMBED, modules_of, rows_of

_DELTA = "token_adapter.trainable_tokens_delta"


@dataclass(frozen=True, eq=False)
class Edit:
    """What becomes of a module: its weight W [O, I] is replaced, then W + left right, then rows or columns are scaled.

    Attributes:
        value: What stands in the weight's place, [O, I] or [O].
        left: Left factor of what is added, [O, R].
        right: Right factor, with the scale in it, [R, I].
        lengths: Norms that its rows have afterwards, [O, 1], or its columns, [1, I] (DoRA, arXiv 2402.09353).
        rows: Indices of rows that are replaced, and what stands there, [N] and [N, I].
        bias: What stands in the place of its bias, [O].
    """

    value: np.ndarray | None = None
    left: np.ndarray | None = None
    right: np.ndarray | None = None
    lengths: np.ndarray | None = None
    rows: tuple[np.ndarray, np.ndarray] | None = None
    bias: np.ndarray | None = None

    def does_the_same(self, other: "Edit") -> bool:
        """Whether another does the same to the same weight."""
        (mine, names), (others, other_names) = (jax.tree.flatten(vars(edit)) for edit in (self, other))
        return names == other_names and all(map(np.array_equal, mine, others))

    def of_weight(self, part: Part) -> "Edit":
        """What becomes of a part of a fused weight: `right` is shared, and of the others each has its outputs' rows."""
        cut = {name: getattr(self, name) for name in ("value", "left", "lengths")}
        cut = {name: array[part.indices()] for name, array in cut.items() if array is not None}
        return Edit(**cut, right=self.right)

    def of_bias(self, part: Part | None) -> "Edit":
        """What becomes of the bias, or of a part of it, as a weight of its own."""
        return Edit(value=self.bias[rows_of(part)])


def read_edits(folder: Path, config: AdapterConfig, base: CausalLM) -> tuple[CausalLM, dict[str, Edit]]:
    """Reads an adapter.

    Args:
        folder: A folder in PEFT's format.
        config: Its adapter_config.json.
        base: The model to which it belongs.

    Returns:
        The model that the base becomes (its vocabulary may have grown, and its tables be tied no more), and what
        becomes of its weights, by transformers' names of their modules.

    Raises:
        InputError: If a tensor is missing, misshapen or has no place, or the file is a pickle or holds other numbers
            than floats.
    """
    return _Reading(AdapterFile(folder, base.family), config, base).edits()


def _of_the_base(name: str) -> tuple[str, ...]:
    """Names that PEFT gives to a tensor of the base itself, such as a table that was resized or a trained bias."""
    module, _, kind = name.rpartition(".")
    before = f"{module}." if module else ""
    return tuple(f"{before}{part}.{kind}" for part in ("base_layer", "token_adapter.base_layer", "original_module"))


class _Reading:
    """The steps of `read_edits`, and what they share."""

    def __init__(self, file: AdapterFile, config: AdapterConfig, base: CausalLM):
        self.file, self.config, self.base = file, config, base
        self.tied = base.config.tie_word_embeddings
        self.modules = modules_of(base)
        of_path = {path: name for name, module in self.modules.items() for path in module.weight}
        self.tables = of_path[EMBED], of_path[UNEMBED]
        self.vocabulary = self._vocabulary()
        for name in self.tables:
            self.modules[name] = replace(self.modules[name], shape=(self.vocabulary, self.modules[name].shape[1]))
        self.saved = self._with_tied({name for name in self.modules if config.saves(file.called(name))})

    def edits(self) -> tuple[CausalLM, dict[str, Edit]]:
        """See `read_edits`."""
        adapted = self._adapted()
        parts = [self._values(), {name: self._product(name) for name in adapted}]
        parts += [self._biases(adapted), self._rows(adapted)]
        self._refuse_what_is_left()
        found = {
            name: Edit(**{field: value for part in parts for field, value in part.get(name, {}).items()})
            for name in self.modules
            if any(name in part for part in parts)
        }
        embed, unembed = (found.get(name, Edit()) for name in self.tables)
        tied = self.tied and embed.does_the_same(unembed)
        if tied:
            found.pop(self.tables[1], None)
        shape = replace(self.base.config, vocab_size=self.vocabulary, tie_word_embeddings=tied)
        return replace(self.base, config=shape), found

    def _vocabulary(self) -> int:
        """Rows of both tables: those of the base, or of the tables that the file has in their place."""
        kinds = ("weight", "modules_to_save.weight", *_of_the_base("weight"))
        rows = {
            name: self.file.rows(f"{name}.{kind}")
            for name in self.tables
            for kind in kinds
            if self.file.holds(f"{name}.{kind}")
        }
        size = self.base.config.vocab_size
        grown = next((found for found in rows.values() if found != size), size)
        for name in self.tables:
            own = rows.get(name, grown if self.tied and rows else size)
            if own != grown:
                raise InputError(
                    f"{self.file.path}: one table of the vocabulary has {grown} rows, and {name} {own}; save both: "
                    "model.save_pretrained(folder, save_embedding_layers=True)"
                )
        return grown

    def _with_tied(self, names: set[str]) -> set[str]:
        """Modules, and both tables for one of them where PEFT was told to keep them the same."""
        both = self.tied and self.config.tied and names & set(self.tables)
        return names | set(self.tables) if both else names

    def _adapted(self) -> list[str]:
        """Modules that have a pair of matrices."""
        able = {name: module for name, module in self.modules.items() if not module.is_norm}
        found = {
            name
            for name, module in able.items()
            if self.config.adapts(self.file.called(name), is_layer=module.is_layer)
        }
        if not found:
            ends = dict.fromkeys(name.split(".")[-1] for name in sorted(able, key=lambda name: not able[name].is_layer))
            example = next(name for name, module in able.items() if module.is_layer)
            targets = [self.config.targets] if isinstance(self.config.targets, str) else self.config.targets
            raise InputError(
                f"{self.config.path}: target_modules are some of {', '.join(ends)}, or a regular expression over "
                f"whole names such as {example} (found: {', '.join(map(repr, targets)) or 'none at all'})"
            )
        found = self._with_tied(found)
        return [name for name in self.modules if name in found]

    def _product(self, name: str) -> dict[str, np.ndarray]:
        """What a pair of matrices adds to a weight."""
        module, called, take = self.modules[name], self.file.called(name), self.file.take
        rank, (outputs, inputs) = self.config.rank_of(called), module.shape
        if module.is_embedding:
            left = take(f"{name}.lora_embedding_A", (rank, outputs)).T
            right = take(f"{name}.lora_embedding_B", (inputs, rank)).T
        else:
            right = take(f"{name}.lora_A.weight", (rank, inputs))
            left = take(f"{name}.lora_B.weight", (outputs, rank))
        found = {"left": left, "right": np.float32(self.config.scale_of(called)) * right}
        if self.config.dora:
            columns = module.is_embedding
            lengths = take(f"{name}.lora_magnitude_vector", (inputs if columns else outputs,))
            found["lengths"] = lengths[None, :] if columns else lengths[:, None]
        return found

    def _values(self) -> dict[str, dict[str, np.ndarray]]:
        """Weights that stand in the place of the base's."""
        base, trained = {}, {}
        for name, module in self.modules.items():
            shape = module.shape[::-1] if module.turned else module.shape
            own = [f"{name}.weight", f"{name}.modules_to_save.weight"] if name in self.saved else []
            names = _of_the_base(f"{name}.weight") if own else (f"{name}.weight", *_of_the_base(f"{name}.weight"))
            base[name], trained[name] = self.file.take_one_of(names, shape), self.file.take_one_of(own, shape)
            if own and trained[name] is None:
                self._refuse_what_is_missing(f"{name}.weight", "modules_to_save")
        if self.tied:
            self._share(base)
        values = {name: base[name] if trained[name] is None else trained[name] for name in self.modules}
        return {
            name: {"value": value.T if self.modules[name].turned else value}
            for name, value in values.items()
            if value is not None
        }

    def _share(self, weights: dict[str, np.ndarray | None]):
        """Gives two tied tables the one weight that the file has for either."""
        found = [weights[name] for name in self.tables if weights[name] is not None]
        if len(found) == 2 and not np.array_equal(*found):
            raise InputError(
                f"{self.file.path}: {' and '.join(self.tables)} are one weight in the base (tie_word_embeddings), and "
                "differ here; name them in modules_to_save if they were trained apart"
            )
        for name in self.tables:
            weights[name] = found[0] if found else None

    def _biases(self, adapted: list[str]) -> dict[str, dict[str, np.ndarray]]:
        """Biases that were trained: of modules that were trained whole, and those of which `bias` speaks."""
        spoken_of = {"none": (), "lora_only": adapted, "all": self.modules}[self.config.bias]
        found = {}
        for name, module in self.modules.items():
            if not module.bias or not (name in self.saved or name in spoken_of):
                continue
            own, of_base = [f"{name}.bias", f"{name}.modules_to_save.bias"], _of_the_base(f"{name}.bias")
            base = self.file.take_one_of(of_base if name in self.saved else (own[0], *of_base), module.shape[:1])
            value = self.file.take_one_of(own, module.shape[:1]) if name in self.saved else base
            if value is None:
                self._refuse_what_is_missing(f"{name}.bias", "modules_to_save" if name in self.saved else "bias")
            found[name] = {"bias": value}
        return found

    def _refuse_what_is_missing(self, name: str, key: str):
        without = '; "bias": "none" goes on with those of the base, as PEFT does' if key == "bias" else ""
        raise InputError(f"{self.file.path}: no {self.file.called(name)}, of which {key} speaks{without}")

    def _refuse_what_is_left(self):
        biases = "bias is 'none' there" if any(m.bias for m in self.modules.values()) else "the base has no biases"
        self.file.refuse_what_is_left(CONFIG, biases)

    def _rows(self, adapted: list[str]) -> dict[str, dict[str, tuple]]:
        """Rows of the tables that were trained alone."""
        chosen = {}
        for name, ids in self.config.tokens.items():
            tables = [table for table in self.tables if self.file.called(table).endswith(name)]
            tables = tables if name else self.tables[:1]
            if not tables:
                raise InputError(
                    f"{self.config.path}: trainable_token_indices speaks of {name!r}; expected "
                    f"{' or '.join(self.tables)}"
                )
            chosen |= dict.fromkeys(tables, ids)
        for ids in chosen.values():
            if max(ids) >= self.vocabulary:
                raise InputError(
                    f"{self.config.path}: trainable_token_indices has {max(ids)}; the base has {self.vocabulary} tokens"
                )
        found = self._taken_rows(chosen)
        twice = [name for name in found if name in adapted or name in self.saved]
        if twice:
            raise InputError(f"{self.config.path}: trainable_token_indices and another key both change {twice[0]}")
        return {name: {"rows": rows} for name, rows in found.items()}

    def _taken_rows(self, chosen: dict[str, tuple[int, ...]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        embed, unembed = self.tables
        names = {name: [f"{name}.{_DELTA}"] for name in chosen}
        together = self.tied and embed in chosen and chosen.get(unembed, chosen[embed]) == chosen[embed]
        if together:  # PEFT keeps them the same, and saves the embedding's, or both
            names = {embed: [f"{name}.{_DELTA}" for name in self.tables]}
        elif self.tied and self.config.tied and len(chosen) == 2:
            raise InputError(f"{self.config.path}: trainable_token_indices differ, and ensure_weight_tying is true")
        found = {}
        for name, of_module in names.items():
            shape = (len(chosen[name]), self.modules[name].shape[1])
            rows = self.file.take_one_of(of_module, shape)
            rows = self.file.take(of_module[0], shape) if rows is None else rows
            last = {token: row for row, token in enumerate(chosen[name])}  # of a token that comes twice
            found[name] = np.array(list(last)), rows[list(last.values())]
        return dict.fromkeys(self.tables, found[embed]) if together else found
