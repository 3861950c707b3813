"""Every loss by name, and the arrays that each reads."""

import inspect
from collections.abc import Callable

from jaxtyping import Array, Float

from qstar_jax.losses import pairwise, pointwise, rankings, reference_free, segments, token_level, transport
from qstar_jax.losses.responses import LossMetrics

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
        pointwise.a_star,
        pointwise.qrpo,
        transport.aot,
        transport.aot_unpaired,
        reference_free.sft,
        reference_free.simpo,
        reference_free.cpo,
        reference_free.orpo,
        segments.cpl,
        token_level.dmpo,
        token_level.tdpo1,
        token_level.tdpo2,
        token_level.tgdpo,
        token_level.weighted_sigmoid,
        rankings.plackett_luce,
    )
}


def needed_arrays(name: str) -> tuple[str, ...]:
    """Arrays that the loss `name` cannot do without."""
    parameters = inspect.signature(LOSSES[name]).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty)


def optional_arrays(name: str) -> tuple[str, ...]:
    """Arrays that the loss `name` reads where they are given."""
    parameters = inspect.signature(LOSSES[name]).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is not p.empty)


def has_reference(name: str) -> bool:
    """Whether the loss `name` compares the policy with a reference."""
    return bool({"log_ratios", "ref_logp"} & {*needed_arrays(name)})


def reads_single(name: str) -> bool:
    """Whether the loss `name` judges single responses, by their labels or their rewards."""
    return bool({"labels", "rewards"} & {*needed_arrays(name)})
