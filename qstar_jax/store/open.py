"""Opens a model from a checkpoint of a run, a Hugging Face folder, a PEFT adapter or a name on the Hub."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import Mesh

from qstar_jax.config import ComputeOptions, MeshOptions
from qstar_jax.errors import InputError
from qstar_jax.models import CausalLM
from qstar_jax.models.causal_lm import Params
from qstar_jax.models.decoder import SHARDING_OVERRIDES
from qstar_jax.models.lora import attach_adapter, merge_adapter, split_adapter
from qstar_jax.sharding import tree_shardings
from qstar_jax.store import hub
from qstar_jax.store.checkpoints import (
    BASE,
    Description,
    find_checkpoint,
    read_checkpoint_params,
    read_description,
    reference_of,
)
from qstar_jax.store.identity import check_weights, model_identity

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to run.

    Attributes:
        model: The model, without its parameters.
        params: Its parameters, on their shardings.
        tokenizer: Its tokenizer.
        source: Folder from which it was loaded.
        description: What its run recorded, if it was loaded from a checkpoint.
        generation: Contents of its generation_config.json, including the EOS ids of config.json.
    """

    model: CausalLM
    params: Params
    tokenizer: "PreTrainedTokenizerBase"
    source: Path
    description: Description | None = None
    generation: dict[str, Any] = field(default_factory=dict)

    @property
    def reference(self) -> Path | None:
        """The reference stored with a checkpoint of a DPO run."""
        return None if self.description is None else reference_of(self.source, self.description)

    def identity(self) -> dict[str, Any]:
        """Returns the identity of the model, its parameters and its tokenizer; see `model_identity`."""
        return model_identity(self.model, self.params, self.tokenizer)


def load_model(source: str | Path, compute: ComputeOptions, mesh: Mesh, mesh_options: MeshOptions) -> LoadedModel:
    """Opens a model; an adapter is merged into its base.

    Args:
        source: Folder of a run or of one of its checkpoints, a Hugging Face folder, the folder of a PEFT adapter (which
            names its base), or a name on the Hub of either.
        compute: Dtypes, attention and rematerialization.
        mesh: Devices for the parameters.
        mesh_options: How to shard them.

    Raises:
        InputError: If there is no usable model.
    """
    checkpoint = find_checkpoint(Path(source).expanduser())
    if checkpoint is not None:
        description = read_description(checkpoint)
        model = description.build_model(compute)
        params = read_checkpoint_params(checkpoint, model, param_shardings(model, mesh, mesh_options))
        if model.lora is not None:
            # The base is stored once per run: check that it is still the one the adapter was trained on.
            recorded = description.comparable(compute, description.base)
            base, base_params = checkpoint.parent.parent / BASE, split_adapter(params)[0]
            check_weights(model.base, base_params, recorded, base, "open another run")
        merged = _merge(model, params)
        return LoadedModel(*merged, description.build_tokenizer(), checkpoint, description, description.generation)
    folder = hub.open_folder(str(source))
    if hub.is_adapter(folder):
        return _load_adapter(folder, compute, mesh, mesh_options)
    return _load_folder(folder, compute, mesh, mesh_options)


def find_model(source: str | Path) -> Path:
    """Finds what `load_model` would open: a checkpoint, or a folder.

    Raises:
        InputError: If there is neither.
    """
    return find_checkpoint(Path(source).expanduser()) or hub.open_folder(str(source))


def _load_folder(folder: Path, compute: ComputeOptions, mesh: Mesh, mesh_options: MeshOptions) -> LoadedModel:
    model = hub.read_model(folder, compute)
    params = hub.read_params(folder, model, param_shardings(model, mesh, mesh_options))
    generation = hub.read_generation_config(folder)
    hub.check_eos(generation, model.config.vocab_size, folder)
    return LoadedModel(model, params, hub.read_tokenizer(folder), folder, generation=generation)


def _load_adapter(
    folder: Path, compute: ComputeOptions, mesh: Mesh, mesh_options: MeshOptions, dependents: tuple[Path, ...] = ()
) -> LoadedModel:
    """Opens an adapter; `dependents` are the adapters whose base it is."""
    # Open the base: a folder, a name on the Hub, a checkpoint, or another adapter.
    config = hub.read_adapter_config(folder)
    try:
        base_folder = hub.open_folder(config.base, config.revision)
    except InputError as error:
        raise InputError(f"{config.path}: base_model_name_or_path: {error}") from error
    dependents = (*dependents, folder.resolve())
    if base_folder.resolve() == folder.resolve():  # an adapter may be saved into the folder of its base
        base = _load_folder(folder, compute, mesh, mesh_options)
    elif base_folder.resolve() in dependents:
        raise InputError(f"{config.path}: base_model_name_or_path leads back to {base_folder}, an adapter of this one")
    elif find_checkpoint(base_folder) is None and hub.is_adapter(base_folder):
        base = _load_adapter(base_folder, compute, mesh, mesh_options, dependents)
    else:
        base = load_model(base_folder, compute, mesh, mesh_options)
    # Merge the adapter into it.
    model, edits = hub.read_edits(folder, config, base.model)
    params = hub.apply_edits(model, edits, base.params, param_shardings(model, mesh, mesh_options))
    # The adapter's tokenizer and generation settings take precedence over those of the base.
    tokenizer = hub.read_adapter_tokenizer(folder, base.tokenizer)
    has_generation = (folder / hub.GENERATION).is_file()
    generation = hub.read_generation_config(folder) if has_generation else base.generation
    hub.check_eos(generation, model.config.vocab_size, folder)
    return LoadedModel(model, params, tokenizer, folder, generation=generation)


def _merge(model: CausalLM, params: Params) -> tuple[CausalLM, Params]:
    if model.lora is None:
        return model, params
    merge = jax.jit(lambda base, adapter: merge_adapter(attach_adapter(base, adapter), model.lora), donate_argnums=0)
    return model.base, merge(*split_adapter(params))


def param_shardings(model: CausalLM, mesh: Mesh, options: MeshOptions):
    """Returns the shardings of a model's parameters, by the user's overrides, the decoder's hints and the rule."""
    return tree_shardings(model.abstract_params(), mesh, options, SHARDING_OVERRIDES)
