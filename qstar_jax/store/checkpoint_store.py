"""The checkpoints of a run that trains: written in the background, restored, and moved away if they are damaged."""

import logging
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Any

import jax
from jax.experimental.multihost_utils import sync_global_devices
from orbax.checkpoint import v1 as ocp
from orbax.checkpoint.utils import TMP_DIR_SUFFIX

from qstar_jax.errors import InputError
from qstar_jax.store.checkpoints import (
    DAMAGED,
    STEPS,
    Description,
    find_checkpoint,
    find_fault,
    incomplete,
    orbax_context,
    read_best,
    read_description,
    step_folders,
)
from qstar_jax.store.checksums import are_listed, write_checksums
from qstar_jax.store.files import missing_folders, remove_empty
from qstar_jax.store.tokenizer_folder import write_tokenizer_folder

_log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the message names it, the reason, and what there is."""


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
    before it are kept; only if it is the last one is that an error. Without any, its folders are removed at the end.

    Args:
        run: Folder of the run.
        keep: Number of newest checkpoints to keep, besides the best one if the run has a `best.json`.
    """

    def __init__(self, run: Path, keep: int):
        self.run = run
        _remove_unfinished(run / STEPS, "*")  # what a process that was killed has left
        self._made = missing_folders(run / STEPS) if jax.process_index() == 0 else []
        self._steps = ocp.training.Checkpointer(
            (run / STEPS).absolute(),
            context=orbax_context(),
            preservation_policy=_NewestAndBest(run, keep),
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
        remove_empty(self._made)
        if self._failure and not (kind and issubclass(kind, Exception)):
            raise self._failure

    @property
    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return None if self._steps.latest is None else self._steps.latest.step

    def newest_whole(self) -> int | None:
        """Finds the newest checkpoint that is as it was written; all processes of a job must call this together.

        Damaged ones that are newer are moved to `damaged/`, and the log says why. One without checksums, which may have
        lost any other file as well, counts as damaged if an older one has them.

        Returns:
            Its step; None if there are no checkpoints.

        Raises:
            InputError: If all are damaged.
        """
        damaged: list[tuple[Path, str]] = []
        folders = sorted(step_folders(self.run / STEPS), key=lambda path: int(path.name), reverse=True)
        for number, folder in enumerate(folders):
            fault = find_fault(folder)
            if fault is None and not are_listed(folder) and any(map(are_listed, folders[number + 1 :])):
                fault = "it has lost its list of checksums, or its process was ended before it wrote it"
            if fault is None:
                self._move_damaged(damaged, folder.name)
                if not are_listed(folder):
                    _log.warning(
                        f"{folder} has no complete list of checksums (its process was ended before it wrote it, or "
                        "was of an earlier version), nor has an older one: flipped bits would not be found"
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
            _remove_unfinished(self.run / STEPS, step)
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
            raise InputError(f"{incomplete(self.run / STEPS / str(step), error)}; {fix}") from error

    def save_frozen(self, name: str, params, description: Description):
        """Writes frozen parameters: the `REFERENCE` of a DPO run, or the `BASE` of an adapter.

        Raises:
            CheckpointError: If they cannot be written.
        """
        folder = (self.run / name).absolute()
        try:
            write_tokenizer_folder(self.run, description.tokenizer)
            with orbax_context():
                parts = {"params": params, "description": replace(description, lora=None).without_tokenizer()}
                ocp.save_checkpointables(folder, parts, overwrite=True)
            write_checksums(folder)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder} was not written ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    """One line; of a message that quotes the operating system, what that says."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(code.group(1))) if code else (str(error).splitlines() or [type(error).__name__])[0][:200]


def _remove_unfinished(steps: Path, step: int | str):
    """Removes the temporary folders of a step, or of all ("*"): Orbax renames one when it is complete."""
    for folder in steps.glob(f"{step}{TMP_DIR_SUFFIX}*") if jax.process_index() == 0 else ():
        shutil.rmtree(folder, ignore_errors=True)
