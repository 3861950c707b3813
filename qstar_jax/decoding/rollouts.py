"""Answers that grow token by token: the one loop under sampling, best-of-N and chunk search.

Prompts are computed once. Tokens of all samples of a prompt lie in one pool of slots (see `policies`), and a mask for
each sample says which of them are its own. So samples can be dropped, and others continued several times, by moving
masks; and samples of one prompt need not have equally many tokens.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from qstar_jax.decoding.drawing import SampleOptions
from qstar_jax.decoding.objectives import Objective, StepScores
from qstar_jax.decoding.policies import Memory, Policy
from qstar_jax.decoding.responses import Finish
from qstar_jax.decoding.samples import Samples, take_rows
from qstar_jax.decoding.stop_strings import StopStrings


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rollout:
    """Samples in the middle of decoding. The last token of each is not in the pool yet.

    Attributes:
        samples: The samples.
        keys: The key of each; None where nothing is drawn. Shape [B, N].
        path: Which slots of the pool hold a sample's tokens. Shape [B, N, M].
        memory: What the policy keeps of prompts and pool.
    """

    samples: Samples
    keys: Key[Array, "B N"] | None
    path: Bool[Array, "B N M"]
    memory: Memory

    def pick(
        self, chosen: Int[Array, "B K"], slots: Int[Array, "B P"], filled: Bool[Array, "B K P"] | Bool[Array, " P"]
    ) -> "Rollout":
        """Goes on with some of the samples over another pool.

        Args:
            chosen: The samples. Shape [B, K].
            slots: Where the new pool's slots lie in this one. Shape [B, P].
            filled: Which of the new slots a sample may own. Shape [P] or [B, K, P].
        """
        path = jnp.take_along_axis(take_rows(self.path, chosen), slots[:, None], axis=-1) & filled
        keys = None if self.keys is None else take_rows(self.keys, chosen)
        return Rollout(self.samples.take(chosen), keys, path, self.memory.reorder(slots))


@dataclass(frozen=True)
class Roller:
    """What stays the same while answers grow; for use inside of a compiled function.

    Attributes:
        model: A policy.
        params: Its parameters.
        prompts: Right-padded token ids. Shape [B, P].
        prompt_lengths: Tokens of each prompt. Shape [B].
        options: How tokens are drawn; its `num_samples` is not read.
        objective: What is added up; its `logp` is the distribution that tokens are drawn from.
        stop_strings: Strings that end an answer.
        delimiter_ids: Tokens behind which a sample pauses.
    """

    model: Policy
    params: Any
    prompts: Int[Array, "B P"]
    prompt_lengths: Int[Array, " B"]
    options: SampleOptions
    objective: Objective
    stop_strings: StopStrings | None = None
    delimiter_ids: tuple[int, ...] = ()

    def start(self, keys: Key[Array, " B"] | None, count: int, slots: int) -> Rollout:
        """Reads the prompts and draws the first token of each sample.

        Args:
            keys: A key a prompt; sample n has the key `fold_in(keys[b], n)`. Shape [B].
            count: Samples a prompt, N.
            slots: Size of the pool, M; N at least.
        """
        if keys is None and self.options.temperature > 0:
            raise ValueError(f"temperature {self.options.temperature} draws tokens: pass keys, one for each prompt")
        rows, slots = self.prompts.shape[0], max(slots, count)
        logits, memory = self.model.prefill(self.params, self.prompts, self.prompt_lengths, slots)
        step = self.objective(jax.tree.map(lambda x: jnp.repeat(x[:, None], count, axis=1), logits))
        samples = Samples.empty(
            rows,
            count,
            self.options.max_new_tokens,
            self.stop_strings.count if self.stop_strings else 0,
            step.score.dtype,
            step.ref_logp is not None,
        )
        if keys is not None:
            keys = jax.vmap(lambda key: jax.vmap(lambda n: jax.random.fold_in(key, n))(jnp.arange(count)))(keys)
        path = jnp.zeros((rows, count, slots), bool)
        return Rollout(self._grown(samples, step, keys, 0), keys, path, memory)

    def run(
        self, state: Rollout, steps: int | Int[Array, ""], draw: int | Int[Array, ""], slot: int | Int[Array, ""]
    ) -> Rollout:
        """Draws tokens until every sample has ended or paused, or there were enough.

        Args:
            state: Where to go on.
            steps: Most tokens that a sample may get.
            draw: Number of the first draw; it is folded into each sample's key, so no number may come twice.
            slot: The first free slot of the pool; each step takes N.
        """
        count, size = state.path.shape[1:]

        def active(samples: Samples) -> Array:
            return samples.growing & ~samples.paused

        def going(carry):
            i, state = carry
            return (i < steps) & active(state.samples).any()

        def one(carry):
            i, state = carry
            samples, first = state.samples, slot + i * count
            last = jnp.take_along_axis(samples.tokens, jnp.maximum(samples.length - 1, 0)[..., None], axis=-1)[..., 0]
            path = state.path | (jnp.arange(size) == (first + jnp.arange(count))[:, None])
            logits, memory = self.model.extend(self.params, state.memory, last, path, first)
            # Those that have ended or paused were fed for company; what they left in the pool belongs to nobody.
            path = jnp.where(active(samples)[..., None], path, state.path)
            samples = self._grown(samples, self.objective(logits), state.keys, draw + i)
            return i + 1, Rollout(samples, state.keys, path, memory)

        return jax.lax.while_loop(going, one, (jnp.int32(0), state))[1]

    def _grown(self, samples: Samples, step: StepScores, keys: Array | None, draw: int | Array) -> Samples:
        """The samples with one more token each, where they are growing and not paused."""
        active, eos_ids = samples.growing & ~samples.paused, self.options.eos_ids
        logp = self.options.constraints.apply(
            step.logp, samples.tokens, samples.length, self.prompts, self.prompt_lengths, eos_ids
        )
        if keys is not None:
            keys = jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, draw)))(keys)
        token = self.options.draw(logp, keys)

        def of(x: Array) -> Array:
            return jnp.take_along_axis(x, token[..., None], axis=-1)[..., 0]

        def added(total: Array, x: Array) -> Array:
            return jnp.where(moved, total + of(x), total)

        moved = active & (of(logp) > -jnp.inf)
        stop, stopped = samples.stop, jnp.zeros_like(moved)
        if self.stop_strings is not None:
            stop = self.stop_strings.advance(stop, token)
            stopped = (stop == self.stop_strings.lengths).any(-1)
        finish = jnp.where(stopped, Finish.STOP, Finish.LENGTH)
        finish = jnp.where(_is_one_of(token, eos_ids), Finish.EOS, finish)
        finish = jnp.where(moved, finish, Finish.INVALID)  # nothing may be said: not an answer
        here = moved[..., None] & (jnp.arange(samples.tokens.shape[-1]) == samples.length[..., None])
        return Samples(
            tokens=jnp.where(here, token[..., None], samples.tokens),
            length=samples.length + moved,
            score=added(samples.score, step.score),
            value=samples.value if step.value is None else jnp.where(moved, of(step.value), samples.value),
            logp=added(samples.logp, step.logp),
            ref_logp=None if samples.ref_logp is None else added(samples.ref_logp, step.ref_logp),
            finish=jnp.where(active, finish, samples.finish).astype(jnp.int32),
            paused=samples.paused | (moved & _is_one_of(token, self.delimiter_ids)),
            stop=jnp.where(active[..., None], stop, samples.stop),
        )


def _is_one_of(token: Array, ids: tuple[int, ...]) -> Array:
    return (token[..., None] == jnp.array(ids, token.dtype)).any(-1)
