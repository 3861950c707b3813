"""Losses by name: what a configuration may ask for, which options each takes, and weighted mixtures of them."""

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from numbers import Real
from typing import Any, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from qstar_jax.errors import InputError
from qstar_jax.losses import pairwise, pointwise, rankings, reference_free, token_level, transport
from qstar_jax.losses.answers import LossMetrics
from qstar_jax.losses.divergences import DIVERGENCES, alpha_divergence
from qstar_jax.losses.weighting import desensitize_length, wpo_weights

LossFunction = Callable[..., tuple[Float[Array, "..."], LossMetrics]]

LOSSES: dict[str, LossFunction] = {
    function.__name__: function
    for function in (
        pairwise.sigmoid,
        pairwise.sigmoid_norm,
        pairwise.robust,
        pairwise.hinge,
        pairwise.ipo,
        pairwise.ipo_sum,
        pairwise.exo_pair,
        pairwise.discopop,
        pairwise.dpop,
        pairwise.dpo_shift,
        pointwise.nca_pair,
        pointwise.bco_pair,
        pointwise.sppo_hard,
        pointwise.apo_zero,
        pointwise.apo_down,
        pointwise.kto,
        pointwise.implicit_prm,
        transport.aot,
        transport.aot_unpaired,
        reference_free.sft,
        reference_free.simpo,
        reference_free.cpo,
        reference_free.orpo,
        reference_free.cpl,
        token_level.tdpo1,
        token_level.tdpo2,
        token_level.tgdpo,
        rankings.plackett_luce,
    )
}

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


@dataclass(frozen=True)
class PreferenceLoss:
    """One loss, or a weighted sum of several, with its options bound: `loss(log_ratios=..., mask=...)`.

    Attributes:
        terms: Names of the losses.
        weights: Weight of each.
        options: Options of each, by name; every option of the loss, those left at their defaults too.
        ld_alpha: Weight of tokens beyond the shorter answer's length, in terms with a reference; None: no such weights.
        wpo: Whether pairs are weighted by how likely the policy is to give them.
    """

    terms: tuple[str, ...]
    weights: tuple[float, ...]
    options: tuple[Mapping[str, Any], ...]
    ld_alpha: float | None = None
    wpo: bool = False

    def __hash__(self) -> int:
        """Of all that it says, so that it may be jitted, or a static argument."""
        options = tuple(tuple(sorted(term.items(), key=str)) for term in self.options)
        return hash((self.terms, self.weights, options, self.ld_alpha, self.wpo))

    @cached_property
    def arrays(self) -> frozenset[str]:
        """Names of the arrays that must be passed."""
        needed = {name for term in self.terms for name in _arrays(term)}
        return frozenset(needed | ({"logp", "log_sum_sq"} if self.wpo else set()))

    @property
    def uses_reference(self) -> bool:
        """Whether anything that it reads comes from a reference model."""
        return bool(self.arrays & {"log_ratios", "ref_logp", "kl"})

    @property
    def couples_rows(self) -> bool:
        """Whether the loss of a row depends on the rest of its batch, so that micro-batches would change it."""
        averaged = any(options.get("normalize") == "batch_tokens" for options in self.options)
        return averaged or any(term.startswith("aot") for term in self.terms)

    @property
    def _main(self) -> int:
        """The term that speaks for all: the first that compares with the reference, otherwise the first."""
        return next((i for i, term in enumerate(self.terms) if _has_reference(term)), 0)

    @property
    def beta(self) -> float | None:
        """Temperature of the implicit reward: that of the first loss with a reference, None where no loss has one."""
        return self.options[self._main].get("beta") if self.uses_reference else None

    @property
    def loss_at_reference(self) -> float | None:
        """Loss of a pair if the policy equals its reference (`sigmoid`: ln 2); None where it depends on the answers."""
        if not all(_has_reference(term) for term in self.terms) or self.wpo:
            return None
        zeros = jnp.zeros((1, 2, 1))
        arrays = {"mask": zeros == 0, "labels": jnp.array([[True, False]]), "baseline": jnp.zeros(())}
        return float(self(**{name: arrays.get(name, zeros) for name in self.arrays})[0][0])

    def __str__(self) -> str:
        """The losses, their weights and options, as they would be called."""

        def call(name: str, options: Mapping[str, Any]) -> str:
            return f"{name}({', '.join(f'{option}={value}' for option, value in options.items() if value is not None)})"

        calls = [call(term, options) for term, options in zip(self.terms, self.options, strict=True)]
        if len(calls) > 1:
            calls = [f"{weight:g} {term}" for weight, term in zip(self.weights, calls, strict=True)]
        behind = [f"ld_alpha={self.ld_alpha}"] * (self.ld_alpha is not None) + ["wpo"] * self.wpo
        return ", ".join([" + ".join(calls), *behind])

    def __call__(self, **arrays: Shaped[Array, "..."]) -> tuple[Float[Array, "*B"], LossMetrics]:
        """Computes the loss of each pair.

        Args:
            **arrays: What `self.arrays` names, in the shapes of the losses' docstrings; answers are [..., R, T]. Losses
                of single answers take the pair's [..., 2, T] and `labels` [..., 2], and are averaged over the two.

        Returns:
            The loss, shape [...], and the metrics of the first term with a reference (or of the first).

        Raises:
            TypeError: If arrays are missing, or given and not used.
        """
        optional = {name for term in self.terms for name in _optional_arrays(term)}
        if not self.arrays <= arrays.keys() <= self.arrays | optional:
            raise TypeError(f"{' + '.join(self.terms)} takes {sorted(self.arrays)}; got {sorted(arrays)}")
        total, records = 0.0, []
        for name, weight, options in zip(self.terms, self.weights, self.options, strict=True):
            loss, metrics = LOSSES[name](**self._read(name, arrays), **_bind_divergence(options))
            if "labels" in _arrays(name):
                loss = loss.mean(-1)
            total = total + weight * loss
            records.append(metrics)
        if self.wpo:
            total = total * wpo_weights(arrays["logp"], arrays["mask"], arrays["log_sum_sq"])
        return total, records[self._main]

    def _read(self, name: str, arrays: dict[str, Array]) -> dict[str, Array]:
        own = {array: arrays[array] for array in (*_arrays(name), *_optional_arrays(name)) if array in arrays}
        if self.ld_alpha is not None and own.keys() & {"log_ratios", "ref_logp"}:
            for array in own.keys() & {"log_ratios", "logp", "ref_logp"}:
                own[array] = desensitize_length(own[array], own["mask"], ld_alpha=self.ld_alpha)
        return own


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


def _arrays(name: str) -> tuple[str, ...]:
    """Arrays that a loss cannot do without."""
    parameters = inspect.signature(LOSSES[name]).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty)


def _optional_arrays(name: str) -> tuple[str, ...]:
    parameters = inspect.signature(LOSSES[name]).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is not p.empty)


def _has_reference(name: str) -> bool:
    return bool({"log_ratios", "ref_logp"} & {*_arrays(name)})


def _defaults(name: str) -> dict[str, Any]:
    parameters = inspect.signature(LOSSES[name]).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    if "divergence" in defaults:
        defaults |= {"divergence": defaults["divergence"].__name__, "divergence_alpha": None}
    return defaults


def _bind_divergence(options: Mapping[str, Any]) -> dict[str, Any]:
    bound = dict(options)
    if "divergence" in bound:
        alpha = bound.pop("divergence_alpha")
        divergence = DIVERGENCES[bound["divergence"]]
        bound["divergence"] = divergence if alpha is None else partial(alpha_divergence, alpha=alpha)
    return bound


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
    if loss.ld_alpha is not None and not any(_has_reference(term) for term in loss.terms):
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
