"""What a resumed run must have in common with its beginning: its options and its data."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qstar_jax.config.compare import first_difference, keep_date
from qstar_jax.config.paths import recorded
from qstar_jax.data.identity import examples_identity
from qstar_jax.data.tokenization import Example
from qstar_jax.errors import InputError
from qstar_jax.store import hub
from qstar_jax.store.checkpoints import Description, find_checkpoint
from qstar_jax.training.plan import RunPlan
from qstar_jax.untrusted import read_yaml

# Options that a resumed run may change. Those of the first group decide where and how the same numbers are computed,
# which changes them by rounding at most; those of the second, what is logged and when.
FREE_OPTIONS = (
    "out",
    "resume",
    "export",
    "log",
    "mesh",
    "compute.remat",
    "compute.attention",
    "compute.scan_layers",
    "data.bad_rows",
    "reference.cache",
    #
    "data.eval",
    "data.eval_split",
    "data.max_eval_rows",
    "train.eval_batch_size",  # but see `_free_options`
    "train.log_every",
    "train.eval_every",
    "train.save_every",
    "train.keep_checkpoints",
    "train.show_responses",
    "train.profile",
    "train.reference_samples",  # the first ones stay, or are no longer scored
)
HELD_OUT = ("eval", "eval_split", "max_eval_rows")


def check_folder(plan: RunPlan) -> str | None:
    """Checks what a run's folder holds before anything is loaded or written.

    Returns:
        What the user should know about where the run begins, if anything.

    Raises:
        InputError: If the folder holds a checkpoint and the run is not to be resumed; another verb's results; or, if
            the run is to be resumed, a run with other options. If the folder of an export is not free.
    """
    if plan.config.export is not None:
        hub.check_free(Path(plan.config.export))
    out, resume = plan.config.out, plan.config.resume
    checkpoint, path = find_checkpoint(plan.out), plan.out / "config.yaml"
    if checkpoint is not None and not resume:
        raise InputError(
            f"{out} already holds a run with a checkpoint at step {checkpoint.name}; "
            "add --resume to continue it, or choose another --out"
        )
    if checkpoint is not None:
        return None  # its options are in the checkpoint
    if not path.exists():
        return f"--resume: {out} holds no run yet, so it begins at step 0" if resume else None
    try:
        stored = read_yaml(path)
    except InputError as error:
        raise InputError(f"{error}; choose another --out") from error
    if not isinstance(stored, dict) or "train" not in stored:
        raise InputError(f"{path} is not of a training run: {out} belongs to another verb; choose another --out")
    if resume:
        check_same_options(plan, stored)
    return f"{out} holds a run that ended before its first checkpoint; it starts over at step 0"


def check_same_options(plan: RunPlan, stored: dict[str, Any]):
    """Refuses to resume with other options; the day on which a run began remains that of its templates.

    Raises:
        InputError: If one differs that is not free.
    """
    given = replace(plan.config, data=keep_date(plan.config.data, stored))
    different = first_difference(stored, recorded(given), _free_options(plan))
    if different:
        name, before, now = different
        raise InputError(
            f"--resume: {name} was {before!r} in {plan.config.out} and is {now!r} now; "
            "a run resumes with the options it began with (or starts over in another --out)"
        )


def _free_options(plan: RunPlan) -> tuple[str, ...]:
    if plan.objective.couples_examples:  # the loss depends on the size of a batch
        return tuple(option for option in FREE_OPTIONS if option != "train.eval_batch_size")
    return FREE_OPTIONS


def data_identity(train: Sequence[Example], held_out: Sequence[Example] | None) -> dict[str, Any]:
    """Identifies the examples that a run is trained and evaluated on, for its checkpoints."""
    return {"train": examples_identity(train), "eval": None if held_out is None else examples_identity(held_out)}


def check_same_data(plan: RunPlan, began: Description, data: dict[str, Any]) -> str | None:
    """Refuses to resume with other data (`data_identity`) under the names that the run began with.

    Held-out data may be exchanged by naming others, as no training step depends on them.

    Returns:
        What the user should know, if anything.

    Raises:
        InputError: If the training examples differ, or the held-out ones differ under the same name.
    """
    if began.data is None:
        return "--resume: the checkpoint does not say what data it was trained on, so these could not be compared"
    if began.data["train"] != data["train"]:
        raise _other_data("train", plan, began, data)
    if began.data.get("guide") != data.get("guide"):
        raise InputError(
            f"--resume: the parameters in reference.guide {plan.reference.guide} are not those with which the run in "
            f"{plan.config.out} began; restore that run, or begin a new one in another --out"
        )
    before, now = began.data["eval"], data["eval"]
    if before is None or now is None or before == now:
        return None
    options = began.options["data"]
    if all(options.get(name) == getattr(plan.config.data, name) for name in HELD_OUT):
        raise _other_data("eval", plan, began, data)
    return f"--resume: held-out examples differ from here on ({_digest(before)} before, {_digest(now)} now)"


def _other_data(name: str, plan: RunPlan, began: Description, data: dict[str, Any]) -> InputError:
    source = getattr(plan.config.data, name)
    return InputError(
        f"--resume: {source} (data.{name}) gives other examples than those with which the run in {plan.config.out} "
        f"began ({_digest(began.data[name])} then, {_digest(data[name])} now); restore that file, or begin a new run "
        "in another --out"
    )


def _digest(identity: dict[str, Any]) -> str:
    return f"{identity['rows']:,} examples, SHA-256 {identity['sha256'][:12]}..."
