"""The loop that draws responses token by token: under sampling, best-of-N, chunk search, and at the end of tree search.

Prompts are computed once. Tokens of all samples of a prompt lie in one pool of slots (see `policies`), and a mask for
each sample says which slots hold its tokens. So samples can be dropped, and others continued several times, by moving
masks; and samples of one prompt need not have equally many tokens.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from qstar_jax.decoding.arguments import check_eos_ids, checks_arguments
from qstar_jax.decoding.objectives import Likelihood, Objective, StepScores
from qstar_jax.decoding.partial import Partial, is_one_of, take_rows
from qstar_jax.decoding.policies import Memory, Policy
from qstar_jax.decoding.responses import Responses
from qstar_jax.decoding.sampling import SampleOptions
from qstar_jax.decoding.stop_strings import StopStrings


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingState:
    """Samples while they grow. The last token of each is not in the pool yet.

    Attributes:
        partial: The samples.
        paused: Samples that wait after a delimiter. Shape [B, N].
        keys: A key for each sample; None where nothing is drawn. Shape [B, N].
        path: The pool's slots that hold a sample's tokens. Shape [B, N, M].
        memory: What the policy keeps of prompts and pool.
        drawn: Tokens drawn for each prompt so far, those of samples that were pruned included. Shape [B].
    """

    partial: Partial
    paused: Bool[Array, "B N"]
    keys: Key[Array, "B N"] | None
    path: Bool[Array, "B N M"]
    memory: Memory
    drawn: Int[Array, " B"]

    @property
    def active(self) -> Bool[Array, "B N"]:
        """Samples that get a token at the next step."""
        return self.partial.growing & ~self.paused

    def pick(
        self, chosen: Int[Array, "B K"], slots: Int[Array, "B P"], filled: Bool[Array, "B K P"] | Bool[Array, " P"]
    ) -> "SamplingState":
        """Continues some of the samples over another pool.

        Args:
            chosen: The samples. Shape [B, K].
            slots: Where the contents of the new pool's slots lie in this pool. Shape [B, P].
            filled: New slots that may hold a sample's tokens. Shape [P] or [B, K, P].
        """
        path = jnp.take_along_axis(take_rows(self.path, chosen), slots[:, None], axis=-1) & filled
        keys = None if self.keys is None else take_rows(self.keys, chosen)
        paused = take_rows(self.paused, chosen)
        return SamplingState(self.partial.take(chosen), paused, keys, path, self.memory.reorder(slots), self.drawn)


@dataclass(frozen=True)
class Sampler:
    """Draws tokens; for use inside a compiled function.

    Attributes:
        model: A policy.
        params: Its parameters.
        prompts: Right-padded token ids. Shape [B, P].
        prompt_lengths: Tokens of each prompt. Shape [B].
        options: How tokens are drawn; `num_samples` is not read.
        objective: What is added up; its `logp` is the distribution that tokens are drawn from.
        stop_strings: Strings that end a response.
        delimiter_ids: Tokens after which a sample pauses.
        keep_token_logps: Whether log pi of each token is kept beside the sum.
    """

    model: Policy
    params: Any
    prompts: Int[Array, "B P"]
    prompt_lengths: Int[Array, " B"]
    options: SampleOptions
    objective: Objective
    stop_strings: StopStrings | None = None
    delimiter_ids: tuple[int, ...] = ()
    keep_token_logps: bool = False

    def start(self, keys: Key[Array, " B"] | None, count: int, slots: int) -> SamplingState:
        """Reads the prompts and draws the first token of each sample.

        Args:
            keys: A key per prompt; sample n has the key `fold_in(keys[b], n)`. Shape [B].
            count: Samples per prompt, N.
            slots: Size of the pool, M; at least N are made.
        """
        if keys is None and self.options.temperature > 0:
            raise ValueError(f"temperature {self.options.temperature} draws tokens: pass keys, one for each prompt")
        slots = max(slots, count)
        logits, memory = self.model.prefill(self.params, self.prompts, self.prompt_lengths, slots)
        step = self.objective(jax.tree.map(lambda x: jnp.repeat(x[:, None], count, axis=1), logits))
        check_eos_ids(self.options.eos_ids, step.score.shape[-1])
        if keys is not None:
            keys = jax.vmap(lambda key: jax.vmap(lambda n: jax.random.fold_in(key, n))(jnp.arange(count)))(keys)
        partial = Partial.start(
            step, self.options.max_new_tokens, self.stop_strings, keep_token_logps=self.keep_token_logps
        )
        path = jnp.zeros((*partial.lengths.shape, slots), bool)
        none_drawn = jnp.zeros(len(partial.lengths), jnp.int32)
        return self._append(SamplingState(partial, partial.lengths > 0, keys, path, memory, none_drawn), step, 0)

    def run(
        self,
        state: SamplingState,
        steps: int | Int[Array, ""],
        draw: int | Int[Array, ""],
        slot: int | Int[Array, ""],
    ) -> SamplingState:
        """Draws tokens until every sample has finished or paused, or there were enough.

        Args:
            state: Where to continue.
            steps: Most tokens that a sample gets.
            draw: Number of the first draw; it is folded into each sample's key, so no number may come twice.
            slot: The first free slot of the pool; each step takes N.
        """
        count, size = state.path.shape[1:]

        def unfinished(carry):
            i, state = carry
            return (i < steps) & state.active.any()

        def step(carry):
            i, state = carry
            tokens, first = state.partial.tokens, slot + i * count
            last = jnp.maximum(state.partial.lengths - 1, 0)[..., None]
            last = jnp.take_along_axis(tokens, last, axis=-1)[..., 0]
            path = state.path | (jnp.arange(size) == (first + jnp.arange(count))[:, None])
            logits, memory = self.model.extend(self.params, state.memory, last, path, first)
            # Finished and paused samples are run along with the others; the slots they filled belong to nobody.
            path = jnp.where(state.active[..., None], path, state.path)
            return i + 1, self._append(replace(state, path=path, memory=memory), self.objective(logits), draw + i)

        return jax.lax.while_loop(unfinished, step, (jnp.int32(0), state))[1]

    def _append(self, state: SamplingState, step: StepScores, draw: int | Array) -> SamplingState:
        """Draws a token for each active sample."""
        partial, active, eos_ids = state.partial, state.active, self.options.eos_ids
        logp = self.options.constraints.apply(
            step.logp, partial.tokens, partial.lengths, self.prompts, self.prompt_lengths, eos_ids
        )
        logp = jnp.where(step.score > -jnp.inf, logp, -jnp.inf)
        keys = state.keys
        if keys is not None:
            keys = jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, draw)))(keys)
        token = self.options.draw(logp, keys)
        possible = jnp.take_along_axis(logp, token[..., None], axis=-1)[..., 0] > -jnp.inf
        drawn = active & possible
        partial = partial.append(token, step.at(token), drawn, eos_ids=eos_ids, stop_strings=self.stop_strings)
        # Where no token is possible, there is no response.
        partial = partial.without(active & ~possible)
        paused = state.paused | (drawn & is_one_of(token, self.delimiter_ids))
        return replace(state, partial=partial, paused=paused, drawn=state.drawn + drawn.sum(-1, dtype=jnp.int32))


@checks_arguments
@functools.partial(jax.jit, static_argnames=("model", "options", "objective", "keep_token_logps"))
def sample(
    model: Policy,
    params: Any,
    prompts: Int[Array, "B P"],
    prompt_lengths: Int[Array, " B"],
    keys: Key[Array, " B"] | None,
    options: SampleOptions,
    *,
    objective: Objective = Likelihood(),
    stop_strings: StopStrings | None = None,
    keep_token_logps: bool = False,
) -> Responses:
    """Draws responses token by token; each prompt is computed once for all its samples.

    Token t of sample n of prompt b is drawn with the key `fold_in(fold_in(keys[b], n), t)`. So a prompt's samples
    depend neither on its batch, nor on padding, nor on the number of samples.

    Args:
        model: A policy; an `Ensemble` where the objective reads several.
        params: Its parameters; for speed, those that `model.unstack` returns.
        prompts: Right-padded token ids. Shape [B, P].
        prompt_lengths: Tokens of each prompt, at least 1. Shape [B].
        keys: A `jax.random.key` for each prompt; may be None at temperature 0. Shape [B].
        options: How tokens are drawn.
        objective: Its `logp` is the policy that tokens are drawn from (for `LogitArithmetic` the combined one); its
            sum is reported as the score. Everything reported is at temperature 1 and over the whole vocabulary.
        stop_strings: Strings that end a response.
        keep_token_logps: Whether log pi of each token is returned beside the sum.

    Returns:
        N responses to each prompt in the order in which they were drawn; INVALID where constraints left no token.

    Raises:
        InputError: The model is none, prompts, lengths and keys do not go together, or `eos_ids` are not of its
            vocabulary.
        ValueError: If there are no keys to draw with.
    """
    sampler = Sampler(
        model, params, prompts, prompt_lengths, options, objective, stop_strings, keep_token_logps=keep_token_logps
    )
    steps, count = options.max_new_tokens - 1, options.num_samples
    state = sampler.start(keys, count, steps * count)
    state = sampler.run(state, steps, draw=1, slot=0)
    return state.partial.responses(drawn=state.drawn)
