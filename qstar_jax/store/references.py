"""The reference and the beta of a policy, given by the user or recorded by the policy's run."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from qstar_jax import losses
from qstar_jax.errors import InputError
from qstar_jax.store.identity import check_weights
from qstar_jax.store.open import LoadedModel

IDENTICAL = "policy and reference are identical: every reward is 0"


def open_reference(
    policy: LoadedModel, named: str | None, model: str, load: Callable[[str | Path], LoadedModel]
) -> LoadedModel:
    """Opens the reference of a policy: the one that the user named, or that of its run.

    Raises:
        InputError: If none is named, and the run of the policy has none or no longer the one it began with.
    """
    source = named or policy.reference
    if source is None and policy.description is not None and policy.description.reference is not None:
        raise InputError(
            f"the reference of {model} is no longer next to its checkpoints; restore the folder, or name the reference "
            "with --reference"
        )
    if source is None:
        raise InputError(
            f"{model} has no reference (only runs whose loss has one do); name one with --reference: the model from "
            "which its training began"
        )
    reference = load(source)
    if named is None:
        recorded = policy.description.comparable(reference.model.compute, policy.description.reference)
        check_weights(
            reference.model, reference.params, recorded, reference.source, "name the reference with --reference"
        )
    return reference


def are_identical(policy: LoadedModel, reference: LoadedModel) -> bool:
    """Whether two models have the same parameters; stops at the first array that differs.

    All processes of a job must call this together.
    """
    if policy.model != reference.model:
        return False
    pairs = zip(jax.tree.leaves(policy.params), jax.tree.leaves(reference.params), strict=True)
    return all(bool(jnp.array_equal(one, other)) for one, other in pairs)


def find_beta(policy: LoadedModel, given: float | None, model: str, option: str) -> float:
    """Finds the beta of a policy's rewards, in reward per nat: the one given, or that of its run.

    Raises:
        InputError: If it is not positive, or not given and the policy's run did not record one.
    """
    if given is not None and not given > 0:
        raise InputError(f"{option} {given:g}: expected a number above 0, reward per nat")
    options = policy.description.options if policy.description else {}
    beta = given
    if beta is None and "loss" in options:
        beta = losses.make_loss(**options["loss"]).beta
    if beta is None and "rl" in options:
        # The optimum of the regularized reward is pi_ref exp(A* / kl_coef): that of DPO with this beta.
        beta = options["rl"]["kl_coef"] or None
    if beta is None:
        raise InputError(
            f"{model} does not record a beta (only runs whose loss has a reference do); set {option}, for instance 0.1"
        )
    return beta
