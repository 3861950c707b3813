"""Responses read off a search tree: those whose end was visited, or the most visited path, finished greedily."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from qstar_jax.decoding.partial import Partial
from qstar_jax.decoding.policies import Memory
from qstar_jax.decoding.sampler import Sampler, SamplingState
from qstar_jax.decoding.search.tree import COMPLETE, DEAD_END, Tree


def complete_responses(tree: Tree, count: int, eos_ids: tuple[int, ...]) -> Partial:
    """Returns the K best responses whose end was visited, best first; those that do not exist come last."""
    # Find the actions of highest score among those that end a response.
    rows, _, num_actions = tree.children.tokens.shape
    score = tree.prefixes.total[..., None] + tree.children.rewards + tree.children.values
    score = jnp.where(tree.children.index == COMPLETE, score, -jnp.inf).reshape(rows, -1)
    score, flat = jax.lax.top_k(jnp.pad(score, ((0, 0), (0, count)), constant_values=-jnp.inf), count)
    exists = score > -jnp.inf
    flat = jnp.where(exists, flat, 0)
    # Append each action's token to the tokens that lead to its node.
    node, action = flat // num_actions, flat % num_actions
    children = jax.tree.map(lambda x: x[jnp.arange(rows)[:, None], node, action], tree.children)
    responses = tree.prefixes.take(node).append(children.tokens, children.scores, exists, eos_ids=eos_ids)
    return responses.without(~exists)


def finish_greedily(tree: Tree, where: Bool[Array, " B"], sampler: Sampler, memory: Memory) -> Partial:
    """Follows the most visited path of some trees, and then the most likely token at every step.

    Args:
        tree: Trees.
        where: Trees whose path is finished. Shape [B].
        sampler: Takes the most likely tokens.
        memory: The policy's memory, node i in slot i - 1.

    Returns:
        One response per tree; none where the tree is not asked for one, or no token is possible. Shapes [B, 1, ...].
    """
    # The path ends with the most likely token of its last node, unless that is a dead end.
    node = tree.most_visited()
    children = tree.at(node).children
    possible = children.valid & (children.index != DEAD_END)
    action = jnp.where(possible, children.prior_logits, -jnp.inf).argmax(-1)
    edges = jax.tree.map(lambda x: x[jnp.arange(len(node)), action][:, None], children)
    where = (where & possible.any(-1))[:, None]
    prefix = tree.prefixes.take(node[:, None])
    partial = prefix.append(edges.tokens, edges.scores, where, eos_ids=sampler.options.eos_ids).without(~where)
    # The path's tokens move to the first slots of a new pool, in their order; later ones will follow them.
    max_new_tokens = prefix.tokens.shape[-1]
    slots = _slots_of_path(tree, node, 2 * max_new_tokens)
    path = (jnp.arange(2 * max_new_tokens) < prefix.lengths)[:, None]
    state = SamplingState(
        partial, jnp.zeros_like(where), None, path, memory.reorder(slots), jnp.zeros(len(where), jnp.int32)
    )
    return sampler.run(state, max_new_tokens, draw=0, slot=max_new_tokens).partial


def _slots_of_path(tree: Tree, node: Int[Array, " B"], size: int) -> Int[Array, "B M"]:
    """The slots of a node and its ancestors, in the order of their tokens; then slot 0."""
    row = jnp.arange(len(node))

    def ascend(_, carry):
        slots, node = carry
        here = (node > 0)[:, None] & (jnp.arange(size) == tree.prefixes.lengths[row, node][:, None] - 1)
        return jnp.where(here, node[:, None] - 1, slots), jnp.maximum(tree.parents[row, node], 0)

    start = jnp.zeros((len(node), size), jnp.int32), node
    return jax.lax.fori_loop(0, tree.prefixes.tokens.shape[-1], ascend, start)[0]
