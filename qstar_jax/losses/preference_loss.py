"""One loss, or a weighted sum of several, with its options bound."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from qstar_jax.losses.catalog import LOSSES, has_reference, needed_arrays, optional_arrays, reads_single
from qstar_jax.losses.divergences import DIVERGENCES, alpha_divergence
from qstar_jax.losses.responses import LossMetrics
from qstar_jax.losses.weighting import desensitize_length, wpo_weights
from qstar_jax.mdp import TokenScores


@dataclass(frozen=True)
class PreferenceLoss:
    """One loss, or a weighted sum of several, with its options bound: `loss(scores)`.

    Attributes:
        terms: Names of the losses.
        weights: Weight of each.
        options: Options of each by name, defaults included.
        ld_alpha: Weight of tokens beyond the length of the shorter response, in terms with a reference; None: 1.
        wpo: Whether pairs are weighted by their probability under the policy.
    """

    terms: tuple[str, ...]
    weights: tuple[float, ...]
    options: tuple[Mapping[str, Any], ...]
    ld_alpha: float | None = None
    wpo: bool = False

    def __hash__(self) -> int:
        """Hashes every field, so that the loss can be jitted or be a static argument."""
        options = tuple(tuple(sorted(term.items(), key=str)) for term in self.options)
        return hash((self.terms, self.weights, options, self.ld_alpha, self.wpo))

    @cached_property
    def arrays(self) -> frozenset[str]:
        """Names of the arrays that the losses read."""
        needed = {name for term in self.terms for name in needed_arrays(term)}
        return frozenset(needed | ({"logp", "log_sum_sq"} if self.wpo else set()))

    @property
    def extra_arrays(self) -> frozenset[str]:
        """Names of the arrays that must be passed beside the scores of a batch of pairs."""
        return self.arrays - {"log_ratios", "logp", "ref_logp", "mask", "labels"}

    @property
    def reads_single(self) -> bool:
        """Whether all its terms judge single responses, by labels or rewards, so that it needs no pairs."""
        return all(reads_single(term) for term in self.terms)

    @property
    def uses_reference(self) -> bool:
        """Whether any array that it reads comes from a reference model."""
        return bool(self.arrays & {"log_ratios", "ref_logp", "kl"})

    @property
    def couples_rows(self) -> bool:
        """Whether the loss of a pair depends on the rest of its batch, so that micro-batches would change it."""
        averaged = any(options.get("normalize") == "batch_tokens" for options in self.options)
        return averaged or any(term.startswith("aot") for term in self.terms)

    @property
    def _main(self) -> int:
        """The term that provides `beta` and the metrics: the first with a reference, otherwise the first."""
        return next((i for i, term in enumerate(self.terms) if has_reference(term)), 0)

    @property
    def beta(self) -> float | None:
        """Temperature of the implicit reward: that of the first loss with a reference; None if no loss has one."""
        return self.options[self._main].get("beta") if self.uses_reference else None

    @property
    def loss_at_reference(self) -> float | None:
        """Loss of a pair where the policy equals its reference (`sigmoid`: ln 2); None if it depends on the pair."""
        if not all(has_reference(term) for term in self.terms) or self.wpo or "rewards" in self.arrays:
            return None
        if any(options.get("desirable_weight") != options.get("undesirable_weight") for options in self.options):
            return None
        zeros = jnp.zeros((1, 2, 1))
        scores = TokenScores(logp=zeros, ref_logp=zeros, logz=None, mask=zeros == 0)
        others = {"baseline": jnp.zeros(()), "turns": jnp.zeros(zeros.shape, int)}
        extra = {name: others.get(name, zeros) for name in self.extra_arrays}
        return float(self(scores, **extra)[0][0])

    def __str__(self) -> str:
        """Shows the losses, their weights and options, as they would be called."""

        def call(name: str, options: Mapping[str, Any]) -> str:
            return f"{name}({', '.join(f'{option}={value}' for option, value in options.items() if value is not None)})"

        calls = [call(term, options) for term, options in zip(self.terms, self.options, strict=True)]
        if len(calls) > 1:
            calls = [f"{weight:g} {term}" for weight, term in zip(self.weights, calls, strict=True)]
        suffixes = [f"ld_alpha={self.ld_alpha}"] * (self.ld_alpha is not None) + ["wpo"] * self.wpo
        return ", ".join([" + ".join(calls), *suffixes])

    def __call__(
        self, scores: TokenScores, *, labels: Bool[Array, "*B R"] | None = None, **arrays: Shaped[Array, "..."]
    ) -> tuple[Float[Array, "*B"], LossMetrics]:
        """Computes the loss of each pair.

        Args:
            scores: Scores of the responses, chosen first (or best first). Shape [..., R, T].
            labels: Whether each response is desirable, for losses of single responses, which are averaged over the
                pair; None: the first is, the others are not. Shape [..., R].
            **arrays: What `self.extra_arrays` names, in the shapes of the losses' docstrings.

        Returns:
            The loss, shape [...], and the metrics of the first term with a reference (or of the first).

        Raises:
            TypeError: If arrays are missing, or are given and not read.
            ValueError: If a loss reads a reference, and the scores have none.
        """
        # What is not in the scores must be given, and read by some term.
        optional = {name for term in self.terms for name in optional_arrays(term)}
        if not self.extra_arrays <= arrays.keys() <= self.extra_arrays | optional:
            name, needs = " + ".join(self.terms), sorted(self.extra_arrays)
            raise TypeError(f"{name} takes {needs or 'no arrays'} beside the scores; got {sorted(arrays)}")
        arrays |= {"mask": scores.mask, "labels": labels}
        if labels is None:
            arrays["labels"] = jnp.broadcast_to(jnp.arange(scores.mask.shape[-2]) == 0, scores.mask.shape[:-1])
        # The weighted sum of the terms; losses of single responses are averaged over the responses.
        total, records = 0.0, []
        for name, weight, options in zip(self.terms, self.weights, self.options, strict=True):
            loss, metrics = LOSSES[name](**self._read(name, scores, arrays), **_bind_divergence(options))
            if reads_single(name):
                loss = loss.mean(-1)
            total = total + weight * loss
            records.append(metrics)
        # WPO weights whole pairs.
        if self.wpo:
            total = total * wpo_weights(scores.logp, scores.mask, arrays["log_sum_sq"])
        return total, records[self._main]

    def _read(self, name: str, scores: TokenScores, arrays: dict[str, Array]) -> dict[str, Array]:
        """Collects the arrays that one term reads, weighted beyond the shorter response if there is an `ld_alpha`."""
        needed = needed_arrays(name)
        read = {array: arrays[array] for array in (*needed, *optional_arrays(name)) if array in arrays}
        read |= {array: scores.require(array) for array in ("logp", "ref_logp") if array in needed}
        if "log_ratios" in needed:
            read["log_ratios"] = scores.log_ratios()
        if self.ld_alpha is not None and has_reference(name):
            for array in read.keys() & {"log_ratios", "logp", "ref_logp"}:
                read[array] = desensitize_length(read[array], scores.mask, ld_alpha=self.ld_alpha)
        return read


def _bind_divergence(options: Mapping[str, Any]) -> dict[str, Any]:
    bound = dict(options)
    if "divergence" in bound:
        alpha = bound.pop("divergence_alpha")
        divergence = DIVERGENCES[bound["divergence"]]
        bound["divergence"] = divergence if alpha is None else partial(alpha_divergence, alpha=alpha)
    return bound
