"""Beam search: the K best continuations of every prompt, under any objective, in the semantics of one's choice.

One loop serves likelihood and reward-guided search, diverse and stochastic beams. Keys and values are never moved:
tokens stay in the slots in which they were made, and an ancestry table says which of them each beam goes through.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qstar_jax.decoding.objectives import Likelihood, Objective, StepScores
from qstar_jax.decoding.policies import Memory, Policy
from qstar_jax.decoding.responses import Finish, Responses
from qstar_jax.decoding.search.beam_options import BeamOptions, check_objective
from qstar_jax.decoding.search.beam_selection import Beams, extensions, is_done, select
from qstar_jax.decoding.stop_strings import StopStrings

BLOCK = 4  # most steps between two looks at whether every row is done


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Search:
    """The loop's state: `live` beams with the scores of their next tokens, `ended` ones, and what has been given up."""

    live: Beams
    ended: Beams
    closed: Bool[Array, "B G"]
    pruned: Float[Array, " B"]
    ancestry: Int[Array, "B K T"]
    step: StepScores
    memory: Memory
    key: jax.Array


@partial(jax.jit, static_argnames=("model", "options", "objective"))
def beam_search(
    model: Policy,
    params: Any,
    prompts: Int[Array, "B P"],
    prompt_lengths: Int[Array, " B"],
    options: BeamOptions,
    *,
    objective: Objective = Likelihood(),
    stop_strings: StopStrings | None = None,
    key: jax.Array | None = None,
) -> Responses:
    """Searches for the answers of highest score.

    At every step each live beam is extended by every token. Extensions that end an answer compete for K places of ended
    answers, all others for the K places of live ones. The search of a row is over as `options.early_stopping` says, and
    that of the batch when all rows are done. By default scores are unnormalised sums of log pi, which is the paper's
    search; as they can only fall, stopping then loses nothing, and the best answer may come with a proof: `certified`
    is True where everything that was ever given up had a lower score already.

    Args:
        model: A policy; an `Ensemble` where the objective reads several.
        params: Its parameters; for speed, those that `model.unstack` returns.
        prompts: Right-padded token ids. Shape [B, P].
        prompt_lengths: Tokens of each prompt, at least 1. Shape [B].
        options: Width, limits, and semantics.
        objective: What is added up.
        stop_strings: Strings that end an answer.
        key: A `jax.random.key` for stochastic beams.

    Returns:
        The K best answers of each prompt, best first.

    Raises:
        ValueError: If options and objective do not go together.

    References:
        arXiv 2404.12358, Eq. 12 and 13.
    """
    _check(options, objective, key)
    rows, beams, room = prompts.shape[0], options.beams, options.max_new_tokens
    logits, memory = model.prefill(params, prompts, prompt_lengths, room * beams)
    step = objective(jax.tree.map(lambda x: jnp.repeat(x[:, None], beams, axis=1), logits))
    dtype = step.score.dtype
    live = Beams.empty(rows, beams, room, stop_strings.count if stop_strings else 0, dtype)
    # All beams of a group start from the same prompt: one of them is live, or each answer would be found many times.
    first = jnp.arange(beams) % (beams // options.groups) == 0
    live = replace(live, key=jnp.where(first, jnp.zeros_like(live.key), live.key), valid=live.valid | first)
    state = _Search(
        live=live,
        ended=Beams.empty(rows, beams, room, live.stop.shape[-1], dtype),
        closed=jnp.zeros((rows, options.groups), bool),
        pruned=jnp.full(rows, -jnp.inf, dtype),
        ancestry=jnp.full((rows, beams, room), -1, jnp.int32),
        step=step,
        memory=memory,
        key=jax.random.key(0) if key is None else key,
    )

    choose = partial(
        _choose,
        prompts=prompts,
        prompt_lengths=prompt_lengths,
        options=options,
        monotone=objective.monotone,
        stop_strings=stop_strings,
    )

    def advance(state: _Search, t: Array) -> tuple[_Search, None]:
        """Chooses the live beams' next tokens, t of them being before these, and runs them."""
        state = choose(state, t)
        path = (state.ancestry[..., None] == jnp.arange(beams)).reshape(rows, beams, -1)
        tokens = jax.lax.dynamic_index_in_dim(state.live.tokens, t, axis=2, keepdims=False)
        logits, memory = model.extend(params, state.memory, tokens, path, t * beams)
        return replace(state, step=objective(logits), memory=memory), None

    def advance_block(carry):
        state, t = carry
        state, _ = jax.lax.scan(advance, state, t + jnp.arange(block))
        return state, t + block

    # No branches inside: XLA copies what passes through them, and keys and values are most of the memory. So blocks
    # must come out even, and what follows the end of the last row is harmless. That the last tokens are run for nothing
    # costs less than a first choice outside of the loop, which would be compiled once more.
    block = max(size for size in range(1, BLOCK + 1) if room % size == 0)
    state, _ = jax.lax.while_loop(
        lambda carry: (carry[1] < room) & ~carry[0].closed.all(), advance_block, (state, jnp.int32(0))
    )
    return _result(state, prompt_lengths, options, objective, has_reference=step.ref_logp is not None)


def _check(options: BeamOptions, objective: Objective, key: jax.Array | None):
    check_objective(options, objective)
    if options.stochastic != (key is not None):
        raise ValueError("a key is for stochastic beams, and they need one")


def _choose(
    state: _Search,
    t: Array,
    *,
    prompts: Array,
    prompt_lengths: Array,
    options: BeamOptions,
    monotone: bool,
    stop_strings: StopStrings | None,
) -> _Search:
    """One step of selection: new live and ended beams, and through which slots the live ones go."""
    live, width = state.live, options.beams // options.groups
    token_scores = options.constraints.apply(state.step.score, live.tokens, t, prompts, prompt_lengths, options.eos_ids)
    key, noise = jax.random.split(state.key)
    said = jnp.zeros((*prompts.shape[:1], 1, token_scores.shape[-1]), token_scores.dtype)
    parts, parents, pruned = [], [], state.pruned
    for g in range(options.groups):
        own = slice(g * width, (g + 1) * width)
        cut = partial(jax.tree.map, lambda x, own=own: x[:, own])
        candidates = extensions(cut(live), token_scores[:, own], cut(state.step), options, noise)
        if g:
            candidates = replace(candidates, rank=candidates.key - options.diversity * said)
        new, ended, parent, given_up = select(
            cut(live), cut(state.ended), state.closed[:, g], candidates, t, prompt_lengths, options, stop_strings
        )
        if options.groups > 1:
            chosen = jax.lax.dynamic_index_in_dim(new.tokens, t, axis=2, keepdims=False)
            saying = new.valid & ~state.closed[:, g, None]
            hits = jnp.where(saying[..., None], jax.nn.one_hot(chosen, said.shape[-1], dtype=said.dtype), 0)
            said = said + hits.sum(1, keepdims=True)
        closed = state.closed[:, g] | is_done(new, ended, t, prompt_lengths, options, monotone)
        parts.append((new, ended, closed))
        parents.append(g * width + parent)
        given_up = jnp.maximum(given_up, jnp.where(closed, new.key.max(-1), -jnp.inf))
        pruned = jnp.maximum(pruned, jnp.where(state.closed[:, g], -jnp.inf, given_up))
    lives, endeds, closeds = zip(*parts, strict=True)
    ancestry, memory = _follow(state.ancestry, state.memory, jnp.concatenate(parents, axis=1), t, options)
    return replace(
        state,
        live=lives[0].joined(*lives[1:]),
        ended=endeds[0].joined(*endeds[1:]),
        closed=jnp.stack(closeds, axis=1),
        pruned=pruned,
        ancestry=ancestry,
        memory=memory,
        key=key,
    )


def _follow(
    ancestry: Int[Array, "B K T"], memory: Memory, parents: Int[Array, "B K"], t: Array, options: BeamOptions
) -> tuple[Int[Array, "B K T"], Memory]:
    """Beams go on from their parents: their slots are taken over, or, for `gather`, the contents are moved."""
    rows, beams, room = ancestry.shape
    if options.reorder == "gather":
        memory = memory.reorder((jnp.arange(room)[:, None] * beams + parents[:, None]).reshape(rows, -1))
        parents = jnp.broadcast_to(jnp.arange(beams), parents.shape)
    ancestry = jnp.take_along_axis(ancestry, parents[..., None], axis=1)
    return ancestry.at[:, :, t].set(jnp.arange(beams, dtype=jnp.int32)), memory


def _result(
    state: _Search, prompt_lengths: Array, options: BeamOptions, objective: Objective, has_reference: bool
) -> Responses:
    live, ended = state.live, state.ended
    width, room = options.beams // options.groups, options.max_new_tokens
    live = replace(live, key=options.normalised(live.key, room, prompt_lengths))
    # Live beams of a row that is done have been given up already.
    unused = jnp.repeat(state.closed, width, axis=1)
    dropped = jnp.zeros(live.key.shape, bool)
    if options.truncated == "drop":
        dropped = jnp.repeat(ended.valid.reshape(*state.closed.shape, width).any(-1), width, axis=1)
    live = live.void_where(unused | dropped)
    groups = [
        jax.tree.map(lambda x, own=slice(g * width, (g + 1) * width): x[:, own], (ended, live))
        for g in range(options.groups)
    ]
    parts = [ended.joined(live).best(width) for ended, live in groups]
    best = parts[0].joined(*parts[1:]).best(options.beams)
    certified = None
    if objective.monotone and options.length_rule == "none" and options.groups == 1 and not options.stochastic:
        given_up = jnp.maximum(state.pruned, jnp.where(dropped, state.live.key, -jnp.inf).max(-1))
        certified = best.valid[:, 0] & (best.key[:, 0] >= given_up)
    length = jnp.where(best.valid, best.length, 0)
    return Responses(
        tokens=jnp.where(jnp.arange(room) < length[..., None], best.tokens, 0),
        lengths=length,
        logp=jnp.where(best.valid, best.logp, -jnp.inf),
        ref_logp=jnp.where(best.valid, best.ref_logp, -jnp.inf) if has_reference else None,
        score=best.key,
        finish=jnp.where(best.valid, best.finish, Finish.INVALID),
        certified=certified,
    )
