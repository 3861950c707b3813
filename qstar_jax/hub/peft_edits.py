"""What an adapter of PEFT does to each weight of its base, read from adapter_model.safetensors.

Weights are spoken of as they lie in a Hugging Face file: [outputs, inputs] for linear layers, [tokens, width] for the
two tables of the vocabulary. Every tensor of the file is used, or refused by its name.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np

from qstar_jax.errors import InputError
from qstar_jax.hub.peft_config import CONFIG, AdapterConfig
from qstar_jax.hub.peft_file import AdapterFile
from qstar_jax.models import CausalLM

EMBED, UNEMBED = "embed/embedding", "unembed/embedding"
# Behind the name of its module: a weight of the base itself, which PEFT writes down where the vocabulary was resized.
_OF_THE_BASE = ("base_layer.weight", "token_adapter.base_layer.weight", "original_module.weight")


@dataclass(frozen=True, eq=False)
class Edit:
    """What becomes of a weight W [O, I]: it is replaced, then W + left right, then its rows or columns are scaled.

    Attributes:
        value: What stands in its place, [O, I] or [O].
        left: Left factor of what is added, [O, R].
        right: Right factor, with the scale in it, [R, I].
        lengths: Norms that its rows have afterwards, [O, 1], or its columns, [1, I] (DoRA, arXiv 2402.09353).
        rows: Indices of rows that are replaced, and what stands there, [N] and [N, I].
    """

    value: np.ndarray | None = None
    left: np.ndarray | None = None
    right: np.ndarray | None = None
    lengths: np.ndarray | None = None
    rows: tuple[np.ndarray, np.ndarray] | None = None

    def does_the_same(self, other: "Edit") -> bool:
        """Whether another does the same to the same weight."""
        (mine, names), (others, other_names) = (jax.tree.flatten(vars(edit)) for edit in (self, other))
        return names == other_names and all(map(np.array_equal, mine, others))


@dataclass(frozen=True)
class Place:
    """Where the weight of a module lies.

    Attributes:
        path: Of the parameter here.
        layer: Its layer; None outside of blocks.
        shape: In a Hugging Face file.
    """

    path: str
    layer: int | None
    shape: tuple[int, ...]

    @property
    def is_layer(self) -> bool:
        """Whether it is a linear layer of a block."""
        return self.path.endswith("/kernel")

    @property
    def is_table(self) -> bool:
        """Whether it has a row for each token."""
        return self.path in (EMBED, UNEMBED)


def places_of(model: CausalLM) -> dict[str, Place]:
    """Lists the modules of a model that have a weight, by transformers' names.

    Args:
        model: A model; one whose tables are tied has a module for each of them all the same.
    """
    untied = replace(model.base, config=replace(model.config, tie_word_embeddings=False))
    leaves = jax.tree_util.tree_leaves_with_path(untied.abstract_params())
    shapes = {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf.shape for keys, leaf in leaves}
    places = {}
    for path, tensor in untied.tensors.items():
        layers, shape = (range(shapes[path][0]), shapes[path][1:]) if tensor.in_layers else ((None,), shapes[path])
        for layer in layers:
            module = tensor.name.format(layer=layer).removesuffix(".weight")
            places[module] = Place(path, layer, tensor.stored_shape(shape))
    return places


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
    return _Reading(AdapterFile(folder), config, base).edits()


class _Reading:
    """The steps of `read_edits`, and what they share."""

    def __init__(self, file: AdapterFile, config: AdapterConfig, base: CausalLM):
        self.file, self.config, self.base = file, config, base
        self.tied = base.config.tie_word_embeddings
        self.places = places_of(base)
        of_path = {place.path: module for module, place in self.places.items()}
        self.tables = of_path[EMBED], of_path[UNEMBED]
        self.vocabulary = self._vocabulary()
        for module in self.tables:
            self.places[module] = replace(self.places[module], shape=(self.vocabulary, self.places[module].shape[1]))

    def edits(self) -> tuple[CausalLM, dict[str, Edit]]:
        """See `read_edits`."""
        adapted = self._adapted()
        parts = [self._values(), {module: self._product(module) for module in adapted}, self._rows(adapted)]
        self.file.refuse_what_is_left(CONFIG)
        found = {
            module: Edit(**{name: value for part in parts for name, value in part.get(module, {}).items()})
            for module in self.places
            if any(module in part for part in parts)
        }
        embed, unembed = (found.get(module, Edit()) for module in self.tables)
        tied = self.tied and embed.does_the_same(unembed)
        if tied:
            found.pop(self.tables[1], None)
        shape = replace(self.base.config, vocab_size=self.vocabulary, tie_word_embeddings=tied)
        return replace(self.base, config=shape), found

    def _vocabulary(self) -> int:
        """Rows of both tables: those of the base, or of the tables that the file has in their place."""
        names = ("weight", "modules_to_save.weight", *_OF_THE_BASE)
        rows = {
            module: self.file.rows(f"{module}.{name}")
            for module in self.tables
            for name in names
            if self.file.holds(f"{module}.{name}")
        }
        size = self.base.config.vocab_size
        grown = next((found for found in rows.values() if found != size), size)
        for module in self.tables:
            own = rows.get(module, grown if self.tied and rows else size)
            if own != grown:
                raise InputError(
                    f"{self.file.path}: one table of the vocabulary has {grown} rows, and {module} {own}; save both: "
                    "model.save_pretrained(folder, save_embedding_layers=True)"
                )
        return grown

    def _with_tied(self, modules: set[str]) -> set[str]:
        """Modules, and both tables for one of them where PEFT was told to keep them the same."""
        both = self.tied and self.config.tied and modules & set(self.tables)
        return modules | set(self.tables) if both else modules

    def _adapted(self) -> list[str]:
        """Modules that have a pair of matrices."""
        layers = [module for module, place in self.places.items() if place.is_layer]
        found = {module for module in layers if self.config.adapts(module, is_layer=True)}
        found |= {module for module in self.tables if self.config.adapts(module, is_layer=False)}
        if not found:
            names = dict.fromkeys(module.split(".")[-1] for module in (*layers, *self.tables))
            targets = [self.config.targets] if isinstance(self.config.targets, str) else self.config.targets
            raise InputError(
                f"{self.config.path}: target_modules are some of {', '.join(names)}, or a regular expression over "
                f"whole names such as {layers[0]} (found: {', '.join(map(repr, targets)) or 'none at all'})"
            )
        found = self._with_tied(found)
        return [module for module in self.places if module in found]

    def _product(self, module: str) -> dict[str, np.ndarray]:
        """What a pair of matrices adds to a weight."""
        place, rank, take = self.places[module], self.config.rank_of(module), self.file.take
        outputs, inputs = place.shape
        if place.path == EMBED:
            left = take(f"{module}.lora_embedding_A", (rank, outputs)).T
            right = take(f"{module}.lora_embedding_B", (inputs, rank)).T
        else:
            right = take(f"{module}.lora_A.weight", (rank, inputs))
            left = take(f"{module}.lora_B.weight", (outputs, rank))
        found = {"left": left, "right": np.float32(self.config.scale_of(module)) * right}
        if self.config.dora:
            columns = place.path == EMBED
            lengths = take(f"{module}.lora_magnitude_vector", (inputs if columns else outputs,))
            found["lengths"] = lengths[None, :] if columns else lengths[:, None]
        return found

    def _values(self) -> dict[str, dict[str, np.ndarray]]:
        """Weights that stand in the place of the base's."""
        saved = self._with_tied({module for module in self.places if self.config.saves(module)})
        base, trained = {}, {}
        for module, place in self.places.items():
            own = [f"{module}.weight", f"{module}.modules_to_save.weight"] if module in saved else []
            names = [f"{module}.{name}" for name in (_OF_THE_BASE if own else ("weight", *_OF_THE_BASE))]
            base[module] = self.file.take_one_of(names, place.shape)
            trained[module] = self.file.take_one_of(own, place.shape)
            if own and trained[module] is None:
                raise InputError(f"{self.file.path}: no {module}.weight, of which modules_to_save speaks")
        if self.tied:
            self._share(base)
        values = {module: base[module] if trained[module] is None else trained[module] for module in self.places}
        return {module: {"value": value} for module, value in values.items() if value is not None}

    def _share(self, weights: dict[str, np.ndarray | None]):
        """Gives two tied tables the one weight that the file has for either."""
        found = [weights[module] for module in self.tables if weights[module] is not None]
        if len(found) == 2 and not np.array_equal(*found):
            raise InputError(
                f"{self.file.path}: {' and '.join(self.tables)} are one weight in the base (tie_word_embeddings), and "
                "differ here; name them in modules_to_save if they were trained apart"
            )
        for module in self.tables:
            weights[module] = found[0] if found else None

    def _rows(self, adapted: list[str]) -> dict[str, dict[str, tuple]]:
        """Rows of the tables that were trained alone."""
        chosen = {}
        for name, ids in self.config.tokens.items():
            modules = [module for module in self.tables if module.endswith(name)] if name else self.tables[:1]
            if not modules:
                raise InputError(
                    f"{self.config.path}: trainable_token_indices speaks of {name!r}; expected "
                    f"{' or '.join(self.tables)}"
                )
            chosen |= dict.fromkeys(modules, ids)
        for ids in chosen.values():
            if max(ids) >= self.vocabulary:
                raise InputError(
                    f"{self.config.path}: trainable_token_indices has {max(ids)}; the base has {self.vocabulary} tokens"
                )
        found = self._taken_rows(chosen)
        twice = [module for module in found if module in adapted or self.config.saves(module)]
        if twice:
            raise InputError(f"{self.config.path}: trainable_token_indices and another key both change {twice[0]}")
        return {module: {"rows": rows} for module, rows in found.items()}

    def _taken_rows(self, chosen: dict[str, tuple[int, ...]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        embed, unembed = self.tables
        names = {module: [f"{module}.token_adapter.trainable_tokens_delta"] for module in chosen}
        together = self.tied and embed in chosen and chosen.get(unembed, chosen[embed]) == chosen[embed]
        if together:  # PEFT keeps them the same, and saves the embedding's, or both
            names = {embed: [f"{module}.token_adapter.trainable_tokens_delta" for module in self.tables]}
        elif self.tied and self.config.tied and len(chosen) == 2:
            raise InputError(f"{self.config.path}: trainable_token_indices differ, and ensure_weight_tying is true")
        found = {}
        for module, of_module in names.items():
            shape = (len(chosen[module]), self.places[module].shape[1])
            rows = self.file.take_one_of(of_module, shape)
            rows = self.file.take(of_module[0], shape) if rows is None else rows
            last = {token: row for row, token in enumerate(chosen[module])}  # of a token that comes twice
            found[module] = np.array(list(last)), rows[list(last.values())]
        return dict.fromkeys(self.tables, found[embed]) if together else found
