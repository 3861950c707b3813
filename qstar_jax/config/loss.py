"""The `loss:` and `reference:` blocks."""

from dataclasses import dataclass
from typing import Literal

from qstar_jax.config.variants import option, path, selector


@dataclass(frozen=True)
class LossOptions:
    """The preference loss. Brackets name the losses that read an option; others refuse it.

    Readers and defaults are those of the functions in `qstar_jax.losses`, where formulas and papers are.

    Args:
        name: sigmoid (DPO), sigmoid_norm, robust, hinge, ipo, ipo_sum, exo_pair, discopop, dpop, dpo_shift, nca_pair,
            bco_pair, sppo_hard, apo_zero, apo_down, aot, aot_unpaired; on rankings plackett_luce (on pairs the same as
            sigmoid); on single responses kto, implicit_prm (labels), a_star, qrpo (rewards); without a reference sft,
            simpo, cpo, orpo, cpl; turn by turn dmpo; token by token tdpo1, tdpo2, tgdpo,
            weighted_sigmoid; or a list of them for a weighted sum.
        weights: Weight of each loss in a list; null: 1 each.
        beta: Temperature: reward per nat of log-ratio; each loss's formula says what it scales.
        label_smoothing: Probability that a label is flipped (sigmoid: conservative DPO).
        divergence: Divergence from the reference.
        divergence_alpha: Order of alpha_divergence; null: 0.5.
        ld_alpha: LD-DPO: weight of the tokens beyond the length of the shorter response; null: 1.
        value_beta: Temperature of the prompt's soft value.
        desirable_weight: Weight of desirable responses.
        undesirable_weight: Weight of the others.
        alpha: Strength of the divergences, or of the guide's rewards.
        tau: Width of the blend.
        penalty: Price per nat by which the chosen response falls below the reference.
        shift: Weight of the rejected response.
        gamma: Margin of the reward.
        nll_weight: Weight of the negative log-likelihood of the chosen response.
        odds_weight: Weight of the odds ratio.
        normalize: How the negative log-likelihood is averaged.
        bias: Weight of the rejected segment.
        discount: Discount per token (cpl), or per turn (dmpo).
        bc_weight: Weight of behaviour cloning.
        bc_data: Which responses are cloned.
    """

    name: list[str] | str = "sigmoid"
    weights: list[float] | None = None
    beta: float | None = option(bounds="(0, inf)")
    label_smoothing: float | None = option(bounds="[0, 0.5)")
    divergence: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] | None = option()
    divergence_alpha: float | None = option(bounds="(-inf, inf)")
    ld_alpha: float | None = option(bounds="[0, 1]")
    value_beta: float | None = option(bounds="(0, inf)")
    desirable_weight: float | None = option(bounds="[0, inf)")
    undesirable_weight: float | None = option(bounds="[0, inf)")
    alpha: float | None = option(bounds="(-inf, inf)")
    tau: float | None = option(bounds="(0, inf)")
    penalty: float | None = option(bounds="[0, inf)")
    shift: float | None = option(bounds="(0, 1]")
    gamma: float | None = option(bounds="(-inf, inf)")
    nll_weight: float | None = option(bounds="[0, inf)")
    odds_weight: float | None = option(bounds="[0, inf)")
    normalize: Literal["batch_tokens", "answer_tokens", "none"] | None = option()
    bias: float | None = option(bounds="(0, 1]")
    discount: float | None = option(bounds="(0, 1]")
    bc_weight: float | None = option(bounds="[0, inf)")
    bc_data: Literal["all", "chosen"] | None = option()


@dataclass(frozen=True)
class ReferenceOptions:
    """The reference of a preference loss.

    Args:
        mode: `live` holds a second copy of the parameters and runs it at each step; `cached` computes its
            log-probabilities once, keeps them on disk for this and later runs, and holds no copy; `adapter` runs the
            policy without its adapter (`lora.rank`); `none` is for losses without a reference. `auto` is none for
            those, adapter if there is one, else live.
        cache: Folder of the caches; null: below the user's cache folder.
        guide: Folder of a DPO run whose token rewards guide `tgdpo`, or weigh the tokens of `weighted_sigmoid`; they
            are computed once and cached as well.
        sync_every: Steps after which a live reference moves towards the policy (TR-DPO, arXiv 2404.09656); 0: never.
        sync_mix: Weight of the policy in the moved reference; 1 replaces it.
    """

    mode: Literal["auto", "live", "cached", "adapter", "none"] = "auto"
    cache: str | None = path(None)
    guide: str | None = path(None)
    sync_every: int = 0
    sync_mix: float = 1.0


@dataclass(frozen=True)
class WeightingOptions:
    """Weights of tokens for weighted_sigmoid, from the log-ratios of `reference.guide` (see `losses.token_weights`).

    Brackets name the transforms that read an option; others refuse it.

    Args:
        transform: exponential (TIS-DPO), threshold, threshold_and_scale, rank_based (its code), select (SePO), or the
            control random; none: other losses.
        low: Lower limit of the guide's log-ratio of a token, in nats.
        high: Upper limit.
        sharpness: What the log-ratio is multiplied by before it is exponentiated.
        min_weight: Smallest weight.
        max_weight: Largest weight.
        top: Share of a response's tokens that count.
        control_seed: Seed of random weights.
    """

    transform: Literal["none", "exponential", "threshold", "threshold_and_scale", "rank_based", "select", "random"] = (
        selector("none")
    )
    low: float | None = option(
        {"exponential": -0.5, "threshold": -1.0, "threshold_and_scale": -1.5}, bounds="(-inf, inf)"
    )
    high: float | None = option(
        {"exponential": 1.5, "threshold": 1.0, "threshold_and_scale": 1.5}, bounds="(-inf, inf)"
    )
    sharpness: float | None = option(["exponential"], 1.0, bounds="(-inf, inf)")
    min_weight: float | None = option(["threshold_and_scale", "rank_based", "random"], 0.7, bounds="(-inf, inf)")
    max_weight: float | None = option(["threshold_and_scale", "rank_based", "random"], 1.3, bounds="(-inf, inf)")
    top: float | None = option(["select"], 0.3, bounds="(0, 1]")
    control_seed: int | None = option(["random"], 0, bounds="[0, inf)")
