"""Orbax checkpoints: what they hold, which is the newest, and reading them; `checkpoint_store` writes those of a run.

A run folder holds `checkpoints/STEP/` and, after DPO, `reference/`. If an adapter is trained, the steps hold the
adapter and `base/` the frozen base, which is also the reference. Each of these folders is an Orbax checkpoint of
`params` and `description` (JSON: the model's configuration, the run's options), with checksums of its files; those of
a step also hold `opt_state`, and `ref_params` if the reference moves. The tokenizer's files are in `tokenizer/`.
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
from qstar_jax.store.checksums import find_damage
from qstar_jax.store.tokenizer_folder import read_tokenizer_folder, tokenizer_digest
from qstar_jax.untrusted import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STEPS, REFERENCE, BASE, DAMAGED = "checkpoints", "reference", "base", "damaged"
BEST = "best.json"  # which step was best on held-out rows, in runs that keep it


@dataclass(frozen=True)
class Description:
    """What a checkpoint holds besides arrays.

    Attributes:
        verb: The verb that wrote it: "sft", "dpo" or "rl".
        model: Contents of the model's config.json.
        options: The run's resolved configuration.
        tokenizer: Path -> text of the tokenizer's files; in a checkpoint, they are beside it, once for a run.
        reference: Identity of the frozen reference (`identity.weights_identity`); None: no reference.
        lora: Fields of `Lora`, if the parameters are those of an adapter alone.
        generation: Contents of generation_config.json, with all EOS ids in `eos_token_id`.
        base: Identity of the frozen base of an adapter, as for `reference`.
        data: Identity of the run's training and evaluation examples (see `training.continuation`).
        tokenizer_digest: What the tokenizer's files must be, if they were read.
        window: Metric -> (sum, denominator) of each step that was not logged yet; empty but for a run that was stopped.
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
    window: list[dict[str, list[float]]] = field(default_factory=list)
    tokenizer_digest: str | None = field(default=None, compare=False)

    def build_model(self, compute: ComputeOptions) -> CausalLM:
        """Builds the model, with its adapter if it has one."""
        lora = self.lora and Lora(**{**self.lora, "targets": tuple(self.lora["targets"])})
        return replace(CausalLM.from_hf(self.model, compute), lora=lora)

    def comparable(self, compute: ComputeOptions, identity: str | None) -> str | None:
        """Returns an identity that this run recorded; None if parameters are loaded in another dtype than then."""
        recorded_dtype = self.options.get("compute", {}).get("param_dtype")
        return identity if recorded_dtype == compute.param_dtype else None

    def build_tokenizer(self) -> "PreTrainedTokenizerBase":
        """Builds the tokenizer from the texts of its files.

        Raises:
            InputError: If the run no longer has those with which it was written.
        """
        if self.tokenizer_digest not in (None, tokenizer_digest(self.tokenizer)):
            raise InputError(
                "the tokenizer/ folder of the run is missing, or no longer what its checkpoints were written with; "
                "restore that folder"
            )
        return hub.build_tokenizer(self.tokenizer)

    def without_tokenizer(self) -> dict[str, Any]:
        """Returns what is stored in a checkpoint."""
        return vars(self) | {"tokenizer": {}, "tokenizer_digest": tokenizer_digest(self.tokenizer)}


def orbax_context() -> ocp.Context:
    """Returns the context in which a checkpoint is written or read: `description` is JSON, all else are arrays."""
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="description")
    context = ocp.Context()
    context.checkpointables.registry = registry
    # A folder that cannot be made is told at once. In the background, Orbax's other threads would wait 5 minutes for
    # it, and so would the end of the process; but there, processes learn of each other's failures.
    context.asynchronous.create_directories_asynchronously = jax.process_count() > 1
    return context


def step_folders(steps: Path) -> list[Path]:
    """The checkpoints in a folder, whole or not."""
    return [path for path in steps.glob("*") if path.name.isdigit() and path.is_dir()]


def find_fault(checkpoint: Path) -> str | None:
    """Says why a checkpoint cannot be used; None if nothing speaks against it.

    All processes of a job must call this together.
    """
    missing = [name for name in ("description", "params") if not (checkpoint / name).is_dir()]
    damage = find_damage(checkpoint) or (f"{missing[0]} is missing" if missing else None)
    if damage is None:
        try:
            read_description(checkpoint)
        except InputError as error:
            damage = str(error).removeprefix(f"{checkpoint}: ")
    return damage


def find_checkpoint(folder: Path) -> Path | None:
    """Finds the checkpoint in a folder.

    Args:
        folder: A run (its best step, if it keeps one, else its newest), its checkpoints/ folder (the newest step), a
            step, reference/ or base/.

    Returns:
        Folder of the checkpoint; None if there is none.
    """
    if (folder / "description").is_dir() and (folder / "params").is_dir():
        return folder
    if (best := read_best(folder)) and (checkpoint := find_checkpoint(folder / STEPS / str(best["step"]))):
        return checkpoint
    for steps in (folder / STEPS, folder):
        numbers = [int(path.name) for path in step_folders(steps) if find_checkpoint(path)]
        if numbers:
            return steps / str(max(numbers))
    return None


def read_best(run: Path) -> dict[str, Any] | None:
    """Reads which step of a run was best on held-out rows; None if the run does not keep its best checkpoint.

    Returns:
        The `metric`, and `step` and `value` of its best evaluation; all `evaluations` as [step, value].

    Raises:
        InputError: If best.json is not readable.
    """
    path = run / BEST
    best = read_json(path) if path.is_file() else None
    if best is not None and not (isinstance(best, dict) and type(best.get("step")) is int):
        raise InputError(f"{path}: names no step; expected what a run wrote, or remove it to use the newest step")
    return best


def reference_of(checkpoint: Path, description: Description) -> Path | None:
    """Returns the folder of the reference in the run of a step's checkpoint, if there is one."""
    if description.lora is not None and description.reference is None:
        return None  # the base of an adapter trained without a reference
    reference = checkpoint.parent.parent / (REFERENCE if description.lora is None else BASE)
    return reference if find_checkpoint(reference) == reference else None


def read_description(checkpoint: Path) -> Description:
    """Reads the description of a checkpoint.

    Raises:
        InputError: If the folder is not a complete checkpoint.
    """
    try:
        with orbax_context():
            stored = ocp.load_checkpointables(checkpoint.absolute(), {"description": None})["description"]
        description = Description(**stored)
    except Exception as error:  # Orbax raises many types for missing or truncated files
        raise incomplete(checkpoint, error) from error
    if description.tokenizer_digest is None:  # without a tokenizer, or of an earlier version
        return description
    run = checkpoint.absolute().parent
    files = read_tokenizer_folder(run.parent if run.name == STEPS else run)
    return replace(description, tokenizer=files)


def read_checkpoint_params(checkpoint: Path, model: CausalLM, shardings) -> Params:
    """Reads only the parameters, adapter included, in the model's dtype and on the shardings, whatever mesh wrote them.

    Args:
        checkpoint: Folder of the checkpoint.
        model: Its model; the base of an adapter is stored next to the run's steps.
        shardings: Tree of `jax.sharding.Sharding`, like all of the model's parameters.

    Raises:
        InputError: If a folder is not a complete checkpoint.
    """
    abstract = abstract_with_shardings(model.abstract_params(), shardings)
    if model.lora is None:
        return _read_params(checkpoint, abstract)
    base, adapter = split_adapter(abstract)
    return attach_adapter(_read_params(checkpoint.parent.parent / BASE, base), _read_params(checkpoint, adapter))


def _read_params(checkpoint: Path, abstract: Params) -> Params:
    if damage := find_damage(checkpoint, ("params", "description")):
        others = sorted(int(path.name) for path in step_folders(checkpoint.parent) if path != checkpoint)
        fix = f"; restore it, or name another checkpoint ({', '.join(map(str, others))})" if others else ""
        raise InputError(f"{incomplete(checkpoint, OSError(damage))}{fix}")
    try:
        with orbax_context():
            return ocp.load_checkpointables(checkpoint.absolute(), {"params": abstract})["params"]
    except Exception as error:
        raise incomplete(checkpoint, error) from error


def incomplete(checkpoint: Path, error: Exception) -> InputError:
    """Says that a checkpoint cannot be read, and the first line of why."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return InputError(f"{checkpoint}: not a complete checkpoint ({reason[:200]})")


def abstract_with_shardings(tree, shardings):
    """Returns the shapes and dtypes of a tree with shardings, which tell Orbax where to place arrays."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
