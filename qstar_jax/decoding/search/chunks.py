"""Chunk-level beam search: every beam draws several continuations of a few tokens, and the best prefixes continue.

It lies between sampling and beam search: one chunk as long as a response is best-of-N, chunks of one token are a beam
search among sampled tokens. With `ImplicitReward` a chunk's contribution is a step reward of the policy as a process
reward model (`mdp.step_rewards`), and a prefix's sum is its reward so far plus the value of where it leads.

References:
    Zhou et al., "Weak-to-strong search", arXiv 2405.19262.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from qstar_jax.decoding.arguments import checks_arguments, token_id_tuple
from qstar_jax.decoding.constraints import Constraints
from qstar_jax.decoding.objectives import Objective
from qstar_jax.decoding.partial import Partial, take_rows
from qstar_jax.decoding.policies import Policy
from qstar_jax.decoding.responses import Responses
from qstar_jax.decoding.sampler import Sampler, SamplingState
from qstar_jax.decoding.sampling import SampleOptions
from qstar_jax.decoding.stop_strings import StopStrings


@dataclass(frozen=True)
class ChunkOptions:
    """How chunks are drawn and chosen.

    Attributes:
        max_new_tokens: Longest response T, EOS included.
        eos_ids: Tokens that end a response.
        beams: Prefixes kept after each chunk, and responses returned.
        samples: Continuations drawn per prefix.
        chunk_length: Most tokens per chunk.
        delimiter_ids: Tokens that end a chunk early: ends of lines make chunks steps of reasoning.
        temperature: See `SampleOptions`.
        top_k: See `restrict`.
        top_p: See `restrict`.
        min_p: See `restrict`.
        constraints: Rules on repetition and minimum length.
    """

    max_new_tokens: int
    eos_ids: tuple[int, ...]
    beams: int
    samples: int
    chunk_length: int
    delimiter_ids: tuple[int, ...] = ()
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    constraints: Constraints = Constraints()

    def __post_init__(self):
        """Refuses values that have no meaning or no effect."""
        for name in ("eos_ids", "delimiter_ids"):
            object.__setattr__(self, name, token_id_tuple(name, getattr(self, name)))
        if self.beams < 1 or self.samples < 1 or self.chunk_length < 1:
            raise ValueError(
                f"beams {self.beams}, samples {self.samples} and chunk_length {self.chunk_length} must be at least 1"
            )
        if set(self.delimiter_ids) & set(self.eos_ids):
            raise ValueError(f"delimiter_ids {self.delimiter_ids}: expected none of them among eos_ids {self.eos_ids}")
        self.sampling  # noqa: B018 (checks the rest)

    @property
    def sampling(self) -> SampleOptions:
        """How the tokens of all samples are drawn."""
        return SampleOptions(
            self.max_new_tokens,
            self.eos_ids,
            self.beams * self.samples,
            self.temperature,
            self.top_k,
            self.top_p,
            self.min_p,
            self.constraints,
        )


@checks_arguments
@partial(jax.jit, static_argnames=("model", "options", "objective"))
def chunk_beam_search(
    model: Policy,
    params: Any,
    prompts: Int[Array, "B P"],
    prompt_lengths: Int[Array, " B"],
    keys: Key[Array, " B"],
    options: ChunkOptions,
    *,
    objective: Objective,
    stop_strings: StopStrings | None = None,
) -> Responses:
    """Searches by chunks, with `beams * samples` samples per prompt.

    After each chunk, responses that have finished compete for `beams` places. Of the others, the best distinct prefixes
    continue, and share all samples; so no sample repeats a finished response, and the search cannot fill up with copies
    of one. A prompt is done when nothing can grow any more or, where no token can raise the score, when all that grows
    is worse than every one of `beams` finished responses. Responses that reach `max_new_tokens` count as finished.

    Draw s of chunk c has, in sample j, the key `fold_in(fold_in(keys[b], j), c * chunk_length + s)`, so a search of one
    beam with one chunk is `best_of_n` with these keys.

    Args:
        model: A policy; an `Ensemble` where the objective reads several.
        params: Its parameters; for speed, those that `model.unstack` returns.
        prompts: Right-padded token ids. Shape [B, P].
        prompt_lengths: Tokens of each prompt, at least 1. Shape [B].
        keys: A `jax.random.key` for each prompt. Shape [B].
        options: Width, chunks, and how tokens are drawn.
        objective: What prefixes and responses are compared by.
        stop_strings: Strings that end a response.

    Returns:
        The best `beams` distinct responses, best first; INVALID where there are fewer.

    Raises:
        InputError: See `sample`.
        ValueError: If there are no keys to draw with.

    References:
        arXiv 2405.19262, without the copies of finished responses that its program makes.
    """
    sampler = Sampler(
        model, params, prompts, prompt_lengths, options.sampling, objective, stop_strings, options.delimiter_ids
    )
    beams, samples, chunk_length = options.beams, options.beams * options.samples, options.chunk_length
    # The pool: the tokens of the beams, position by position, then those of the present chunk.
    history = (options.max_new_tokens - 1) * beams
    state = sampler.start(keys, samples, history + min(chunk_length, options.max_new_tokens) * samples)
    finished = state.partial.without(state.partial.exists).best(beams)

    def search_chunk(carry):
        state, finished, chunk = carry
        # Draw a chunk for every sample; the prompt has given the first token of the first chunk.
        drawn = jnp.where(chunk == 0, 1, 0)
        state = sampler.run(state, chunk_length - drawn, chunk * chunk_length + drawn, history)
        partial = state.partial
        # Responses that have finished compete with those that finished earlier.
        finished = _distinct(finished.joined(partial.without(partial.growing))).best(beams)
        # The best distinct prefixes continue, unless nothing that can become of them is good enough.
        growing = _distinct(partial.without(~partial.growing))
        scores, best = jax.lax.top_k(growing.score, beams)
        count = (scores > -jnp.inf).sum(-1)
        done = count == 0
        if objective.monotone:
            done |= scores[:, 0] <= finished.score[:, -1]
        return _continue(state, best, count, done), finished, chunk + 1

    def unfinished(carry):
        state, _, chunk = carry
        return (chunk == 0) | state.partial.growing.any()

    state, finished, _ = jax.lax.while_loop(unfinished, search_chunk, (state, finished, jnp.int32(0)))
    return finished.responses(drawn=state.drawn)


def _distinct(partial: Partial) -> Partial:
    """The responses without repetitions of earlier ones."""
    same = (partial.tokens[:, :, None] == partial.tokens[:, None]).all(-1)
    same &= (partial.lengths[:, :, None] == partial.lengths[:, None]) & partial.exists[:, None]
    earlier = jnp.tril(jnp.ones(same.shape[1:], bool), -1)
    return partial.without((same & earlier).any(-1))


def _continue(
    state: SamplingState, best: Int[Array, "B W"], count: Int[Array, " B"], done: Bool[Array, " B"]
) -> SamplingState:
    """Shares all samples among the first `count` of the best prefixes, whose tokens move to the pool's front."""
    beams, (_, samples, size) = best.shape[1], state.path.shape
    rank = jnp.arange(samples) % jnp.maximum(count, 1)[:, None]
    parents = jnp.take_along_axis(best, rank, axis=1)
    # A path's slots are in the order of its tokens: find the slots of each beam, position by position.
    positions = state.partial.tokens.shape[-1] - 1
    order = jnp.argsort(~take_rows(state.path, best), axis=-1, stable=True)[..., :positions]
    slots = jnp.pad(order.swapaxes(1, 2).reshape(len(best), -1), ((0, 0), (0, size - positions * beams)))
    # Slot s of the new pool belongs to beam s % W.
    slot = jnp.arange(size)
    filled = (slot % beams == rank[..., None]) & (slot < positions * beams)
    picked = state.pick(parents, slots, filled)
    # Samples keep their keys, or siblings would draw the same tokens.
    partial = picked.partial.without(done[:, None])
    return replace(picked, partial=partial, paused=jnp.zeros_like(picked.paused), keys=state.keys)
