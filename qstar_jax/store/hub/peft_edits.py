"""The edits that a PEFT adapter makes to the weights of its base, read from adapter_model.safetensors.

Weights have the shapes of torch's modules: [outputs, inputs] for linear layers, however they are stored, and
[tokens, width] for embeddings. Every tensor of the file is used, or refused by name.
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
from qstar_jax.store.hub.peft_modules import EMBED, UNEMBED, modules_of, output_indices

_DELTA = "token_adapter.trainable_tokens_delta"


@dataclass(frozen=True, eq=False)
class Edit:
    """Edit of a module: replace its weight W [O, I], then add left @ right, then rescale its rows or columns.

    Attributes:
        value: Replaces the weight, [O, I] or [O].
        left: Left factor of the product to add, [O, R].
        right: Right factor, including the scale, [R, I].
        norms: New norms of the rows, [O, 1], or of the columns, [1, I] (DoRA, arXiv 2402.09353).
        rows: Indices of rows to replace, [N], and their values, [N, I].
        bias: Replaces the bias, [O].
    """

    value: np.ndarray | None = None
    left: np.ndarray | None = None
    right: np.ndarray | None = None
    norms: np.ndarray | None = None
    rows: tuple[np.ndarray, np.ndarray] | None = None
    bias: np.ndarray | None = None

    def equals(self, other: "Edit") -> bool:
        """Whether another edit changes a weight in the same way."""
        (arrays, names), (other_arrays, other_names) = (jax.tree.flatten(vars(edit)) for edit in (self, other))
        return names == other_names and all(map(np.array_equal, arrays, other_arrays))

    def of_weight(self, part: Part) -> "Edit":
        """Returns the edit of one part of a fused weight: `right` is shared, and the rest indexed by outputs."""
        by_output = {name: getattr(self, name) for name in ("value", "left", "norms")}
        by_output = {name: array[part.indices()] for name, array in by_output.items() if array is not None}
        return Edit(**by_output, right=self.right)

    def of_bias(self, part: Part | None) -> "Edit":
        """Returns the edit of the bias, or of a part of it, as that of a weight."""
        return Edit(value=self.bias[output_indices(part)])


def read_edits(folder: Path, config: AdapterConfig, base: CausalLM) -> tuple[CausalLM, dict[str, Edit]]:
    """Reads an adapter.

    Returns:
        The adapted model (its vocabulary may have grown, and its embeddings may be untied), and the edits of its
        modules, by their names in transformers.

    Raises:
        InputError: If a tensor is missing, unused or has the wrong shape, or the file is a pickle or holds numbers
            other than floats.
    """
    return _AdapterReader(AdapterFile(folder, base.family), config, base).edits()


def _base_names(name: str) -> tuple[str, ...]:
    """Returns the names in PEFT of a tensor of the base itself, such as a resized embedding or a trained bias."""
    module, _, kind = name.rpartition(".")
    prefix = f"{module}." if module else ""
    return tuple(
        f"{prefix}{wrapper}.{kind}" for wrapper in ("base_layer", "token_adapter.base_layer", "original_module")
    )


class _AdapterReader:
    """The steps of `read_edits`, and the state that they share."""

    def __init__(self, file: AdapterFile, config: AdapterConfig, base: CausalLM):
        self.file, self.config, self.base = file, config, base
        self.tied = base.config.tie_word_embeddings
        self.modules = modules_of(base)
        module_of = {path: name for name, module in self.modules.items() for path in module.weight}
        self.tables = module_of[EMBED], module_of[UNEMBED]
        self.vocabulary = self._vocabulary()
        for name in self.tables:
            self.modules[name] = replace(self.modules[name], shape=(self.vocabulary, self.modules[name].shape[1]))
        self.saved = self._with_tied({name for name in self.modules if config.saves(file.peft_name(name))})
        self._check_saved()

    def edits(self) -> tuple[CausalLM, dict[str, Edit]]:
        """See `read_edits`."""
        # Read everything that changes a module: replaced weights, low-rank products, biases and single rows.
        adapted = self._adapted()
        parts = [self._values(), {name: self._product(name) for name in adapted}]
        parts += [self._biases(adapted), self._rows(adapted)]
        self._check_all_read()
        edits = {
            name: Edit(**{field: value for part in parts for field, value in part.get(name, {}).items()})
            for name in self.modules
            if any(name in part for part in parts)
        }
        # Embeddings stay tied as long as both are edited in the same way.
        embed, unembed = (edits.get(name, Edit()) for name in self.tables)
        tied = self.tied and embed.equals(unembed)
        if tied:
            edits.pop(self.tables[1], None)
        config = replace(self.base.config, vocab_size=self.vocabulary, tie_word_embeddings=tied)
        return replace(self.base, config=config), edits

    def _check_saved(self):
        """Checks that each name of modules_to_save is of a module; a multimodal model has some that are not read."""
        names = [self.file.peft_name(name) for name in self.modules]
        for saved in () if self.base.family.unwrap else self.config.saved:
            if not any(map(replace(self.config, saved=(saved,)).saves, names)):
                raise InputError(
                    f"{self.config.path}: modules_to_save names {saved!r}, and the base has no such module (found: "
                    f"{', '.join(sorted({name.rpartition('.')[2] for name in names}))}); remove it"
                )

    def _vocabulary(self) -> int:
        """Returns the size of the vocabulary, which replaced tables may have extended."""
        kinds = ("weight", "modules_to_save.weight", *_base_names("weight"))
        rows = {
            name: self.file.rows(f"{name}.{kind}")
            for name in self.tables
            for kind in kinds
            if self.file.holds(f"{name}.{kind}")
        }
        size = self.base.config.vocab_size
        new_size = next((count for count in rows.values() if count != size), size)
        for name in self.tables:
            count = rows.get(name, new_size if self.tied and rows else size)
            if count != new_size:
                raise InputError(
                    f"{self.file.path}: one embedding has {new_size} rows, but {name} has {count}; save both: "
                    "model.save_pretrained(folder, save_embedding_layers=True)"
                )
        return new_size

    def _with_tied(self, names: set[str]) -> set[str]:
        """Adds the second table to the first, or vice versa, if PEFT was told to keep them equal."""
        both = self.tied and self.config.tied and names & set(self.tables)
        return names | set(self.tables) if both else names

    def _adapted(self) -> list[str]:
        """Returns the modules that have a pair of low-rank matrices."""
        adaptable = {name: module for name, module in self.modules.items() if not module.is_norm}
        adapted = {
            name
            for name, module in adaptable.items()
            if self.config.adapts(self.file.peft_name(name), is_layer=module.is_layer)
        }
        if not adapted:
            layers_first = sorted(adaptable, key=lambda name: not adaptable[name].is_layer)
            suffixes = dict.fromkeys(name.split(".")[-1] for name in layers_first)
            example = next(name for name, module in adaptable.items() if module.is_layer)
            targets = [self.config.targets] if isinstance(self.config.targets, str) else self.config.targets
            raise InputError(
                f"{self.config.path}: target_modules must be among {', '.join(suffixes)}, or a regular expression over "
                f"whole names such as {example} (found: {', '.join(map(repr, targets)) or 'none at all'})"
            )
        adapted = self._with_tied(adapted)
        return [name for name in self.modules if name in adapted]

    def _product(self, name: str) -> dict[str, np.ndarray]:
        """Reads the pair of matrices of a module."""
        module, peft_name, take = self.modules[name], self.file.peft_name(name), self.file.take
        rank, (outputs, inputs) = self.config.rank_of(peft_name), module.shape
        if module.is_embedding:
            left = take(f"{name}.lora_embedding_A", (rank, outputs)).T
            right = take(f"{name}.lora_embedding_B", (inputs, rank)).T
        else:
            right = take(f"{name}.lora_A.weight", (rank, inputs))
            left = take(f"{name}.lora_B.weight", (outputs, rank))
        fields = {"left": left, "right": np.float32(self.config.scale_of(peft_name)) * right}
        if self.config.dora:
            by_column = module.is_embedding
            norms = take(f"{name}.lora_magnitude_vector", (inputs if by_column else outputs,))
            fields["norms"] = norms[None, :] if by_column else norms[:, None]
        return fields

    def _values(self) -> dict[str, dict[str, np.ndarray]]:
        """Reads weights that replace those of the base."""
        base, trained = {}, {}
        for name, module in self.modules.items():
            # A fully trained module is stored twice: its trained weight, and perhaps that of the base.
            shape = module.shape[::-1] if module.transposed else module.shape
            trained_names = [f"{name}.weight", f"{name}.modules_to_save.weight"] if name in self.saved else []
            base_names = _base_names(f"{name}.weight")
            base_names = base_names if trained_names else (f"{name}.weight", *base_names)
            base[name] = self.file.take_one_of(base_names, shape)
            trained[name] = self.file.take_one_of(trained_names, shape)
            if trained_names and trained[name] is None:
                self._refuse_missing(f"{name}.weight", "modules_to_save")
        if self.tied:
            self._share(base)
        values = {name: base[name] if trained[name] is None else trained[name] for name in self.modules}
        return {
            name: {"value": value.T if self.modules[name].transposed else value}
            for name, value in values.items()
            if value is not None
        }

    def _share(self, weights: dict[str, np.ndarray | None]):
        """Gives both tied tables the weight that the file has for either."""
        stored = [weights[name] for name in self.tables if weights[name] is not None]
        if len(stored) == 2 and not np.array_equal(*stored):
            raise InputError(
                f"{self.file.path}: {' and '.join(self.tables)} are one weight in the base (tie_word_embeddings), but "
                "differ here; name them in modules_to_save if they were trained separately"
            )
        for name in self.tables:
            weights[name] = stored[0] if stored else None

    def _biases(self, adapted: list[str]) -> dict[str, dict[str, np.ndarray]]:
        """Reads trained biases: of fully trained modules, and those that `bias` selects."""
        selected = {"none": (), "lora_only": adapted, "all": self.modules}[self.config.bias]
        biases = {}
        for name, module in self.modules.items():
            if not module.bias or not (name in self.saved or name in selected):
                continue
            trained_names = [f"{name}.bias", f"{name}.modules_to_save.bias"]
            base_names = _base_names(f"{name}.bias")
            base_names = base_names if name in self.saved else (trained_names[0], *base_names)
            base = self.file.take_one_of(base_names, module.shape[:1])
            value = self.file.take_one_of(trained_names, module.shape[:1]) if name in self.saved else base
            if value is None:
                self._refuse_missing(f"{name}.bias", "modules_to_save" if name in self.saved else "bias")
            biases[name] = {"bias": value}
        return biases

    def _refuse_missing(self, name: str, key: str):
        fix = '; "bias": "none" keeps those of the base, as PEFT does' if key == "bias" else ""
        raise InputError(f"{self.file.path}: no {self.file.peft_name(name)}, which {key} selects{fix}")

    def _check_all_read(self):
        biases = "its bias is 'none'" if any(m.bias for m in self.modules.values()) else "the base has no biases"
        self.file.check_all_read(CONFIG, biases)

    def _rows(self, adapted: list[str]) -> dict[str, dict[str, tuple]]:
        """Reads single trained rows of the embeddings."""
        # Resolve the names of embeddings to tables.
        selected = {}
        for name, ids in self.config.tokens.items():
            tables = [table for table in self.tables if self.file.peft_name(table).endswith(name)]
            tables = tables if name else self.tables[:1]
            if not tables:
                raise InputError(
                    f"{self.config.path}: trainable_token_indices names {name!r}; expected {' or '.join(self.tables)}"
                )
            selected |= dict.fromkeys(tables, ids)
        for ids in selected.values():
            if max(ids) >= self.vocabulary:
                raise InputError(
                    f"{self.config.path}: trainable_token_indices has {max(ids)}; the base has {self.vocabulary} tokens"
                )
        rows = self._take_rows(selected)
        conflicts = [name for name in rows if name in adapted or name in self.saved]
        if conflicts:
            raise InputError(f"{self.config.path}: trainable_token_indices and another key both change {conflicts[0]}")
        return {name: {"rows": edit} for name, edit in rows.items()}

    def _take_rows(self, selected: dict[str, tuple[int, ...]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        embed, unembed = self.tables
        names = {name: [f"{name}.{_DELTA}"] for name in selected}
        shared = self.tied and embed in selected and selected.get(unembed, selected[embed]) == selected[embed]
        if shared:  # PEFT keeps them equal, and saves those of the input embedding, or both
            names = {embed: [f"{name}.{_DELTA}" for name in self.tables]}
        elif self.tied and self.config.tied and len(selected) == 2:
            raise InputError(f"{self.config.path}: trainable_token_indices differ, but ensure_weight_tying is true")
        edits = {}
        for name, aliases in names.items():
            shape = (len(selected[name]), self.modules[name].shape[1])
            rows = self.file.take_one_of(aliases, shape)
            rows = self.file.take(aliases[0], shape) if rows is None else rows
            last = {token: row for row, token in enumerate(selected[name])}  # the last row of a repeated token counts
            edits[name] = np.array(list(last)), rows[list(last.values())]
        return dict.fromkeys(self.tables, edits[embed]) if shared else edits
