"""One way to open a model, wherever it lies: an Orbax checkpoint of a run, a Hugging Face folder, or a hub name."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jax.sharding import Mesh

from qstar_jax import hub
from qstar_jax.checkpoints import Description, find_checkpoint, read_checkpoint_params, read_description, reference_of
from qstar_jax.config import ComputeOptions, MeshOptions
from qstar_jax.models import CausalLM
from qstar_jax.models.causal_lm import Params
from qstar_jax.sharding import tree_shardings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to run.

    Attributes:
        model: The model, without its parameters.
        params: Its parameters, on their shardings.
        tokenizer: Its tokenizer.
        source: Folder from which it came.
        description: What its run recorded, where it came from a checkpoint.
    """

    model: CausalLM
    params: Params
    tokenizer: "PreTrainedTokenizerBase"
    source: Path
    description: Description | None = None

    @property
    def reference(self) -> Path | None:
        """The reference that lies beside a checkpoint of a DPO run."""
        return None if self.description is None else reference_of(self.source)


def load_model(source: str | Path, compute: ComputeOptions, mesh: Mesh, mesh_options: MeshOptions) -> LoadedModel:
    """Opens a model.

    Args:
        source: A run's folder or one of its checkpoints, a Hugging Face folder, or a hub name.
        compute: Types and rematerialisation.
        mesh: Devices on which the parameters go.
        mesh_options: How they are cut.

    Returns:
        The model with its parameters and tokenizer.

    Raises:
        InputError: If nothing usable is there.
    """
    checkpoint = find_checkpoint(Path(source).expanduser())
    if checkpoint is not None:
        description = read_description(checkpoint)
        model = description.build_model(compute)
        params = read_checkpoint_params(checkpoint, model, param_shardings(model, mesh, mesh_options))
        return LoadedModel(model, params, description.build_tokenizer(), checkpoint, description)
    folder = hub.open_folder(str(source))
    model = CausalLM.from_hf(hub.read_config(folder), compute)
    params = hub.read_params(folder, model, param_shardings(model, mesh, mesh_options))
    return LoadedModel(model, params, hub.read_tokenizer(folder), folder)


def param_shardings(model: CausalLM, mesh: Mesh, options: MeshOptions):
    """Returns the shardings of a model's parameters: the general rule, the family's overrides, the user's overrides."""
    return tree_shardings(model.abstract_params(), mesh, options, model.family.SHARDING_OVERRIDES)
