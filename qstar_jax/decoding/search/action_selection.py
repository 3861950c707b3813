"""The rules by which tree search chooses actions: PUCT, and Gumbel with sequential halving.

Both are those of mctx, whose trees come out the same, node for node. They normalise values within a node; so a number
that is added to the value of every state and passed on from state to state (potential-based shaping) changes no choice.

References:
    arXiv 1911.08265, appendix B (PUCT); Danihelka et al., "Policy improvement by planning with Gumbel", ICLR 2022.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, ScalarLike

from qstar_jax.decoding.search.tree import Node

EPSILON = 1e-8  # smallest range of values that is stretched to 1


def puct(node: Node, *, pb_c_init: ScalarLike, pb_c_base: ScalarLike) -> Int[Array, " B"]:
    """Chooses actions by value and by prior over visits; ties go to the most likely token.

    Args:
        node: One node per tree.
        pb_c_init: Weight of the prior.
        pb_c_base: Visits at which that weight begins to grow.

    Returns:
        The actions. Shape [B].
    """
    children, parent_value = node.children, node.value[:, None]
    visited = children.visits > 0
    # Stretch the values of visited actions and of the node itself to [0, 1]; unvisited actions are at 0.
    qvalues = jnp.where(visited, children.qvalues, parent_value)
    low = jnp.minimum(parent_value, qvalues.min(-1, keepdims=True))
    high = jnp.maximum(parent_value, qvalues.max(-1, keepdims=True))
    value_score = (jnp.where(visited, children.qvalues, low) - low) / jnp.maximum(high - low, EPSILON)
    # Explore by the prior, the less the more an action was visited.
    visits = node.visits.astype(value_score.dtype)[:, None]
    pb_c = pb_c_init + jnp.log((visits + pb_c_base + 1) / pb_c_base)
    policy_score = jnp.sqrt(visits) * pb_c * jax.nn.softmax(children.prior_logits) / (children.visits + 1)
    return _masked_argmax(value_score + policy_score, children.valid)


def gumbel_root(
    node: Node,
    root_gumbel: Float[Array, "B A"],
    schedule: Int[Array, "M N"],
    *,
    value_scale: ScalarLike,
    visit_init: ScalarLike,
) -> Int[Array, " B"]:
    """Chooses the root's actions by sequential halving: some get equal visits, then the better half of them, and so on.

    Args:
        node: The root of each tree.
        root_gumbel: Noise that makes the first choice a sample without replacement; 0 for none. Shape [B, A].
        schedule: Row m: visits of an action under consideration, at each simulation, if m actions are considered.
        value_scale: See `gumbel_interior`.
        visit_init: See `gumbel_interior`.

    Returns:
        The actions. Shape [B].
    """
    children = node.children
    num_considered = jnp.minimum(children.valid.sum(-1), len(schedule) - 1)
    simulation = jnp.minimum(children.visits.sum(-1), schedule.shape[1] - 1)
    considered_visit = schedule[num_considered, simulation][:, None]
    logits = children.prior_logits - children.prior_logits.max(-1, keepdims=True)
    score = jnp.maximum(root_gumbel + logits + _completed_by_mix_value(node, value_scale, visit_init), -1e9)
    return _masked_argmax(score, children.valid & (children.visits == considered_visit))


def gumbel_interior(node: Node, *, value_scale: ScalarLike, visit_init: ScalarLike) -> Int[Array, " B"]:
    """Chooses actions such that visits come to follow the improved policy softmax(prior + completed values).

    Args:
        node: One node per tree.
        value_scale: Weight of values.
        visit_init: Added to the visits of the most visited action in that weight: (visit_init + visits) * value_scale.

    Returns:
        The actions. Shape [B].
    """
    children = node.children
    probs = jax.nn.softmax(children.prior_logits + _completed_by_mix_value(node, value_scale, visit_init))
    share = children.visits / (1 + children.visits.sum(-1, keepdims=True))
    return _masked_argmax(probs - share.astype(probs.dtype), children.valid)


def halving_schedule(considered: int, simulations: int) -> tuple[int, ...]:
    """Visits of an action under consideration at each simulation."""
    if considered <= 1:
        return tuple(range(simulations))
    rounds = math.ceil(math.log2(considered))
    schedule: list[int] = []
    visits = 0
    while len(schedule) < simulations:
        for _ in range(max(1, simulations // (rounds * considered))):
            schedule += [visits] * considered
            visits += 1
        considered = max(2, considered // 2)
    return tuple(schedule[:simulations])


def _completed_by_mix_value(node: Node, value_scale: ScalarLike, visit_init: ScalarLike) -> Float[Array, "B A"]:
    """Values of actions, stretched to [0, 1] and scaled; see `mctx.qtransform_completed_by_mix_value`."""
    children, qvalues = node.children, node.children.qvalues
    visited = children.visits > 0
    # Unvisited actions get a mean of the node's raw value and the values of visited ones, weighted by the prior.
    probs = jnp.maximum(jax.nn.softmax(children.prior_logits), jnp.finfo(qvalues.dtype).tiny)
    probs = jnp.where(visited, probs, 0.0)
    weights = probs / jnp.where(visited, probs.sum(-1, keepdims=True), 1.0)
    weighted_q = jnp.where(visited, weights * qvalues, 0.0).sum(-1)
    visits = children.visits.sum(-1).astype(qvalues.dtype)
    mixed_value = (node.raw_value + visits * weighted_q) / (visits + 1)
    completed = jnp.where(visited, qvalues, mixed_value[:, None])
    # Stretch what valid actions have to [0, 1].
    low = jnp.where(children.valid, completed, jnp.inf).min(-1, keepdims=True)
    high = jnp.where(children.valid, completed, -jnp.inf).max(-1, keepdims=True)
    completed = jnp.where(children.valid, (completed - low) / jnp.maximum(high - low, EPSILON), 0.0)
    # Values count the more, the more visits there were.
    visit_scale = (visit_init + children.visits.max(-1, keepdims=True)).astype(qvalues.dtype)
    return visit_scale * value_scale * completed


def _masked_argmax(score: Float[Array, "B A"], allowed: Bool[Array, "B A"]) -> Int[Array, " B"]:
    return jnp.where(allowed, score, -jnp.inf).argmax(-1).astype(jnp.int32)
