"""Orbax checkpoints: sharded, asynchronous, and self-contained.

A run folder holds `checkpoints/STEP/` and, after DPO, `reference/`. If an adapter is trained, the steps hold the
adapter and `base/` the frozen base, which is also the reference. Each of these folders is an Orbax checkpoint of
`params` and `description` (JSON: the model's configuration, the run's options, the tokenizer's files); those of a step
also hold `opt_state`, and `ref_params` if the reference moves.
"""

import json
from collections.abc import Sequence
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
BEST = "best.json"  # which step was best on held-out rows, in runs that keep it


@dataclass(frozen=True)
class Description:
    """What a checkpoint holds besides arrays.

    Attributes:
        verb: The verb that wrote it: "sft", "dpo" or "rl".
        model: Contents of the model's config.json.
        options: The run's resolved configuration.
        tokenizer: Path -> text of the tokenizer's files.
        reference: Identity of the frozen reference (`identity.weights_identity`); None: no reference.
        lora: Fields of `Lora`, if the parameters are those of an adapter alone.
        generation: Contents of generation_config.json, with all EOS ids in `eos_token_id`.
        base: Identity of the frozen base of an adapter, as for `reference`.
        data: Identity of the run's training and evaluation examples (see `training.continuation`).
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
        """Builds the model, with its adapter if it has one."""
        lora = self.lora and Lora(**{**self.lora, "targets": tuple(self.lora["targets"])})
        return replace(CausalLM.from_hf(self.model, compute), lora=lora)

    def comparable(self, compute: ComputeOptions, identity: str | None) -> str | None:
        """Returns an identity that this run recorded; None if parameters are loaded in another dtype than then."""
        recorded_dtype = self.options.get("compute", {}).get("param_dtype")
        return identity if recorded_dtype == compute.param_dtype else None

    def build_tokenizer(self) -> "PreTrainedTokenizerBase":
        """Builds the tokenizer from the texts of its files."""
        return hub.build_tokenizer(self.tokenizer)


def _context() -> ocp.Context:
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="description")
    context = ocp.Context()
    context.checkpointables.registry = registry
    return context


@dataclass(frozen=True)
class _NewestAndBest:
    """Preserves the newest checkpoints of a run and, if it keeps one, the best."""

    run: Path
    keep: int

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        best = read_best(self.run)
        oldest = len(checkpoints) - self.keep
        return [i >= oldest or (best and checkpoint.step == best["step"]) for i, checkpoint in enumerate(checkpoints)]


class CheckpointStore:
    """The checkpoints of one run; a context manager that waits for pending writes.

    Args:
        run: Folder of the run.
        keep: Number of newest checkpoints to keep, besides the best one if the run has a `best.json`.
    """

    def __init__(self, run: Path, keep: int):
        self.run = run
        self._steps = ocp.training.Checkpointer(
            (run / STEPS).absolute(),
            context=_context(),
            preservation_policy=_NewestAndBest(run, keep),
        )

    def __enter__(self) -> "CheckpointStore":
        """Returns itself."""
        return self

    def __exit__(self, *_):
        """Waits for pending writes; raises a failure of the background writer."""
        self._steps.close()

    @property
    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return None if self._steps.latest is None else self._steps.latest.step

    def save(self, step: int, arrays: dict[str, Any], description: Description):
        """Writes a checkpoint in the background, after waiting for the previous one.

        Args:
            step: Its step.
            arrays: `params`, `opt_state`, and `ref_params` if the reference moves.
            description: Stored with them.
        """
        self._steps.wait()
        parts = {**arrays, "description": vars(description)}
        self._steps.save_checkpointables_async(step, parts, force=True)

    def describe(self, step: int) -> Description:
        """Reads the description of a step."""
        return read_description(self.run / STEPS / str(step))

    def restore(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
        """Reads arrays of a step by the names given to `save`, with the shapes, dtypes and shardings of `abstract`."""
        return self._steps.load_checkpointables(step, abstract)

    def save_frozen(self, name: str, params, description: Description):
        """Writes frozen parameters: the `REFERENCE` of a DPO run, or the `BASE` of an adapter."""
        with _context():
            parts = {"params": params, "description": vars(replace(description, lora=None))}
            ocp.save_checkpointables((self.run / name).absolute(), parts, overwrite=True)


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
        numbers = [int(path.name) for path in steps.glob("*") if path.name.isdigit() and find_checkpoint(path)]
        if numbers:
            return steps / str(max(numbers))
    return None


def read_best(run: Path) -> dict[str, Any] | None:
    """Reads which step of a run was best on held-out rows; None if the run does not keep its best checkpoint.

    Returns:
        The `metric`, and `step` and `value` of its best evaluation; all `evaluations` as [step, value].
    """
    path = run / BEST
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


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
        with _context():
            return Description(**ocp.load_checkpointables(checkpoint.absolute(), {"description": None})["description"])
    except Exception as error:  # Orbax raises many types for missing or truncated files
        raise _incomplete(checkpoint, error) from error


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
    try:
        with _context():
            return ocp.load_checkpointables(checkpoint.absolute(), {"params": abstract})["params"]
    except Exception as error:
        raise _incomplete(checkpoint, error) from error


def _incomplete(checkpoint: Path, error: Exception) -> InputError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return InputError(f"{checkpoint}: not a complete checkpoint ({reason[:200]})")


def abstract_with_shardings(tree, shardings):
    """Returns the shapes and dtypes of a tree with shardings, which tell Orbax where to place arrays."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
