"""Sampling, and greedy decoding as its limit."""

from functools import partial
from typing import Any

import jax
from jaxtyping import Array, Int, Key

from qstar_jax.decoding.drawing import SampleOptions as SampleOptions
from qstar_jax.decoding.drawing import restrict as restrict
from qstar_jax.decoding.objectives import Likelihood, Objective
from qstar_jax.decoding.policies import Policy
from qstar_jax.decoding.responses import Responses
from qstar_jax.decoding.rollouts import Roller
from qstar_jax.decoding.stop_strings import StopStrings


@partial(jax.jit, static_argnames=("model", "options", "objective"))
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
) -> Responses:
    """Draws answers token by token; the prompt is computed once for all samples of it.

    Token t of sample n of prompt b is drawn with the key `fold_in(fold_in(keys[b], n), t)`. So a prompt's samples
    depend neither on the batch that it is in, nor on padding, nor on how many samples are asked for.

    Args:
        model: A policy; an `Ensemble` where the objective reads several.
        params: Its parameters; for speed, those that `model.unstack` returns.
        prompts: Right-padded token ids. Shape [B, P].
        prompt_lengths: Tokens of each prompt, at least 1. Shape [B].
        keys: A `jax.random.key` for each prompt; may be None at temperature 0. Shape [B].
        options: How tokens are drawn.
        objective: Its `logp` is the policy that tokens are drawn from, `LogitArithmetic`'s is the combined one; its
            sum is reported as the score. All that is reported is of the policy at temperature 1 and unrestricted.
        stop_strings: Strings that end an answer.

    Returns:
        N answers of each prompt in the order in which they were drawn; INVALID where constraints left no token.

    Raises:
        ValueError: If there are no keys to draw with.
    """
    roller = Roller(model, params, prompts, prompt_lengths, options, objective, stop_strings)
    steps, count = options.max_new_tokens - 1, options.num_samples
    state = roller.start(keys, count, steps * count)
    return roller.run(state, steps, draw=1, slot=0).samples.responses()
