"""Beam search: the K best responses to every prompt, under any objective, with the semantics of one's choice.

One loop serves likelihood and reward-guided search, diverse and stochastic beams. Keys and values are never moved:
tokens stay in the slots in which they were made, and an ancestry table holds the slots that each beam goes through.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
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
from qstar_jax.decoding.search.beam_options import BeamOptions, check_objective
from qstar_jax.decoding.search.beam_selection import Selection, extensions, is_done, select
from qstar_jax.decoding.stop_strings import StopStrings

BLOCK = 4  # maximum number of steps between two checks whether every prompt is done
MAX_WASTE = 64  # blocks may take one step past the limit per this many


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Beams:
    """The state of a search, beside keys and values.

    Attributes:
        live: Beams that grow, K per prompt in G groups. Shapes [B, K, ...].
        ended: The best finished responses. Shapes [B, K, ...].
        closed: Groups whose search is over. Shape [B, G].
        pruned: The best score that was pruned. Shape [B].
        ancestry: Which of the K slots of each step a live beam goes through; -1 for none. Shape [B, K, T].
        key: Key of the noise of stochastic beams.
    """

    live: Partial
    ended: Partial
    closed: Bool[Array, "B G"]
    pruned: Float[Array, " B"]
    ancestry: Int[Array, "B K T"]
    key: jax.Array


@checks_arguments
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
    """Searches for the responses of highest score.

    At every step each live beam is extended by every token. Extensions that end a response compete for K places of
    finished responses, all others for the K places of live beams. `options.early_stopping` tells when the search of a
    prompt is over; that of a batch is over when it is for all prompts. By default scores are unnormalised sums of
    log pi, which is the paper's search; as they can only fall, stopping then loses nothing, and the best response may
    come with a proof: `certified` is True where everything that was pruned had a lower score already.

    Args:
        model: A policy; an `Ensemble` where the objective reads several.
        params: Its parameters; for speed, those that `model.unstack` returns.
        prompts: Right-padded token ids. Shape [B, P].
        prompt_lengths: Tokens of each prompt, 1 to P. Shape [B].
        options: Width, limits, and semantics.
        objective: What is added up.
        stop_strings: Strings that end a response.
        key: A `jax.random.key` for stochastic beams.

    Returns:
        The K best responses to each prompt, best first.

    Raises:
        InputError: The model is none, prompts and lengths do not go together, or `eos_ids` are not of its vocabulary.
        ValueError: If options, objective and key do not go together.

    References:
        arXiv 2404.12358, Eq. 12 and 13.
    """
    check_objective(options, objective)
    if options.stochastic != (key is not None):
        raise ValueError("a key is for stochastic beams, and they need one")
    count, max_new_tokens = options.beams, options.max_new_tokens
    # Read the prompts. All beams of a group start from the same prompt, so only one of them is live.
    logits, memory = model.prefill(params, prompts, prompt_lengths, max_new_tokens * count)
    step = objective(jax.tree.map(lambda x: jnp.repeat(x[:, None], count, axis=1), logits))
    check_eos_ids(options.eos_ids, step.score.shape[-1])
    beams = _start(step, options, stop_strings, key)
    choose = partial(
        _choose,
        prompts=prompts,
        prompt_lengths=prompt_lengths,
        options=options,
        monotone=objective.monotone,
        stop_strings=stop_strings,
    )
    # Check whether all prompts are done once per block of steps, since the host waits for the answer. Blocks have no
    # branches: XLA copies what passes through them, and keys and values are most of the memory. So steps after the end
    # of the last response, or past the limit, still run, and change nothing.
    block = block_size(max_new_tokens)

    def advance(carry, t):
        beams, step, memory = carry
        chosen = choose(beams, step, t)
        if max_new_tokens % block:
            # Past the limit, the last tokens are run once more, into the same slots.
            chosen = jax.tree.map(lambda new, old: jnp.where(t < max_new_tokens, new, old), chosen, beams)
            t = jnp.minimum(t, max_new_tokens - 1)
        path = (chosen.ancestry[..., None] == jnp.arange(count)).reshape(len(prompts), count, -1)
        tokens = jax.lax.dynamic_index_in_dim(chosen.live.tokens, t, axis=2, keepdims=False)
        # The last extension is wasted; avoiding it would compile a second copy of `choose` outside the loop.
        logits, memory = model.extend(params, memory, tokens, path, t * count)
        return (chosen, objective(logits), memory), None

    def advance_block(carry):
        state, t = carry
        return jax.lax.scan(advance, state, t + jnp.arange(block))[0], t + block

    def unfinished(carry):
        (beams, _, _), t = carry
        return (t < max_new_tokens) & ~beams.closed.all()

    (beams, _, _), _ = jax.lax.while_loop(unfinished, advance_block, ((beams, step, memory), jnp.int32(0)))
    return _responses(beams, prompt_lengths, options, objective)


def block_size(steps: int) -> int:
    """Steps per block: as many as waste least, at most `BLOCK`; 1 if that were more than one step in `MAX_WASTE`."""
    size = min(range(min(BLOCK, steps), 1, -1), key=lambda size: -steps % size, default=1)
    return size if -steps % size * MAX_WASTE <= steps else 1


def _start(step: StepScores, options: BeamOptions, stop_strings: StopStrings | None, key: jax.Array | None) -> _Beams:
    """Beams without a token, of which the first of each group is live."""
    start = Partial.start(step, options.max_new_tokens, stop_strings)
    rows, beams = start.lengths.shape
    return _Beams(
        live=start.without(jnp.arange(beams)[None] % (beams // options.groups) > 0),
        ended=start.without(start.exists),
        closed=jnp.zeros((rows, options.groups), bool),
        pruned=jnp.full(rows, -jnp.inf, start.score.dtype),
        ancestry=jnp.full((rows, beams, options.max_new_tokens), -1, jnp.int32),
        key=jax.random.key(0) if key is None else key,
    )


def _choose(
    beams: _Beams,
    step: StepScores,
    t: Array,
    *,
    prompts: Array,
    prompt_lengths: Array,
    options: BeamOptions,
    monotone: bool,
    stop_strings: StopStrings | None,
) -> _Beams:
    """Chooses the next token of every live beam, and the slots through which it goes."""
    key, noise = jax.random.split(beams.key)
    score = options.constraints.apply(step.score, beams.live.tokens, t, prompts, prompt_lengths, options.eos_ids)
    step = replace(step, score=score)
    selections, closed, pruned = [], [], beams.pruned
    chosen_before = jnp.zeros((len(prompts), 1, score.shape[-1]), score.dtype)
    for g in range(options.groups):
        # Extend the group's beams. Tokens that earlier groups have chosen cost `diversity` each.
        live, ended, group_step = (_group(x, g, options) for x in (beams.live, beams.ended, step))
        candidates = extensions(live, group_step, options, noise)
        if g:
            candidates = replace(candidates, rank=candidates.score - options.diversity * chosen_before)
        # Choose its new live beams and finished responses.
        was_closed = beams.closed[:, g]
        selection = select(live, ended, was_closed, candidates, t, prompt_lengths, options, stop_strings)
        if options.groups > 1:
            chosen_before += _token_counts(selection.live, t, ~was_closed, score)
        # Close the group if nothing better can come; what is live then is pruned.
        now_closed = was_closed | is_done(selection.live, selection.ended, t, prompt_lengths, options, monotone)
        pruned_now = jnp.where(now_closed, selection.live.score.max(-1), -jnp.inf)
        pruned_now = jnp.where(was_closed, -jnp.inf, jnp.maximum(pruned_now, selection.pruned))
        pruned = jnp.maximum(pruned, pruned_now)
        selections.append(selection)
        closed.append(now_closed)
    return _Beams(
        live=_joined(s.live for s in selections),
        ended=_joined(s.ended for s in selections),
        closed=jnp.stack(closed, axis=1),
        pruned=pruned,
        ancestry=_descend(beams.ancestry, selections, t),
        key=key,
    )


def _group(x: Any, g: int, options: BeamOptions) -> Any:
    """Slices the beams of one group out of arrays [B, K, ...]."""
    width = options.beams // options.groups
    return jax.tree.map(lambda x: x[:, g * width : (g + 1) * width], x)


def _joined(groups: Iterable[Partial]) -> Partial:
    first, *others = groups
    return first.joined(*others)


def _token_counts(live: Partial, t: Array, open_rows: Bool[Array, " B"], score: Array) -> Float[Array, "B 1 V"]:
    """How many live beams of open rows have each token at step t."""
    tokens = jax.lax.dynamic_index_in_dim(live.tokens, t, axis=2, keepdims=False)
    counted = (live.exists & open_rows[:, None])[..., None]
    hits = jnp.where(counted, jax.nn.one_hot(tokens, score.shape[-1], dtype=score.dtype), 0)
    return hits.sum(1, keepdims=True)


def _descend(ancestry: Int[Array, "B K T"], selections: list[Selection], t: Array) -> Int[Array, "B K T"]:
    """Every beam goes through its parent's slots, and its own at step t."""
    beams = ancestry.shape[1]
    width = beams // len(selections)
    parents = jnp.concatenate([g * width + s.parents for g, s in enumerate(selections)], axis=1)
    ancestry = jnp.take_along_axis(ancestry, parents[..., None], axis=1)
    return ancestry.at[:, :, t].set(jnp.arange(beams, dtype=jnp.int32))


def _responses(beams: _Beams, prompt_lengths: Array, options: BeamOptions, objective: Objective) -> Responses:
    """The best responses of all groups, finished ones and those that ran into the limit."""
    width = options.beams // options.groups
    # Live beams of closed groups were pruned. Others ran into the limit; with `drop`, they count only where none ended.
    unused = beams.closed
    dropped = jnp.zeros_like(unused)
    if options.truncated == "drop":
        dropped = beams.ended.exists.reshape(*unused.shape, width).any(-1)
    unused, dropped = (jnp.repeat(x, width, axis=1) for x in (unused | dropped, dropped))
    score = options.normalised(beams.live.score, options.max_new_tokens, prompt_lengths)
    live = replace(beams.live, score=score).without(unused)
    # The best K of each group, then of all groups.
    groups = [_group(beams.ended, g, options).joined(_group(live, g, options)) for g in range(options.groups)]
    best = _joined(group.best(width) for group in groups).best(options.beams)
    # The first response is proven to be the best if all that was pruned had a lower score, as scores can only fall.
    certified = None
    if objective.monotone and options.length_rule == "none" and options.groups == 1 and not options.stochastic:
        pruned = jnp.maximum(beams.pruned, jnp.where(dropped, beams.live.score, -jnp.inf).max(-1))
        certified = best.exists[:, 0] & (best.score[:, 0] >= pruned)
    return best.responses(certified)
