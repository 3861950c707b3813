"""Answers read off a search tree: those whose end was visited, or the most visited path, finished greedily."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qstar_jax.decoding.objectives import Objective
from qstar_jax.decoding.policies import Memory, Policy
from qstar_jax.decoding.responses import Finish, Responses
from qstar_jax.decoding.search.tree import COMPLETE, DEAD_END, Edges, Tree, edges_of


def is_end(token: Int[Array, "*N"], length: Int[Array, "*N"], room: int, eos_ids: tuple[int, ...]) -> Bool[Array, "*N"]:
    """Whether answers of `length` tokens, of at most `room`, are complete with this last one."""
    return _is_eos(token, eos_ids) | (length == room)


def complete_answers(tree: Tree, *, count: int, room: int, eos_ids: tuple[int, ...]) -> Responses:
    """Ranks the answers whose end has been visited.

    Args:
        tree: Trees.
        count: How many answers, N.
        room: Longest answer T, in tokens.
        eos_ids: Tokens that end an answer.

    Returns:
        The best answers, best first; void where there are fewer.
    """
    rows, _, actions = tree.edges.tokens.shape
    key = tree.scores[..., None] + tree.edges.rewards + tree.edges.values
    key = jnp.where(tree.edges.children == COMPLETE, key, -jnp.inf).reshape(rows, -1)
    key, flat = jax.lax.top_k(jnp.pad(key, ((0, 0), (0, count)), constant_values=-jnp.inf), count)
    valid = key > -jnp.inf
    at = jnp.arange(rows)[:, None], jnp.where(valid, flat // actions, 0)
    edge = jax.tree.map(lambda x: x[*at, jnp.where(valid, flat % actions, 0)], tree.edges)
    place, length = jnp.arange(room), tree.depths[at]
    tokens = jnp.where(place == length[..., None], edge.tokens[..., None], 0)

    def up(_, carry):
        tokens, node = carry
        here = (node > 0)[..., None] & (place == tree.depths[at[0], node][..., None] - 1)
        tokens = jnp.where(here, tree.tokens[at[0], node][..., None], tokens)
        return tokens, jnp.maximum(tree.parents[at[0], node], 0)

    tokens, _ = jax.lax.fori_loop(0, room, up, (tokens, at[1]))
    return Responses(
        tokens=jnp.where(valid[..., None], tokens, 0),
        lengths=jnp.where(valid, length + 1, 0),
        logp=jnp.where(valid, tree.logps[at] + edge.logp, -jnp.inf),
        ref_logp=None if edge.ref_logp is None else jnp.where(valid, tree.ref_logps[at] + edge.ref_logp, -jnp.inf),
        score=key,
        finish=jnp.where(valid, _finish(edge.tokens, eos_ids), Finish.INVALID).astype(jnp.int32),
    )


def with_greedy(
    found: Responses,
    tree: Tree,
    model: Policy,
    params: Any,
    memory: Memory,
    objective: Objective,
    *,
    room: int,
    eos_ids: tuple[int, ...],
) -> Responses:
    """Gives rows without an answer one: the most visited path, and behind it the likeliest token at every step.

    Args:
        found: Answers. Shape [B, N].
        tree: Trees.
        model: The policy.
        params: Its parameters.
        memory: Its memory, node i in slot i - 1.
        objective: What is added up.
        room: Longest answer T, in tokens.
        eos_ids: Tokens that end an answer.

    Returns:
        `found`, with first answers where there were none. Where none of the vocabulary is possible there is still none.
    """
    missing = found.finish[:, 0] == Finish.INVALID
    _, _, node = tree.most_visited(room)
    row, place = jnp.arange(len(node)), jnp.arange(2 * room)

    # The path's tokens move to the pool's first T slots, in their order; new ones go behind them, side by side.
    def up(_, carry):
        slots, tokens, node = carry
        here = (node > 0)[:, None] & (place == tree.depths[row, node][:, None] - 1)
        slots = jnp.where(here, node[:, None] - 1, slots)
        tokens = jnp.where(here[:, :room], tree.tokens[row, node][:, None], tokens)
        return slots, tokens, jnp.maximum(tree.parents[row, node], 0)

    slots, tokens = (jnp.zeros((len(node), size), jnp.int32) for size in (2 * room, room))
    slots, tokens, _ = jax.lax.fori_loop(0, room, up, (slots, tokens, node))
    memory = memory.reorder(slots)
    path = place < tree.depths[row, node][:, None]

    edges = jax.tree.map(lambda x: x[row, node], tree.edges)
    possible = edges.valid & (edges.children != DEAD_END)
    likeliest = jnp.where(possible, edges.priors, -jnp.inf).argmax(-1)
    edge = jax.tree.map(lambda x: x[row, likeliest], replace(edges, valid=possible))
    answer = _Answer(
        tokens=tokens,
        length=tree.depths[row, node],
        score=tree.scores[row, node],
        logp=tree.logps[row, node],
        ref_logp=None if tree.ref_logps is None else tree.ref_logps[row, node],
        finish=jnp.zeros(len(node), jnp.int32),
        going=missing,
    )

    def advance(carry):
        answer, memory, edge, t = carry
        answer = answer.say(edge, room, eos_ids)
        past = path | ((place >= room) & (place <= room + t))
        logits, memory = model.extend(params, memory, edge.tokens[:, None], past[:, None], room + t)
        step = jax.tree.map(lambda x: x[:, 0], objective(logits))
        return answer, memory, jax.tree.map(lambda x: x[:, 0], edges_of(step, 1)), t + 1

    start = (answer, memory, edge, jnp.int32(0))
    answer, *_ = jax.lax.while_loop(lambda carry: carry[0].going.any(), advance, start)
    there = missing & (answer.finish != Finish.INVALID)

    def put(x: Array, own: Array) -> Array:
        wanted = there.reshape(-1, *[1] * (own.ndim - 1))
        return x.at[:, 0].set(jnp.where(wanted, own, x[:, 0]))

    return replace(
        found,
        tokens=put(found.tokens, answer.tokens),
        lengths=put(found.lengths, answer.length),
        logp=put(found.logp, answer.logp),
        ref_logp=None if answer.ref_logp is None else put(found.ref_logp, answer.ref_logp),
        score=put(found.score, answer.score),
        finish=put(found.finish, answer.finish),
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Answer:
    """One answer a row as it becomes longer: as in `Responses`, and whether it goes on."""

    tokens: Int[Array, "B T"]
    length: Int[Array, " B"]
    score: Float[Array, " B"]
    logp: Float[Array, " B"]
    ref_logp: Float[Array, " B"] | None
    finish: Int[Array, " B"]
    going: Bool[Array, " B"]

    def say(self, edge: Edges, room: int, eos_ids: tuple[int, ...]) -> "_Answer":
        """Puts a token behind the answers that go on; where none is possible, an answer remains unfinished."""
        going = self.going & edge.valid
        here = going[:, None] & (jnp.arange(room) == self.length[:, None])
        length = self.length + going
        ends = going & is_end(edge.tokens, length, room, eos_ids)
        return _Answer(
            tokens=jnp.where(here, edge.tokens[:, None], self.tokens),
            length=length,
            score=self.score + jnp.where(going, edge.rewards, 0.0) + jnp.where(ends, edge.values, 0.0),
            logp=self.logp + jnp.where(going, edge.logp, 0.0),
            ref_logp=None if self.ref_logp is None else self.ref_logp + jnp.where(going, edge.ref_logp, 0.0),
            finish=jnp.where(ends, _finish(edge.tokens, eos_ids), self.finish),
            going=going & ~ends,
        )


def _is_eos(token: Array, eos_ids: tuple[int, ...]) -> Array:
    return jnp.isin(token, jnp.array(eos_ids, jnp.int32))


def _finish(token: Array, eos_ids: tuple[int, ...]) -> Array:
    return jnp.where(_is_eos(token, eos_ids), int(Finish.EOS), int(Finish.LENGTH)).astype(jnp.int32)
