"""Who a model's reference is, and at which temperature its rewards are measured: named, or recorded by its run."""

from collections.abc import Callable
from pathlib import Path

from qstar_jax import losses
from qstar_jax.errors import InputError
from qstar_jax.store.identity import check_weights
from qstar_jax.store.open import LoadedModel


def open_reference(
    policy: LoadedModel, named: str | None, model: str, load: Callable[[str | Path], LoadedModel]
) -> LoadedModel:
    """Opens the reference of a policy.

    Args:
        policy: The policy.
        named: Folder or hub name that the user gave, if any.
        model: What the user called the policy.
        load: Opens a model.

    Returns:
        The reference.

    Raises:
        InputError: If none is named, and none lies beside the policy, or not the one with which its run began.
    """
    source = named or policy.reference
    if source is None and policy.description is not None and policy.description.reference is not None:
        raise InputError(
            f"{model} began with a reference whose folder is no longer beside its checkpoints; put it back, or name "
            "the reference with --reference"
        )
    if source is None:
        raise InputError(
            f"{model} carries no reference (only a run whose loss has one does); name one with --reference: "
            "the model from which its training began"
        )
    found = load(source)
    if named is None:
        recorded = policy.description.as_stored(found.model.compute, policy.description.reference)
        check_weights(found.model, found.params, recorded, found.source, "name the reference with --reference")
    return found


def find_beta(policy: LoadedModel, given: float | None, model: str, option: str) -> float:
    """Finds the temperature of a policy's rewards.

    Args:
        policy: The policy.
        given: What the user gave, if anything.
        model: What the user called the policy.
        option: How the user can give it.

    Returns:
        Reward a nat.

    Raises:
        InputError: If it is not given, and the policy's run does not record one.
    """
    options = policy.description.options if policy.description else {}
    beta = given
    if beta is None and "loss" in options:
        beta = losses.make_loss(**options["loss"]).beta
    if beta is None:
        raise InputError(
            f"{model} does not record a beta (only a run whose loss has a reference does); "
            f"give {option}, for instance 0.1"
        )
    return beta
