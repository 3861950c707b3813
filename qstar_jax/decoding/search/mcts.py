"""Monte-Carlo tree search over tokens, one tree a prompt, under any objective.

Every simulation walks down a tree, adds one node, and hands what it found back up. A node is one token in the pool of
the policy's memory, and its past is a mask, so a tree costs the keys and values of its nodes and no more. The end of an
answer is never made a node: its value is known, and is handed up again whenever a simulation comes by.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qstar_jax.decoding.objectives import Likelihood, Objective
from qstar_jax.decoding.policies import Policy
from qstar_jax.decoding.responses import Responses
from qstar_jax.decoding.search.tree import (
    COMPLETE,
    DEAD_END,
    UNVISITED,
    Edges,
    Tree,
    edges_of,
    gumbel_interior,
    gumbel_root,
    halving_schedule,
    puct,
)
from qstar_jax.decoding.search.tree_responses import complete_answers, is_end, with_greedy


@dataclass(frozen=True)
class MctsOptions:
    """How trees grow.

    Attributes:
        max_new_tokens: Longest answer T, EOS included.
        eos_ids: Tokens that end an answer.
        num_simulations: How often a tree is walked down; as many nodes at most.
        num_actions: Likeliest tokens A that a node considers; all of a smaller vocabulary.
        policy: Rule of selection: `puct` as in MuZero; `gumbel`: sequential halving at the root, and visits that follow
            an improved policy below.
        n_best: How many answers are returned; None: as many as there are simulations.
        pb_c_init: Of puct: weight of the prior.
        pb_c_base: Of puct: visits at which that weight begins to grow.
        gumbel_scale: Of gumbel: noise at the root; 0 for none, and then no key.
        considered: Of gumbel: edges of the root that are visited at all.
        value_scale: Of gumbel: weight of values against log-probabilities.
        visit_init: Of gumbel: visits that are added to the most visited edge's in that weight.
    """

    max_new_tokens: int
    eos_ids: tuple[int, ...]
    num_simulations: int
    num_actions: int
    policy: Literal["puct", "gumbel"] = "puct"
    n_best: int | None = None
    pb_c_init: float = 1.25
    pb_c_base: float = 19652.0
    gumbel_scale: float = 1.0
    considered: int = 16
    value_scale: float = 0.1
    visit_init: float = 50.0

    def __post_init__(self):
        """Refuses what has no meaning or would have no effect."""
        wrong = None
        sizes = ("max_new_tokens", "num_simulations", "num_actions", "considered")
        small = [name for name in sizes if getattr(self, name) < 1]
        others = ("pb_c_init", "pb_c_base") if self.policy == "gumbel" else _GUMBEL_ONLY
        unread = [name for name in others if getattr(self, name) != type(self).__dataclass_fields__[name].default]
        if small:
            wrong = f"{small[0]} {getattr(self, small[0])}: expected at least 1"
        elif self.policy not in ("puct", "gumbel"):
            wrong = f"policy {self.policy!r}: expected 'puct' or 'gumbel'"
        elif unread:
            wrong = f"{unread[0]} {getattr(self, unread[0])} has no effect with policy {self.policy!r}"
        elif self.n_best is not None and not 1 <= self.n_best <= self.num_simulations:
            wrong = f"n_best {self.n_best}: expected 1 to num_simulations {self.num_simulations}, each finds one answer"
        elif self.pb_c_base <= 0 or self.gumbel_scale < 0:
            wrong = f"pb_c_base {self.pb_c_base} is above 0, gumbel_scale {self.gumbel_scale} at least 0"
        elif any(eos < 0 for eos in self.eos_ids):
            wrong = f"eos_ids {self.eos_ids} are token ids, from 0 on"
        if wrong:
            raise ValueError(wrong)


_GUMBEL_ONLY = ("gumbel_scale", "considered", "value_scale", "visit_init")


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
    """Searches for answers of high score by growing trees.

    Priors are log pi among a node's `num_actions` likeliest tokens, rewards the objective's scores from the whole
    vocabulary, values the objective's, or 0. Choices, means and counts are those of mctx, but for what mctx puts below
    ends of answers. A row whose tree has no unvisited edge left is done, and the search ends when all rows are.

    Answers are ranked by score and value, as beams are, among those whose end a simulation has come to. If it has come
    to none, there is one answer: the most visited path, finished greedily with the policy.

    Args:
        model: A policy; an `Ensemble` where the objective reads several.
        params: Its parameters; for speed, those that `model.unstack` returns.
        prompts: Right-padded token ids. Shape [B, P].
        prompt_lengths: Tokens of each prompt, at least 1. Shape [B].
        options: Rule of selection and sizes.
        objective: What is added up.
        root_values: Value of each prompt, in the gauge of the objective's values; 0 by default. Shape [B].
        key: A `jax.random.key` for `gumbel` with noise.

    Returns:
        The best answers of each prompt, best first, N = `n_best` of them with void ones behind; and the trees.

    Raises:
        ValueError: If there is a key and no noise, or the reverse.
    """
    noisy = options.policy == "gumbel" and options.gumbel_scale > 0
    if noisy != (key is not None):
        raise ValueError("a key is for policy 'gumbel' with a gumbel_scale above 0, which needs one")
    rows, simulations = prompts.shape[0], options.num_simulations
    logits, memory = model.prefill(params, prompts, prompt_lengths, simulations)
    tree = _plant(edges_of(objective(logits), options.num_actions), root_values, simulations)
    if noisy:
        noise = jax.random.gumbel(key, tree.gumbel.shape, tree.gumbel.dtype)
        tree = replace(tree, gumbel=options.gumbel_scale * noise)
    schedule = [halving_schedule(m, simulations) for m in range(options.considered + 1)]
    schedule = jnp.array(schedule, jnp.int32) if options.policy == "gumbel" else None
    row = jnp.arange(rows)

    def simulate(carry):
        tree, memory, sim = carry
        parent, action, path = _walk(tree, options, schedule)
        token = tree.edges.tokens[row, parent, action]
        path = (path | (jnp.arange(simulations) == sim))[:, None]
        logits, memory = model.extend(params, memory, token[:, None], path, sim)
        step = jax.tree.map(lambda x: x[:, 0], objective(logits))
        tree = _grow(tree, parent, action, sim + 1, edges_of(step, options.num_actions), options)
        return tree, memory, sim + 1

    def unfinished(carry):
        tree, _, sim = carry
        return (sim < simulations) & (tree.unvisited > 0).any()

    tree, memory, _ = jax.lax.while_loop(unfinished, simulate, (tree, memory, jnp.int32(0)))
    ending = {"room": options.max_new_tokens, "eos_ids": options.eos_ids}
    found = complete_answers(tree, count=options.n_best or simulations, **ending)
    return with_greedy(found, tree, model, params, memory, objective, **ending), tree


def _plant(root: Edges, root_values: Array | None, simulations: int) -> Tree:
    """Trees of a root each, with room for as many nodes as there are simulations."""
    rows = len(root.tokens)

    def first_of_many(x: Array, void=0) -> Array:
        return jnp.full((rows, simulations + 1, *x.shape[1:]), void, x.dtype).at[:, 0].set(x)

    number, sums = jnp.zeros(rows, jnp.int32), jnp.zeros(rows, root.rewards.dtype)
    value = sums if root_values is None else root_values.astype(sums.dtype)
    return Tree(
        parents=first_of_many(number - 1, -1),
        actions=first_of_many(number - 1, -1),
        tokens=first_of_many(number),
        depths=first_of_many(number),
        visits=first_of_many(number + 1),
        values=first_of_many(value),
        raw_values=first_of_many(value),
        scores=first_of_many(sums),
        logps=first_of_many(jnp.zeros_like(root.logp[:, 0])),
        ref_logps=None if root.ref_logp is None else first_of_many(jnp.zeros_like(root.ref_logp[:, 0])),
        edges=replace(jax.tree.map(first_of_many, root), children=first_of_many(root.children, UNVISITED)),
        unvisited=root.valid.sum(-1).astype(jnp.int32),
        gumbel=jnp.zeros_like(root.priors),
    )


def _walk(
    tree: Tree, options: MctsOptions, schedule: Array | None
) -> tuple[Int[Array, " B"], Int[Array, " B"], Bool[Array, "B M"]]:
    """From the root to an edge that leads to no node: its parent, its number, and the pool's slots on the way."""
    rows, nodes = tree.parents.shape
    row = jnp.arange(rows)
    scaling = {"value_scale": options.value_scale, "visit_init": options.visit_init}

    def choose(node: Array) -> Array:
        view = tree.view(node)
        if options.policy == "puct":
            return puct(view, pb_c_init=options.pb_c_init, pb_c_base=options.pb_c_base)
        at_root = gumbel_root(view, tree.gumbel, schedule, **scaling)
        return jnp.where(node == 0, at_root, gumbel_interior(view, **scaling))

    def down(carry):
        node, action, path, _ = carry
        child = tree.edges.children[row, node, action]
        going = child >= 0
        node = jnp.where(going, child, node)
        # Node i lies in slot i - 1.
        path |= going[:, None] & (jnp.arange(nodes - 1) == node[:, None] - 1)
        action = jnp.where(going, choose(node), action)
        return node, action, path, (tree.edges.children[row, node, action] >= 0).any()

    root = jnp.zeros(rows, jnp.int32)
    action = choose(root)
    start = (root, action, jnp.zeros((rows, nodes - 1), bool), (tree.edges.children[row, root, action] >= 0).any())
    return jax.lax.while_loop(lambda carry: carry[-1], down, start)[:3]


def _grow(
    tree: Tree, parent: Int[Array, " B"], action: Int[Array, " B"], new: Array, own: Edges, options: MctsOptions
) -> Tree:
    """Makes node `new` at the end of an edge where there is to be one, and hands the edge's value up."""
    row = jnp.arange(len(parent))
    edge = jax.tree.map(lambda x: x[row, parent, action], tree.edges)
    growing = tree.unvisited > 0
    fresh = growing & (edge.children == UNVISITED)
    ends = is_end(edge.tokens, tree.depths[row, parent] + 1, options.max_new_tokens, options.eos_ids)
    made = fresh & ~ends
    able = own.valid.any(-1)

    def put(x: Array, value: Array) -> Array:
        there = made.reshape(-1, *[1] * (value.ndim - 1))
        return x.at[:, new].set(jnp.where(there, value, x[:, new]))

    child = jnp.where(ends, COMPLETE, jnp.where(able, new, DEAD_END))
    edges = jax.tree.map(put, tree.edges, own)
    edges = replace(edges, children=edges.children.at[row, parent, action].set(jnp.where(fresh, child, edge.children)))
    after = own.valid.sum(-1).astype(jnp.int32)
    ref_logps = None
    if tree.ref_logps is not None:
        ref_logps = put(tree.ref_logps, tree.ref_logps[row, parent] + edge.ref_logp)
    tree = replace(
        tree,
        parents=put(tree.parents, parent),
        actions=put(tree.actions, action),
        tokens=put(tree.tokens, edge.tokens),
        depths=put(tree.depths, tree.depths[row, parent] + 1),
        visits=put(tree.visits, jnp.ones_like(parent)),
        values=put(tree.values, edge.values),
        raw_values=put(tree.raw_values, edge.values),
        scores=put(tree.scores, tree.scores[row, parent] + edge.rewards),
        logps=put(tree.logps, tree.logps[row, parent] + edge.logp),
        ref_logps=ref_logps,
        edges=edges,
        unvisited=tree.unvisited - fresh + jnp.where(made, after, 0),
    )
    return _hand_up(tree, parent, action, edge.values, growing)


def _hand_up(tree: Tree, node: Array, action: Array, value: Array, growing: Bool[Array, " B"]) -> Tree:
    """Adds rewards on the way to the root, and takes each sum into the mean of the node that it has reached."""
    row = jnp.arange(len(node))

    def up(carry):
        values, visits, edge_visits, node, action, value, going = carry
        value = tree.edges.rewards[row, node, action] + value
        count = visits[row, node].astype(value.dtype)
        mean = (values[row, node] * count + value) / (count + 1)
        values = values.at[row, node].set(jnp.where(going, mean, values[row, node]))
        visits = visits.at[row, node].add(going)
        edge_visits = edge_visits.at[row, node, action].add(going)
        going &= node > 0
        # Rows that are done stay at the root, where nothing is added.
        action, node = (jnp.where(going, x[row, node], 0) for x in (tree.actions, tree.parents))
        return values, visits, edge_visits, node, action, value, going

    start = (tree.values, tree.visits, tree.edges.visits, node, action, value, growing)
    values, visits, edge_visits, *_ = jax.lax.while_loop(lambda carry: carry[-1].any(), up, start)
    return replace(tree, values=values, visits=visits, edges=replace(tree.edges, visits=edge_visits))
