"""Monte-Carlo tree search over tokens, one tree per prompt, under any objective.

Each simulation has the phases of mctx: `simulate` descends to an action that leads to no node, `expand` makes the node,
`backward` updates values on the way back to the root. A node is one token in the pool of the policy's memory, and its
past is a mask, so a tree costs the keys and values of its nodes and no more. The end of a response never becomes a
node: its value is known, and is backed up again whenever a simulation comes by.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qstar_jax.decoding.arguments import check_eos_ids, checks_arguments
from qstar_jax.decoding.objectives import Likelihood, Objective, StepScores
from qstar_jax.decoding.partial import Partial
from qstar_jax.decoding.policies import Policy
from qstar_jax.decoding.responses import Responses
from qstar_jax.decoding.sampler import Sampler
from qstar_jax.decoding.sampling import SampleOptions
from qstar_jax.decoding.search.action_selection import gumbel_interior, gumbel_root, halving_schedule, puct
from qstar_jax.decoding.search.mcts_options import MctsOptions
from qstar_jax.decoding.search.tree import COMPLETE, DEAD_END, NO_PARENT, UNVISITED, Children, Tree
from qstar_jax.decoding.search.tree_responses import complete_responses, finish_greedily


@checks_arguments
@partial(jax.jit, static_argnames=("model", "options", "objective"))
def mcts(
    model: Policy,
    params: Any,
    prompts: Int[Array, "B P"],
    prompt_lengths: Int[Array, " B"],
    options: MctsOptions,
    *,
    objective: Objective = Likelihood(),
    root_values: Float[Array, " B"] | None = None,
    key: jax.Array | None = None,
) -> tuple[Responses, Tree]:
    """Searches for responses of high score with trees.

    Priors are log pi among a node's `num_actions` most likely tokens, rewards the objective's scores over the whole
    vocabulary, values the objective's values, or 0. Choices, means and counts are those of mctx, except for the nodes
    that mctx makes after the ends of responses. A tree without an unvisited action is done, and the search ends when
    all trees are.

    Responses are ranked by score and value, as beams are, among those whose end was visited. If none was, there is one
    response: the most visited path, finished greedily by the policy.

    Args:
        model: A policy; an `Ensemble` where the objective reads several.
        params: Its parameters; for speed, those that `model.unstack` returns.
        prompts: Right-padded token ids. Shape [B, P].
        prompt_lengths: Tokens of each prompt, 1 to P. Shape [B].
        options: Rule of selection and sizes.
        objective: What is added up.
        root_values: Value of each prompt, on the scale of the objective's values; 0 by default. Shape [B].
        key: A `jax.random.key` for `gumbel` with noise.

    Returns:
        (responses, trees): the `n_best` best responses to each prompt, best first, INVALID where there are fewer.

    Raises:
        InputError: See `beam_search`.
        ValueError: If there is a key without noise, or noise without a key.
    """
    noisy = options.policy == "gumbel" and options.gumbel_scale > 0
    if noisy != (key is not None):
        raise ValueError("a key is for policy 'gumbel' with a gumbel_scale above 0, which needs one")
    num_simulations = options.num_simulations
    batch_range = jnp.arange(len(prompts))
    # Evaluate the roots, and allocate all nodes.
    logits, memory = model.prefill(params, prompts, prompt_lengths, num_simulations)
    root = objective(logits)
    check_eos_ids(options.eos_ids, root.score.shape[-1])
    tree = instantiate_tree_from_root(root, root_values, options)
    if noisy:
        noise = jax.random.gumbel(key, tree.root_gumbel.shape, tree.root_gumbel.dtype)
        tree = replace(tree, root_gumbel=options.gumbel_scale * noise)
    schedule = None
    if options.policy == "gumbel":
        considered = range(options.considered + 1)
        schedule = jnp.array([halving_schedule(m, num_simulations) for m in considered], jnp.int32)

    def body(carry):
        tree, memory, simulation = carry
        active = tree.unvisited > 0
        # A node first expanded on simulation i has node index i + 1, and its token lies in slot i of the pool.
        parent_index, action, path = simulate(tree, options, schedule)
        token = tree.children.tokens[batch_range, parent_index, action]
        path = (path | (jnp.arange(num_simulations) == simulation))[:, None]
        logits, memory = model.extend(params, memory, token[:, None], path, simulation)
        children = Children.of_step(jax.tree.map(lambda x: x[:, 0], objective(logits)), options.num_actions)
        tree = expand(tree, parent_index, action, simulation + 1, children, active, options.eos_ids)
        tree = backward(tree, parent_index, action, active)
        return tree, memory, simulation + 1

    def unfinished(carry):
        tree, _, simulation = carry
        return (simulation < num_simulations) & (tree.unvisited > 0).any()

    tree, memory, _ = jax.lax.while_loop(unfinished, body, (tree, memory, jnp.int32(0)))
    # Rank the responses whose end was visited; where there are none, finish the most visited path.
    count = options.n_best or num_simulations
    complete = complete_responses(tree, count, options.eos_ids)
    greedy = SampleOptions(options.max_new_tokens, options.eos_ids, temperature=0.0)
    sampler = Sampler(model, params, prompts, prompt_lengths, greedy, objective)
    finished = finish_greedily(tree, ~complete.exists.any(-1), sampler, memory)
    return finished.joined(complete).best(count).responses(), tree


def instantiate_tree_from_root(root: StepScores, root_values: Array | None, options: MctsOptions) -> Tree:
    """Makes trees of a root each, with space for as many nodes as there are simulations.

    Args:
        root: Scores of the tokens that follow each prompt. Shape [B, V].
        root_values: Value of each prompt; 0 by default. Shape [B].
        options: Sizes.
    """

    def allocate(x: Array, fill: int = 0) -> Array:
        return jnp.full((len(x), options.num_simulations + 1, *x.shape[1:]), fill, x.dtype).at[:, 0].set(x)

    children = Children.of_step(root, options.num_actions)
    prefix = Partial.start(jax.tree.map(lambda x: x[:, None], root), options.max_new_tokens)
    zeros, no_parent = jnp.zeros_like(children.rewards[:, 0]), jnp.full(len(children.tokens), NO_PARENT, jnp.int32)
    value = zeros if root_values is None else root_values.astype(zeros.dtype)
    return Tree(
        node_visits=allocate(jnp.ones_like(no_parent)),
        raw_values=allocate(value),
        node_values=allocate(value),
        parents=allocate(no_parent, NO_PARENT),
        action_from_parent=allocate(no_parent, NO_PARENT),
        children=replace(jax.tree.map(allocate, children), index=allocate(children.index, UNVISITED)),
        prefixes=jax.tree.map(lambda x: allocate(x[:, 0]), prefix),
        unvisited=children.valid.sum(-1).astype(jnp.int32),
        root_gumbel=jnp.zeros_like(children.prior_logits),
    )


def simulate(
    tree: Tree, options: MctsOptions, schedule: Int[Array, "C N"] | None
) -> tuple[Int[Array, " B"], Int[Array, " B"], Bool[Array, "B M"]]:
    """Traverses each tree from the root to an action that leads to no node.

    Args:
        tree: Trees.
        options: Rule of selection.
        schedule: See `gumbel_root`.

    Returns:
        (parent_index, action, path): the node reached and its action, shape [B]; and the pool's slots of the nodes on
        the way, shape [B, M].
    """
    rows, num_nodes = tree.parents.shape
    batch_range = jnp.arange(rows)
    scaling = {"value_scale": options.value_scale, "visit_init": options.visit_init}

    def select_action(node_index: Array) -> Array:
        node = tree.at(node_index)
        if options.policy == "puct":
            return puct(node, pb_c_init=options.pb_c_init, pb_c_base=options.pb_c_base)
        at_root = gumbel_root(node, tree.root_gumbel, schedule, **scaling)
        return jnp.where(node_index == 0, at_root, gumbel_interior(node, **scaling))

    def descend(carry):
        node_index, action, path = carry
        next_node_index = tree.children.index[batch_range, node_index, action]
        is_continuing = next_node_index >= 0
        node_index = jnp.where(is_continuing, next_node_index, node_index)
        # Node i lies in slot i - 1.
        path |= is_continuing[:, None] & (jnp.arange(num_nodes - 1) == node_index[:, None] - 1)
        return node_index, jnp.where(is_continuing, select_action(node_index), action), path

    def is_continuing(carry):
        node_index, action, _ = carry
        return (tree.children.index[batch_range, node_index, action] >= 0).any()

    root = jnp.zeros(rows, jnp.int32)
    start = (root, select_action(root), jnp.zeros((rows, num_nodes - 1), bool))
    return jax.lax.while_loop(is_continuing, descend, start)


def expand(
    tree: Tree,
    parent_index: Int[Array, " B"],
    action: Int[Array, " B"],
    next_node_index: Int[Array, ""],
    children: Children,
    active: Bool[Array, " B"],
    eos_ids: tuple[int, ...],
) -> Tree:
    """Makes a node for an unvisited action, unless a response ends there.

    Args:
        tree: Trees.
        parent_index: The node from which the action is expanded. Shape [B].
        action: The action. Shape [B].
        next_node_index: The node to make, in all trees.
        children: Its children. Shape [B, A].
        active: Trees that are not exhausted. Shape [B].
        eos_ids: Tokens that end a response.
    """
    batch_range = jnp.arange(len(parent_index))
    edge = jax.tree.map(lambda x: x[batch_range, parent_index, action], tree.children)
    is_new = active & (edge.index == UNVISITED)
    # Append the action's token to the parent's tokens: either a response ends with it, or there is a new node.
    edges = jax.tree.map(lambda x: x[:, None], edge)
    prefix = tree.prefixes.take(parent_index[:, None])
    prefix = prefix.append(edges.tokens, edges.scores, is_new[:, None], eos_ids=eos_ids)
    ends = ~prefix.growing[:, 0]
    is_node = is_new & ~ends

    def update(x: Array, value: Array) -> Array:
        mask = is_node.reshape(-1, *[1] * (value.ndim - 1))
        return x.at[:, next_node_index].set(jnp.where(mask, value, x[:, next_node_index]))

    # Let the action lead there.
    leads_to = jnp.where(ends, COMPLETE, jnp.where(children.valid.any(-1), next_node_index, DEAD_END))
    leads_to = jnp.where(is_new, leads_to, edge.index)
    new_children = jax.tree.map(update, tree.children, children)
    index = new_children.index.at[batch_range, parent_index, action].set(leads_to)
    num_children = children.valid.sum(-1).astype(jnp.int32)
    return replace(
        tree,
        node_visits=update(tree.node_visits, jnp.ones_like(parent_index)),
        raw_values=update(tree.raw_values, edge.values),
        node_values=update(tree.node_values, edge.values),
        parents=update(tree.parents, parent_index),
        action_from_parent=update(tree.action_from_parent, action),
        children=replace(new_children, index=index),
        prefixes=jax.tree.map(lambda x, new: update(x, new[:, 0]), tree.prefixes, prefix),
        unvisited=tree.unvisited - is_new + jnp.where(is_node, num_children, 0),
    )


def backward(tree: Tree, parent_index: Int[Array, " B"], action: Int[Array, " B"], active: Bool[Array, " B"]) -> Tree:
    """Goes up from an action to the root, and updates visits and values on the way.

    Args:
        tree: Trees.
        parent_index: The node whose action was visited. Shape [B].
        action: The action. Shape [B].
        active: Trees that are updated. Shape [B].
    """
    batch_range = jnp.arange(len(parent_index))

    def update(x: Array, value: Array, where: Array, *index: Array) -> Array:
        index = (batch_range, *index)
        return x.at[index].set(jnp.where(where, value, x[index]))

    def step(carry):
        tree, node, action, leaf_value, active = carry
        # The parent's mean takes in what came back: the reward of the action, and the value of its node.
        children = tree.children
        leaf_value = children.rewards[batch_range, node, action] + leaf_value
        count = tree.node_visits[batch_range, node]
        visits = count.astype(leaf_value.dtype)
        mean = (tree.node_values[batch_range, node] * visits + leaf_value) / (visits + 1)
        # The action has the value of its node, whose mean was updated before.
        child = children.index[batch_range, node, action]
        child_value = tree.node_values[batch_range, child]
        child_visits = children.visits[batch_range, node, action] + 1
        children = replace(
            children,
            values=update(children.values, child_value, active & (child >= 0), node, action),
            visits=update(children.visits, child_visits, active, node, action),
        )
        tree = replace(
            tree,
            node_values=update(tree.node_values, mean, active, node),
            node_visits=update(tree.node_visits, count + 1, active, node),
            children=children,
        )
        # Trees that are done stay at the root, where nothing is updated any more.
        active &= node > 0
        action, node = (jnp.where(active, x[batch_range, node], 0) for x in (tree.action_from_parent, tree.parents))
        return tree, node, action, leaf_value, active

    leaf_value = tree.children.values[batch_range, parent_index, action]
    start = (tree, parent_index, action, leaf_value, active)
    return jax.lax.while_loop(lambda carry: carry[-1].any(), step, start)[0]
