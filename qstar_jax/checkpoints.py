"""Orbax checkpoints: sharded, asynchronous, and with all that another program needs to use them beside the parameters.

A run folder holds `checkpoints/STEP/` and, after DPO, `reference/`. Each of these folders is an Orbax checkpoint of
`params` and `description` (JSON: the model's configuration, the run's options, the tokenizer's files); those of a step
hold `opt_state` too.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from orbax.checkpoint import v1 as ocp

from qstar_jax.config import ComputeOptions
from qstar_jax.errors import InputError
from qstar_jax.models import CausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STEPS, REFERENCE = "checkpoints", "reference"


@dataclass(frozen=True)
class Description:
    """What stands beside the parameters in a checkpoint.

    Attributes:
        verb: The verb that wrote it, "sft" or "dpo".
        model: Dictionary of the model's config.json.
        options: The run's resolved configuration.
        tokenizer: Name -> text of the tokenizer's files.
        reference: Who the frozen reference is (see `training.reference`); None where there is none.
    """

    verb: str
    model: dict[str, Any]
    options: dict[str, Any]
    tokenizer: dict[str, str]
    reference: str | None = None

    def build_model(self, compute: ComputeOptions) -> CausalLM:
        """Builds the model."""
        return CausalLM.from_hf(self.model, compute)

    def build_tokenizer(self) -> "PreTrainedTokenizerBase":
        """Builds the tokenizer from its files' texts."""
        from qstar_jax.hub import read_tokenizer

        with tempfile.TemporaryDirectory() as folder:
            for name, text in self.tokenizer.items():
                (Path(folder) / Path(name).name).write_text(text, encoding="utf-8")
            return read_tokenizer(Path(folder))


def tokenizer_files(tokenizer: "PreTrainedTokenizerBase") -> dict[str, str]:
    """Returns name -> text of the files that rebuild a (fast) tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_text(encoding="utf-8") for path in sorted(Path(folder).iterdir())}


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

    def save(self, step: int, params, opt_state, description: Description):
        """Writes a checkpoint in the background, after the one before it is complete."""
        self._steps.wait()
        parts = {"params": params, "opt_state": opt_state, "description": vars(description)}
        self._steps.save_checkpointables_async(step, parts, force=True)

    def describe(self, step: int) -> Description:
        """Reads what stands beside the parameters of a step."""
        return read_description(self.run / STEPS / str(step))

    def restore(self, step: int, abstract_params, abstract_opt_state):
        """Reads the arrays of a step.

        Args:
            step: Its step.
            abstract_params: Shapes, types and shardings that the parameters shall have.
            abstract_opt_state: The same for the optimizer's state.

        Returns:
            (params, opt_state).
        """
        parts = {"params": abstract_params, "opt_state": abstract_opt_state}
        loaded = self._steps.load_checkpointables(step, parts)
        return loaded["params"], loaded["opt_state"]

    def save_reference(self, params, description: Description):
        """Writes the frozen reference of a DPO run, once."""
        with _context():
            parts = {"params": params, "description": vars(description)}
            ocp.save_checkpointables((self.run / REFERENCE).absolute(), parts, overwrite=True)


def find_checkpoint(folder: Path) -> Path | None:
    """Finds the checkpoint that a folder stands for.

    Args:
        folder: A run, its checkpoints/ folder (both stand for their newest step), a step, or reference/.

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


def reference_of(checkpoint: Path) -> Path | None:
    """Returns the reference that lies in the run of a step's checkpoint, if there is one."""
    reference = checkpoint.parent.parent / REFERENCE
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


def read_checkpoint_params(checkpoint: Path, model: CausalLM, shardings):
    """Reads the parameters alone, on the shardings and in the type that are asked for, whatever mesh wrote them.

    Raises:
        InputError: If the folder is no complete checkpoint.
    """
    abstract = abstract_with_shardings(model.abstract_params(), shardings)
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
