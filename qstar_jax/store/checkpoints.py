"""Orbax checkpoints: sharded, asynchronous, and self-contained.

A run folder holds `checkpoints/STEP/` and, after DPO, `reference/`. If an adapter is trained, the steps hold the
adapter and `base/` the frozen base, which is also the reference. Each of these folders is an Orbax checkpoint of
`params` and `description` (JSON: the model's configuration, the run's options), with checksums of its files; those of
a step also hold `opt_state`, and `ref_params` if the reference moves. The tokenizer's files are in `tokenizer/`.
"""

import logging
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import jax
from jax.experimental.multihost_utils import sync_global_devices
from orbax.checkpoint import v1 as ocp

from qstar_jax.config import ComputeOptions
from qstar_jax.errors import InputError
from qstar_jax.models import CausalLM
from qstar_jax.models.causal_lm import Params
from qstar_jax.models.lora import Lora, attach_adapter, split_adapter
from qstar_jax.store import hub
from qstar_jax.store.checksums import are_listed, find_damage, write_checksums
from qstar_jax.store.tokenizer_folder import read_tokenizer_folder, tokenizer_digest, write_tokenizer_folder
from qstar_jax.untrusted import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STEPS, REFERENCE, BASE, DAMAGED = "checkpoints", "reference", "base", "damaged"
BEST = "best.json"  # which step was best on held-out rows, in runs that keep it


_log = logging.getLogger(__name__)


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

    A checkpoint that cannot be written, for want of space or permission, is given up with a line in the log, and those
    before it are kept; only if it is the last one is that an error.

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
            cleanup_tmp_directories=True,  # what a process that was killed has left
        )
        self._writer: Thread | None = None
        self._failure: CheckpointError | None = None

    def __enter__(self) -> "CheckpointStore":
        """Returns itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_):
        """Waits for pending writes.

        Raises:
            CheckpointError: If the last one failed, and there is no other error.
        """
        self._wait()
        try:
            self._steps.close()
        except (OSError, ValueError) as error:  # of a save that `_wait` has reported
            if self._failure is None:
                raise CheckpointError(f"checkpoints were not written ({_reason(error)})") from error
        if self._failure and not (kind and issubclass(kind, Exception)):
            raise self._failure

    @property
    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return None if self._steps.latest is None else self._steps.latest.step

    def newest_whole(self) -> int | None:
        """Finds the newest checkpoint that is as it was written; all processes of a job must call this together.

        Damaged ones that are newer are moved to `damaged/`, and the log says why.

        Returns:
            Its step; None if there are no checkpoints.

        Raises:
            InputError: If all are damaged.
        """
        damaged: list[tuple[Path, str]] = []
        for folder in sorted(step_folders(self.run / STEPS), key=lambda path: int(path.name), reverse=True):
            fault = find_fault(folder)
            if fault is None:
                self._move_damaged(damaged, folder.name)
                if not are_listed(folder):
                    _log.warning(
                        f"{folder} has no complete list of checksums (its process was ended before it wrote it, or "
                        "was of an earlier version): flipped bits would not be found"
                    )
                return int(folder.name)
            damaged.append((folder, fault))
        if damaged:
            faults = "; ".join(f"{folder.name}: {fault}" for folder, fault in damaged)
            raise InputError(
                f"{self.run / STEPS}: no checkpoint is whole ({faults}); restore one, or begin anew in another --out"
            )
        return None

    def _move_damaged(self, damaged: Sequence[tuple[Path, str]], whole: str):
        for folder, fault in damaged:
            to = self.run / DAMAGED / folder.name
            _log.warning(f"{folder} is damaged: {fault}; it is moved to {to}, and step {whole} is taken instead")
            if jax.process_index() == 0:
                to.parent.mkdir(exist_ok=True)
                shutil.rmtree(to, ignore_errors=True)
                folder.rename(to)
        if damaged:
            if jax.process_count() > 1:
                sync_global_devices("damaged checkpoints are moved")
            self._steps.reload()

    def save(self, step: int, arrays: dict[str, Any], description: Description):
        """Writes a checkpoint in the background, after waiting for the previous one.

        Args:
            step: Its step.
            arrays: `params`, `opt_state`, and `ref_params` if the reference moves.
            description: Stored with them.
        """
        self._wait()
        self._failure = None
        if step == self.latest_step:  # as where a run that was stopped goes on
            return
        try:
            write_tokenizer_folder(self.run, description.tokenizer)
            parts = {**arrays, "description": description.without_tokenizer()}
            response = self._steps.save_checkpointables_async(step, parts, force=True)
        except (OSError, ValueError) as error:
            self._fail(step, error)
        else:
            self._writer = Thread(target=self._complete, args=(step, response), name=f"checkpoint {step}")
            self._writer.start()

    def _complete(self, step: int, response: Any):
        """Waits for the disk, and writes down what it has."""
        try:
            response.result()
            write_checksums(self.run / STEPS / str(step))
        except Exception as error:  # Orbax raises many types for a full disk
            self._fail(step, error)

    def _fail(self, step: int, error: Exception):
        message = f"{self.run / STEPS / str(step)} was not written ({_reason(error)})"
        try:
            newest = find_checkpoint(self.run / STEPS)
            kept = "there is no other" if newest is None else f"the newest complete one is {newest.name}"
            for left in (self.run / STEPS).glob(f"{step}.*tmp*") if jax.process_index() == 0 else ():
                shutil.rmtree(left, ignore_errors=True)
        except OSError:
            kept = "the others cannot be read"
        self._failure = CheckpointError(f"{message}; {kept}: see to the disk, and go on with --resume")
        _log.warning(f"{message}; the run goes on, and {kept}")

    def _wait(self):
        if self._writer:
            self._writer.join()
            self._writer = None

    def describe(self, step: int) -> Description:
        """Reads the description of a step."""
        return read_description(self.run / STEPS / str(step))

    def restore(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
        """Reads arrays of a step by the names given to `save`, with the shapes, dtypes and shardings of `abstract`.

        Raises:
            InputError: If the checkpoint is not complete.
        """
        try:
            return self._steps.load_checkpointables(step, abstract)
        except Exception as error:  # Orbax raises many types for missing or truncated files
            fix = "move that folder away, to go on from an older one or to begin anew"
            raise InputError(f"{_incomplete(self.run / STEPS / str(step), error)}; {fix}") from error

    def save_frozen(self, name: str, params, description: Description):
        """Writes frozen parameters: the `REFERENCE` of a DPO run, or the `BASE` of an adapter.

        Raises:
            CheckpointError: If they cannot be written.
        """
        folder = (self.run / name).absolute()
        try:
            write_tokenizer_folder(self.run, description.tokenizer)
            with _context():
                parts = {"params": params, "description": replace(description, lora=None).without_tokenizer()}
                ocp.save_checkpointables(folder, parts, overwrite=True)
            write_checksums(folder)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder} was not written ({_reason(error)})") from error


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the message names it, the reason, and what there is."""


def _reason(error: Exception) -> str:
    """One line; of a message that quotes the operating system, what that says."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(code.group(1))) if code else (str(error).splitlines() or [type(error).__name__])[0][:200]


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
        with _context():
            stored = ocp.load_checkpointables(checkpoint.absolute(), {"description": None})["description"]
        description = Description(**stored)
    except Exception as error:  # Orbax raises many types for missing or truncated files
        raise _incomplete(checkpoint, error) from error
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
        raise InputError(f"{_incomplete(checkpoint, OSError(damage))}{fix}")
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
