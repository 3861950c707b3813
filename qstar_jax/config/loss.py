"""The `loss:` and `reference:` blocks."""

from dataclasses import dataclass
from typing import Literal

from qstar_jax.config.variants import path


@dataclass(frozen=True)
class LossOptions:
    """The preference loss: a name and the options that this loss has; one that it does not have is an error.

    Each option that is not set takes the loss's own default. `qstar_jax.losses` has formulas, papers and defaults.

    Args:
        name: sigmoid (DPO), sigmoid_norm, robust, hinge, ipo, ipo_sum, exo_pair, discopop, dpop, dpo_shift, nca_pair,
            bco_pair, sppo_hard, apo_zero, apo_down, implicit_prm, aot, aot_unpaired, plackett_luce; without a reference
            sft, simpo, cpo, orpo, cpl; or a list of them.
        weights: Weight of each loss in a list; 1 each where it is not set.
        beta: Temperature, in nats of reward a nat of log-ratio; what it scales is in each loss's formula (sigmoid:
            0.1).
        label_smoothing: Probability that a label is flipped (sigmoid: conservative DPO).
        divergence: reverse_kl, forward_kl, js_divergence or alpha_divergence to the reference.
        divergence_alpha: Order of alpha_divergence.
        ld_alpha: LD-DPO: weight of tokens beyond the shorter answer's length.
        tau: discopop: width of the blend.
        penalty: dpop: price of a nat by which the chosen answer falls below the reference.
        shift: dpo_shift: weight of the rejected answer.
        gamma: simpo: margin of reward.
        nll_weight: cpo: weight of the chosen answer's negative log-likelihood.
        odds_weight: orpo: weight of the odds ratio.
        normalize: sft, cpo, orpo: how the negative log-likelihood is averaged: batch_tokens, answer_tokens or none.
        bias: cpl: weight of the rejected segment.
        discount: cpl: discount a token.
        bc_weight: cpl: weight of behaviour cloning.
        bc_data: cpl: what is cloned: all or chosen.
    """

    name: list[str] | str = "sigmoid"
    weights: list[float] | None = None
    beta: float | None = None
    label_smoothing: float | None = None
    divergence: str | None = None
    divergence_alpha: float | None = None
    ld_alpha: float | None = None
    tau: float | None = None
    penalty: float | None = None
    shift: float | None = None
    gamma: float | None = None
    nll_weight: float | None = None
    odds_weight: float | None = None
    normalize: Literal["batch_tokens", "answer_tokens", "none"] | None = None
    bias: float | None = None
    discount: float | None = None
    bc_weight: float | None = None
    bc_data: Literal["all", "chosen"] | None = None


@dataclass(frozen=True)
class ReferenceOptions:
    """The reference of a preference loss.

    Args:
        mode: `live` holds a second copy of the parameters and runs it at each step; `cached` computes its
            log-probabilities once, keeps them on disk for this and later runs, and holds no copy; `adapter` runs the
            policy without its adapter (`lora.rank`); `none` is for losses without a reference. `auto` is none for
            those, adapter where there is one, else live.
        cache: Folder of the caches; by default under the user's cache folder.
        sync_every: Steps after which a live reference moves towards the policy (TR-DPO, arXiv 2404.09656); 0: never.
        sync_mix: Weight of the policy in the moved reference; 1 replaces it.
    """

    mode: Literal["auto", "live", "cached", "adapter", "none"] = "auto"
    cache: str | None = path(None)
    sync_every: int = 0
    sync_mix: float = 1.0
