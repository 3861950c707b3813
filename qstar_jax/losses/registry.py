"""Losses by name: which options each reads, within which limits, and which losses go together."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from qstar_jax.config import LossOptions
from qstar_jax.config.variants import Declaration, check_given, check_value, declarations, inside, nearest
from qstar_jax.errors import InputError
from qstar_jax.losses.catalog import LOSSES, has_reference, needed_arrays, reads_single
from qstar_jax.losses.preference_loss import PreferenceLoss


def defaults(name: str) -> dict[str, Any]:
    """Reads the options of a loss and their defaults from its signature; divergences are given by name."""
    parameters = inspect.signature(LOSSES[name]).parameters.values()
    options = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    if "divergence" in options:
        options |= {"divergence": options["divergence"].__name__, "divergence_alpha": None}
    return options


def _declare() -> dict[str, Declaration]:
    """Declares every option: its readers and defaults are in the signatures, its limits in `LossOptions`."""
    limits = declarations(LossOptions)
    by_loss = {name: defaults(name) for name in LOSSES}
    return {
        option: replace(
            limits[option], defaults={name: read[option] for name, read in by_loss.items() if option in read}
        )
        for options in by_loss.values()
        for option in options
    }


DECLARED = _declare()


def make_loss(
    name: str | Sequence[str] = "sigmoid",
    *,
    weights: Sequence[float] | None = None,
    ld_alpha: float | None = None,
    wpo: bool = False,
    **options: Any,
) -> PreferenceLoss:
    """Finds losses by name and binds their options.

    Args:
        name: A name in `LOSSES`, or several for a weighted sum (MPO is `["sigmoid", "bco_pair", "sft"]` with weights
            0.8, 0.2 and 1).
        weights: Weight of each of several losses; None: 1 each.
        ld_alpha: LD-DPO: weight of the tokens beyond the length of the shorter response.
        wpo: Weight pairs as WPO does.
        **options: Options of the losses by name; each goes to every loss that reads it. None: the loss's default.
            `divergence` is a name in `DIVERGENCES`, `divergence_alpha` the order of `alpha_divergence`.

    Returns:
        The loss.

    Raises:
        InputError: If a name is unknown, an option is read by none of the losses or out of range, or losses do not go
            together.
    """
    terms = (name,) if isinstance(name, str) else tuple(name)
    _check_terms(terms, weights)
    options = {option: value for option, value in options.items() if value is not None}
    check_given(options, terms, DECLARED, "loss.name")
    check_value("ld_alpha", ld_alpha, declarations(LossOptions)["ld_alpha"], "loss")
    weights = (1.0,) * len(terms) if weights is None else tuple(weights)
    bound = tuple({option: options.get(option, value) for option, value in defaults(term).items()} for term in terms)
    loss = PreferenceLoss(terms, weights, bound, ld_alpha, wpo)
    _check_together(loss, options)
    return loss


def _check_terms(terms: tuple[str, ...], weights: Sequence[float] | None):
    if not terms:
        raise InputError(f"no loss is named; choose from {', '.join(LOSSES)}")
    for term in terms:
        if term not in LOSSES:
            hint = ", DPO's name is sigmoid" if term == "dpo" else nearest(term, LOSSES)
            raise InputError(f"loss {term!r} is unknown{hint}; known are {', '.join(LOSSES)}")
    if len(set(terms)) < len(terms):
        raise InputError(f"a loss is named twice in {', '.join(terms)}; give it once, with the sum of the weights")
    if weights is not None and not isinstance(weights, list | tuple):
        raise InputError(f"weights is {weights!r}; expected a list with a number for each of {', '.join(terms)}")
    if weights is not None and len(weights) != len(terms):
        raise InputError(
            f"{len(weights)} weights are given for {len(terms)} losses ({', '.join(terms)}); give one each"
        )
    for weight in weights or ():
        if not inside(weight, "(-inf, inf)"):
            raise InputError(f"a weight of {' + '.join(terms)} is {weight!r}; expected a finite number")


def _check_together(loss: PreferenceLoss, given: Mapping[str, Any]):
    """Refuses options and losses that exclude each other."""
    names = " + ".join(loss.terms)
    if "exo_pair" in loss.terms and given.get("label_smoothing") == 0:
        raise InputError("exo_pair: label_smoothing is 0, where its divergence is infinite; 1e-3 is usual")
    divergence = given.get("divergence", "reverse_kl")
    if "divergence_alpha" in given and divergence != "alpha_divergence":
        raise InputError(f"divergence_alpha is the order of alpha_divergence; the divergence is {divergence}")
    if loss.ld_alpha is not None and not any(has_reference(term) for term in loss.terms):
        raise InputError(f"ld_alpha weighs log-ratios to a reference, and {names} has no reference")
    if loss.ld_alpha is not None and any(reads_single(term) or term == "plackett_luce" for term in loss.terms):
        raise InputError(f"ld_alpha compares the lengths of two responses, and {names} does not read pairs")
    if "rewards" in loss.arrays and not all("rewards" in needed_arrays(term) for term in loss.terms):
        raise InputError(f"{names}: a_star and qrpo read rewards of single responses, which the others do not go with")
    if loss.wpo and "plackett_luce" in loss.terms:
        raise InputError("wpo weighs pairs, and plackett_luce reads rankings")
    if loss.wpo and any(term.startswith("aot") for term in loss.terms):
        raise InputError("wpo weighs pairs, and aot sorts margins over the batch, so that its rows are no longer pairs")
