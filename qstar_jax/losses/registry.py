"""Losses by name: which options each takes, within which limits, and which losses go together."""

import difflib
import inspect
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, get_args

from qstar_jax.errors import InputError
from qstar_jax.losses import reference_free
from qstar_jax.losses.catalog import LOSSES, has_reference
from qstar_jax.losses.divergences import DIVERGENCES
from qstar_jax.losses.preference_loss import PreferenceLoss

# Numbers that an option must lie between; the ends in brackets are allowed.
_RANGES: dict[str, str] = {
    "beta": "(0, inf)",
    "label_smoothing": "[0, 0.5)",
    "divergence_alpha": "(-inf, inf)",
    "alpha": "(-inf, inf)",
    "gamma": "(-inf, inf)",
    "tau": "(0, inf)",
    "penalty": "[0, inf)",
    "shift": "(0, 1]",
    "desirable_weight": "[0, inf)",
    "undesirable_weight": "[0, inf)",
    "nll_weight": "[0, inf)",
    "odds_weight": "[0, inf)",
    "bias": "(0, 1]",
    "discount": "(0, 1]",
    "bc_weight": "[0, inf)",
    "ld_alpha": "[0, 1]",
}
_CHOICES: dict[str, tuple[str, ...]] = {
    "divergence": tuple(DIVERGENCES),
    "normalize": get_args(reference_free.Normalization),
    "bc_data": get_args(reference_free.Cloned),
}


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
        ld_alpha: LD-DPO's weight of tokens beyond the shorter answer's length.
        wpo: Weight pairs as WPO does.
        **options: Options of the losses by name; each goes to every loss that has it. None: the loss's default.
            `divergence` is a name in `DIVERGENCES`, `divergence_alpha` the order of `alpha_divergence`.

    Returns:
        The loss.

    Raises:
        InputError: If a name is unknown, an option is not used by any of the losses or out of its range, or losses do
            not go together.
    """
    terms = (name,) if isinstance(name, str) else tuple(name)
    _check_terms(terms, weights)
    options = {option: value for option, value in options.items() if value is not None}
    weights = (1.0,) * len(terms) if weights is None else tuple(weights)
    bound = tuple(_defaults(term) | {o: v for o, v in options.items() if o in _defaults(term)} for term in terms)
    loss = PreferenceLoss(terms, weights, bound, ld_alpha, wpo)
    _check_options(loss, options)
    return loss


def option_names() -> frozenset[str]:
    """Every option that some loss takes."""
    return frozenset(option for term in LOSSES for option in _defaults(term))


def _defaults(name: str) -> dict[str, Any]:
    parameters = inspect.signature(LOSSES[name]).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    if "divergence" in defaults:
        defaults |= {"divergence": defaults["divergence"].__name__, "divergence_alpha": None}
    return defaults


def _check_terms(terms: tuple[str, ...], weights: Sequence[float] | None):
    if not terms:
        raise InputError(f"no loss is named; choose from {', '.join(LOSSES)}")
    for term in terms:
        if term not in LOSSES:
            hint = ", DPO's name is sigmoid" if term == "dpo" else _nearest(term, LOSSES)
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
        if not _inside(weight, "(-inf, inf)"):
            raise InputError(f"a weight of {' + '.join(terms)} is {weight!r}; expected a finite number")


def _check_options(loss: PreferenceLoss, given: Mapping[str, Any]):
    names = " + ".join(loss.terms)
    known = {option: None for options in loss.options for option in options}
    for option in given:
        if option not in known:
            takers = [term for term in LOSSES if option in _defaults(term)]
            hint = f"; it belongs to {', '.join(takers)}" if takers else _nearest(option, known)
            raise InputError(f"{names} does not use {option!r}{hint}; {names} takes {', '.join(known) or 'no options'}")
    for option, value in {**given, **({} if loss.ld_alpha is None else {"ld_alpha": loss.ld_alpha})}.items():
        if option in _RANGES and not _inside(value, _RANGES[option]):
            raise InputError(f"{names}: {option} is {value!r}; expected a number in {_RANGES[option]}")
        if option in _CHOICES and value not in _CHOICES[option]:
            raise InputError(f"{names}: {option} {value!r} is unknown; choose from {', '.join(_CHOICES[option])}")
    if "exo_pair" in loss.terms and given.get("label_smoothing") == 0:
        raise InputError("exo_pair: label_smoothing is 0, where its divergence is infinite; 1e-3 is usual")
    divergence = given.get("divergence", "reverse_kl")
    if "divergence_alpha" in given and divergence != "alpha_divergence":
        raise InputError(f"divergence_alpha is the order of alpha_divergence; the divergence is {divergence}")
    if loss.ld_alpha is not None and not any(has_reference(term) for term in loss.terms):
        raise InputError(f"ld_alpha weighs log-ratios to a reference, and {names} has no reference")
    if loss.ld_alpha is not None and {"kto", "implicit_prm", "plackett_luce"} & {*loss.terms}:
        raise InputError(f"ld_alpha compares the lengths of two answers, and {names} does not read pairs")
    if loss.wpo and "plackett_luce" in loss.terms:
        raise InputError("wpo weighs pairs, and plackett_luce reads rankings")
    if loss.wpo and any(term.startswith("aot") for term in loss.terms):
        raise InputError(
            "wpo weighs pairs, and aot sorts margins over the batch, so that its rows are no pairs any more"
        )


def _inside(value: Any, interval: str) -> bool:
    low, high = (float(end) for end in interval[1:-1].split(","))
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    return above and below


def _nearest(word: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {close[0]}?" if close else ""
