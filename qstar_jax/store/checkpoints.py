"""Orbax checkpoints: sharded, asynchronous, and with all that another program needs to use them beside the parameters.

A run folder holds `checkpoints/STEP/` and, after DPO, `reference/`; where an adapter is trained, the steps hold the
adapter and `base/` the frozen rest, which is the reference as well. Each of these folders is an Orbax checkpoint of
`params` and `description` (JSON: the model's configuration, the run's options, the tokenizer's files); those of a step
hold `opt_state` too, and `ref_params` where the reference moves.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from orbax.checkpoint import v1 as ocp

from qstar_jax.config import ComputeOptions
from qstar_jax.errors import InputError
from qstar_jax.models import CausalLM
from qstar_jax.models.causal_lm import Params
from qstar_jax.models.lora import Lora, attach_adapter, split_adapter
from qstar_jax.store import hub

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STEPS, REFERENCE, BASE = "checkpoints", "reference", "base"


@dataclass(frozen=True)
class Description:
    """What stands beside the parameters in a checkpoint.

    Attributes:
        verb: The verb that wrote it, "sft" or "dpo".
        model: Dictionary of the model's config.json.
        options: The run's resolved configuration.
        tokenizer: Path -> text of the tokenizer's files.
        reference: Who the frozen reference is (`identity.weights_identity`); None where there is none.
        lora: Fields of the adapter's `Lora`, where the parameters are those of an adapter alone.
        generation: Dictionary of generation_config.json, whose `eos_token_id` are all tokens that end an answer.
        base: Who the frozen base of an adapter is, in the same words as `reference`.
        data: Which examples the run is trained on and evaluated on (see `training.continuation`).
    """

    verb: str
    model: dict[str, Any]
    options: dict[str, Any]
    tokenizer: dict[str, str]
    reference: str | None = None
    lora: dict[str, Any] | None = None
    generation: dict[str, Any] = field(default_factory=dict)
    base: str | None = None
    data: dict[str, Any] | None = None

    def build_model(self, compute: ComputeOptions) -> CausalLM:
        """Builds the model, with the shape of its adapter where it has one."""
        lora = self.lora and Lora(**{**self.lora, "targets": tuple(self.lora["targets"])})
        return replace(CausalLM.from_hf(self.model, compute), lora=lora)

    def as_stored(self, compute: ComputeOptions, identity: str | None) -> str | None:
        """An identity of this run, where parameters are read in the type that it was taken of; else None."""
        stored = self.options.get("compute", {}).get("param_dtype")
        return identity if stored == compute.param_dtype else None

    def build_tokenizer(self) -> "PreTrainedTokenizerBase":
        """Builds the tokenizer from its files' texts."""
        return hub.build_tokenizer(self.tokenizer)


def _context() -> ocp.Context:
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="description")
    context = ocp.Context()
    context.checkpointables.registry = registry
    return context


class CheckpointStore:
    """The checkpoints of one run; a context manager that waits for what is still being written.

    Args:
        run: Folder of the run.
        keep: How many of the newest checkpoints are kept.
    """

    def __init__(self, run: Path, keep: int):
        self.run = run
        self._steps = ocp.training.Checkpointer(
            (run / STEPS).absolute(),
            context=_context(),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
        )

    def __enter__(self) -> "CheckpointStore":
        """Returns itself."""
        return self

    def __exit__(self, *_):
        """Waits until all is on disk; a failure of the background writer is raised here."""
        self._steps.close()

    @property
    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return None if self._steps.latest is None else self._steps.latest.step

    def save(self, step: int, arrays: dict[str, Any], description: Description):
        """Writes a checkpoint in the background, after the one before it is complete.

        Args:
            step: Its step.
            arrays: `params`, `opt_state`, and `ref_params` where the reference moves.
            description: What stands beside them.
        """
        self._steps.wait()
        parts = {**arrays, "description": vars(description)}
        self._steps.save_checkpointables_async(step, parts, force=True)

    def describe(self, step: int) -> Description:
        """Reads what stands beside the parameters of a step."""
        return read_description(self.run / STEPS / str(step))

    def restore(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
        """Reads the arrays of a step.

        Args:
            step: Its step.
            abstract: Shapes, types and shardings that they shall have, under the names given to `save`.

        Returns:
            The arrays, under the same names.
        """
        return self._steps.load_checkpointables(step, abstract)

    def save_frozen(self, name: str, params, description: Description):
        """Writes parameters that do not change, once: the `REFERENCE` of a DPO run, or the `BASE` of an adapter."""
        with _context():
            parts = {"params": params, "description": vars(replace(description, lora=None))}
            ocp.save_checkpointables((self.run / name).absolute(), parts, overwrite=True)


def find_checkpoint(folder: Path) -> Path | None:
    """Finds the checkpoint that a folder stands for.

    Args:
        folder: A run, its checkpoints/ folder (both stand for their newest step), a step, reference/ or base/.

    Returns:
        Folder of the checkpoint; None if `folder` is nothing of the kind.
    """
    if (folder / "description").is_dir() and (folder / "params").is_dir():
        return folder
    for steps in (folder / STEPS, folder):
        numbers = [int(path.name) for path in steps.glob("*") if path.name.isdigit() and find_checkpoint(path)]
        if numbers:
            return steps / str(max(numbers))
    return None


def reference_of(checkpoint: Path, description: Description) -> Path | None:
    """Returns the reference that lies in the run of a step's checkpoint, if there is one."""
    if description.lora is not None and description.reference is None:
        return None  # its base is nobody's reference
    reference = checkpoint.parent.parent / (REFERENCE if description.lora is None else BASE)
    return reference if find_checkpoint(reference) == reference else None


def read_description(checkpoint: Path) -> Description:
    """Reads what stands beside the parameters of a checkpoint.

    Raises:
        InputError: If the folder is no complete checkpoint.
    """
    try:
        with _context():
            return Description(**ocp.load_checkpointables(checkpoint.absolute(), {"description": None})["description"])
    except Exception as error:  # Orbax raises many types for what is torn or missing
        raise _torn(checkpoint, error) from error


def read_checkpoint_params(checkpoint: Path, model: CausalLM, shardings) -> Params:
    """Reads the parameters alone, on the shardings and in the type that are asked for, whatever mesh wrote them.

    Args:
        checkpoint: Folder of the checkpoint.
        model: Its model; one with an adapter has its base beside the run's steps.
        shardings: Tree of `jax.sharding.Sharding`, like all of the model's parameters.

    Returns:
        The parameters, with those of the adapter.

    Raises:
        InputError: If a folder is no complete checkpoint.
    """
    abstract = abstract_with_shardings(model.abstract_params(), shardings)
    if model.lora is None:
        return _read_params(checkpoint, abstract)
    base, adapter = split_adapter(abstract)
    return attach_adapter(_read_params(checkpoint.parent.parent / BASE, base), _read_params(checkpoint, adapter))


def _read_params(checkpoint: Path, abstract: Params) -> Params:
    try:
        with _context():
            return ocp.load_checkpointables(checkpoint.absolute(), {"params": abstract})["params"]
    except Exception as error:
        raise _torn(checkpoint, error) from error


def _torn(checkpoint: Path, error: Exception) -> InputError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return InputError(f"{checkpoint}: not a complete checkpoint ({reason[:200]})")


def abstract_with_shardings(tree, shardings):
    """Returns a tree's shapes and types with shardings on them: what Orbax needs to place what it reads."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
