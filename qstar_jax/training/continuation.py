"""What a run that goes on must have in common with how it began: its options and its data."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from qstar_jax.config import DpoConfig, SftConfig
from qstar_jax.config.compare import first_difference, keep_date
from qstar_jax.data.tokenization import Example
from qstar_jax.errors import InputError
from qstar_jax.store.checkpoints import Description, find_checkpoint
from qstar_jax.store.identity import examples_identity
from qstar_jax.training.objectives import preference_loss

# What may differ between a run and its continuation. The options of the first group decide where and how the same
# numbers are computed, which changes them by rounding at most; those of the second, what is looked at and when.
FREE_OPTIONS = (
    "out",
    "resume",
    "mesh",
    "compute.remat",
    "compute.attention",
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
    "train.reference_samples",  # those of the run's beginning stay, or are no longer looked at
)
HELD_OUT = ("eval", "eval_split", "max_eval_rows")


def check_folder(config: SftConfig | DpoConfig) -> str | None:
    """Looks at what a run's folder holds before anything is loaded or written.

    Args:
        config: The run.

    Returns:
        What the user should know of where the run begins, if anything.

    Raises:
        InputError: If the folder holds a checkpoint and the run is not to be resumed, another verb's results, or, where
            the run is to be resumed, one with other options.
    """
    checkpoint, path = find_checkpoint(Path(config.out)), Path(config.out) / "config.yaml"
    if checkpoint is not None and not config.resume:
        raise InputError(
            f"{config.out} already holds a run with a checkpoint at step {checkpoint.name}; "
            "add --resume to go on with it, or choose another --out"
        )
    if checkpoint is not None:
        return None  # its options are in the checkpoint
    if not path.exists():
        return f"--resume: {config.out} holds no run yet, so it begins at step 0" if config.resume else None
    try:
        stored = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path}: not readable ({str(error).splitlines()[0]}); choose another --out") from error
    if not isinstance(stored, dict) or "train" not in stored:
        raise InputError(f"{path} is not of a training run: {config.out} belongs to another verb; choose another --out")
    if config.resume:
        check_same_options(config, stored)
    return f"{config.out} holds a run that ended before its first checkpoint; it begins anew at step 0"


def check_same_options(config: SftConfig | DpoConfig, stored: dict[str, Any]):
    """Refuses to go on with other options; the day on which a run began is that of its continuation too.

    Args:
        config: The run.
        stored: The options with which it began.

    Raises:
        InputError: If one differs that is not free.
    """
    given = replace(config, data=keep_date(config.data, stored))
    different = first_difference(stored, asdict(given), _free_options(config))
    if different:
        name, before, now = different
        raise InputError(
            f"--resume: {name} was {before!r} in {config.out} and is {now!r} now; "
            "a run goes on with the options it began with (or begins anew in another --out)"
        )


def _free_options(config: SftConfig | DpoConfig) -> tuple[str, ...]:
    if isinstance(config, DpoConfig) and preference_loss(config.loss).couples_rows:  # a batch's loss is not a mean
        return tuple(option for option in FREE_OPTIONS if option != "train.eval_batch_size")
    return FREE_OPTIONS


def data_identity(train: Sequence[Example], held_out: Sequence[Example] | None) -> dict[str, Any]:
    """Says which examples a run is trained on and evaluated on, for its checkpoints."""
    return {"train": examples_identity(train), "eval": None if held_out is None else examples_identity(held_out)}


def check_same_data(config: SftConfig | DpoConfig, began: Description, data: dict[str, Any]) -> str | None:
    """Refuses to go on with other data under the names that the run began with.

    Held-out data may be exchanged by naming others, as no training step depends on them.

    Args:
        config: The run.
        began: What the checkpoint says.
        data: `data_identity` of what the names give now.

    Returns:
        What the user should know, if anything.

    Raises:
        InputError: If the training examples are others, or the held-out ones are under the same name.
    """
    if began.data is None:
        return "--resume: the checkpoint does not say what data it was trained on, so these could not be compared"
    if began.data["train"] != data["train"]:
        raise _other_data("train", config, began, data)
    if None in (before := began.data["eval"], now := data["eval"]) or before == now:
        return None
    options = began.options["data"]
    if all(options.get(name) == getattr(config.data, name) for name in HELD_OUT):
        raise _other_data("eval", config, began, data)
    return f"--resume: held-out examples are others from here on ({_said(before)} before, {_said(now)} now)"


def _other_data(name: str, config: SftConfig | DpoConfig, began: Description, data: dict[str, Any]) -> InputError:
    source = getattr(config.data, name)
    return InputError(
        f"--resume: {source} (data.{name}) gives other examples than those with which the run in {config.out} began "
        f"({_said(began.data[name])} then, {_said(data[name])} now); put that file back as it was, or begin a new run "
        "in another --out"
    )


def _said(identity: dict[str, Any]) -> str:
    return f"{identity['rows']:,} examples, SHA-256 {identity['sha256'][:12]}..."
