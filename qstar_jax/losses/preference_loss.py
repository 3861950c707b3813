"""One loss, or a weighted sum of several, with its options bound."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from qstar_jax.losses.answers import LossMetrics
from qstar_jax.losses.catalog import LOSSES, has_reference, needed_arrays, optional_arrays
from qstar_jax.losses.divergences import DIVERGENCES, alpha_divergence
from qstar_jax.losses.weighting import desensitize_length, wpo_weights


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
        needed = {name for term in self.terms for name in needed_arrays(term)}
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
        return next((i for i, term in enumerate(self.terms) if has_reference(term)), 0)

    @property
    def beta(self) -> float | None:
        """Temperature of the implicit reward: that of the first loss with a reference, None where no loss has one."""
        return self.options[self._main].get("beta") if self.uses_reference else None

    @property
    def loss_at_reference(self) -> float | None:
        """Loss of a pair if the policy equals its reference (`sigmoid`: ln 2); None where it depends on the answers."""
        if not all(has_reference(term) for term in self.terms) or self.wpo:
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
        optional = {name for term in self.terms for name in optional_arrays(term)}
        if not self.arrays <= arrays.keys() <= self.arrays | optional:
            raise TypeError(f"{' + '.join(self.terms)} takes {sorted(self.arrays)}; got {sorted(arrays)}")
        total, records = 0.0, []
        for name, weight, options in zip(self.terms, self.weights, self.options, strict=True):
            loss, metrics = LOSSES[name](**self._read(name, arrays), **_bind_divergence(options))
            if "labels" in needed_arrays(name):
                loss = loss.mean(-1)
            total = total + weight * loss
            records.append(metrics)
        if self.wpo:
            total = total * wpo_weights(arrays["logp"], arrays["mask"], arrays["log_sum_sq"])
        return total, records[self._main]

    def _read(self, name: str, arrays: dict[str, Array]) -> dict[str, Array]:
        own = {array: arrays[array] for array in (*needed_arrays(name), *optional_arrays(name)) if array in arrays}
        if self.ld_alpha is not None and own.keys() & {"log_ratios", "ref_logp"}:
            for array in own.keys() & {"log_ratios", "logp", "ref_logp"}:
                own[array] = desensitize_length(own[array], own["mask"], ld_alpha=self.ld_alpha)
        return own


def _bind_divergence(options: Mapping[str, Any]) -> dict[str, Any]:
    bound = dict(options)
    if "divergence" in bound:
        alpha = bound.pop("divergence_alpha")
        divergence = DIVERGENCES[bound["divergence"]]
        bound["divergence"] = divergence if alpha is None else partial(alpha_divergence, alpha=alpha)
    return bound
