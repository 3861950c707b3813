"""Best of N: draws responses and ranks them by the objective's score, which is known as soon as they are drawn."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from qstar_jax.decoding.arguments import checks_arguments
from qstar_jax.decoding.objectives import Objective
from qstar_jax.decoding.policies import Policy
from qstar_jax.decoding.responses import Responses
from qstar_jax.decoding.sampler import Sampler, SamplingState
from qstar_jax.decoding.sampling import SampleOptions
from qstar_jax.decoding.stop_strings import StopStrings


@dataclass(frozen=True)
class Rejection:
    """When samples are pruned before they have finished (speculative rejection).

    Attributes:
        interval: Tokens between two times that samples are pruned.
        keep: Fraction of the samples that stays each time; their number is rounded up.

    References:
        arXiv 2410.20290.
    """

    interval: int
    keep: float

    def __post_init__(self):
        """Checks the numbers."""
        if self.interval < 1 or not 0 < self.keep <= 1:
            raise ValueError(f"interval {self.interval} must be at least 1, keep {self.keep} above 0 and at most 1")

    def stages(self, samples: int, max_new_tokens: int) -> list[tuple[int, int]]:
        """(samples, tokens that they have at its end) of each stage; nothing is pruned after the last."""
        stages, length = [], 0
        while True:
            length += self.interval
            fewer = max(1, math.ceil(round(samples * self.keep, 6)))  # 0.07 * 100 is a little more than 7
            if length >= max_new_tokens or fewer == samples:
                return [*stages, (samples, max_new_tokens)]
            stages.append((samples, length))
            samples = fewer


@checks_arguments
@partial(jax.jit, static_argnames=("model", "options", "objective", "rejection"))
def best_of_n(
    model: Policy,
    params: Any,
    prompts: Int[Array, "B P"],
    prompt_lengths: Int[Array, " B"],
    keys: Key[Array, " B"],
    options: SampleOptions,
    *,
    objective: Objective,
    rejection: Rejection | None = None,
    stop_strings: StopStrings | None = None,
) -> Responses:
    """Draws N responses to each prompt as `sample` does, with the same keys, and returns them best first.

    With `ImplicitReward` of (policy, reference) nothing has to be scored afterwards: both models read every token as it
    is drawn. Responses that reached the limit compete with the others.

    Rejection prunes the worst samples early, by their score so far. For the optimal policy this looks ahead: a prefix's
    implicit reward is the reward so far plus V*(s_k) - V*(s_0), and V*(s_0) is the same for all. The samples that stay
    are the same as without rejection. Pruned samples leave the pool, so later steps compute fewer samples.

    Args:
        model: A policy; an `Ensemble` where the objective reads several.
        params: Its parameters; for speed, those that `model.unstack` returns.
        prompts: Right-padded token ids. Shape [B, P].
        prompt_lengths: Tokens of each prompt, at least 1. Shape [B].
        keys: A `jax.random.key` for each prompt. Shape [B].
        options: How tokens are drawn, and the number of samples.
        objective: What responses are ranked by.
        rejection: When samples are pruned; never by default.
        stop_strings: Strings that end a response.

    Returns:
        The samples that were not pruned, best first.

    Raises:
        InputError: See `sample`.
        ValueError: If there are no keys to draw with.

    References:
        arXiv 2404.12358, Eq. 10 summed along a prefix; arXiv 2410.20290.
    """
    sampler = Sampler(model, params, prompts, prompt_lengths, options, objective, stop_strings)
    samples, max_new_tokens = options.num_samples, options.max_new_tokens
    stages = rejection.stages(samples, max_new_tokens) if rejection else [(samples, max_new_tokens)]
    state = sampler.start(keys, samples, (stages[0][1] - 1) * samples)
    length = 1  # tokens drawn; all but the last are in the pool
    for count, end in stages:
        # Prune the worst samples, and make a pool for those that stay.
        if count < samples:
            state = _prune(state, count, length - 1, end - 1)
        # Draw up to the end of the stage.
        state = sampler.run(state, end - length, draw=length, slot=(length - 1) * count)
        samples, length = count, end
    return state.partial.best(samples).responses(drawn=state.drawn)


def _prune(state: SamplingState, count: int, written: int, needed: int) -> SamplingState:
    """Keeps the best samples in their old order, with a pool of `needed` tokens each, of which some are written."""
    samples = state.path.shape[1]
    chosen = jnp.sort(jax.lax.top_k(state.partial.score, count)[1], axis=1)
    step = jnp.arange(needed)
    slots = jnp.minimum(step, max(written - 1, 0))[:, None] * samples + chosen[:, None]
    return state.pick(chosen, slots.reshape(len(chosen), -1), jnp.repeat(step < written, count))
