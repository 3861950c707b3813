"""Who a model's reference is, and at which temperature its rewards are measured: named, or recorded by its run."""

from pathlib import Path

from qstar_jax import losses
from qstar_jax.errors import InputError
from qstar_jax.loading import LoadedModel


def find_reference(policy: LoadedModel, named: str | None, model: str) -> str | Path:
    """Finds the reference of a policy.

    Args:
        policy: The policy.
        named: Folder or hub name that the user gave, if any.
        model: What the user called the policy.

    Returns:
        Something that `load_model` opens.

    Raises:
        InputError: If none is named, and none lies beside the policy.
    """
    source = named or policy.reference
    if source is None:
        raise InputError(
            f"{model} carries no reference (only a run whose loss has one does); name one with --reference: "
            "the model from which its training began"
        )
    return source


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
