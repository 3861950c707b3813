"""A model run token by token: one pass over right-padded prompts, then one token of each row at a time.

The cache has P slots for the prompt and T for new tokens. Prompts of different length end at different slots, but every
row writes its t-th new token into slot P + t, so a step is one slice update; rotary positions are `length + t`.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qstar_jax.models import CausalLM, KVCache
from qstar_jax.models.causal_lm import Params, right_padded


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """Rows in the middle of decoding.

    Attributes:
        cache: Keys and values; P + T slots.
        prompt_lengths: Tokens of each row's prompt. Shape [B].
        logits: Float32 logits of each row's next token. Shape [B, V].
    """

    cache: KVCache
    prompt_lengths: Int[Array, " B"]
    logits: Float[Array, "B V"]

    def take(self, rows: Int[Array, " M"]) -> "DecodeState":
        """Returns the state of the given rows, in their order; a row may be taken many times."""
        cache = jax.tree.map(lambda x: x[:, rows], self.cache)
        return DecodeState(cache, self.prompt_lengths[rows], self.logits[rows])


def prefill(
    model: CausalLM, params: Params, prompts: Int[Array, "B P"], prompt_lengths: Int[Array, " B"], max_new_tokens: int
) -> DecodeState:
    """Runs the prompts.

    Args:
        model: The model.
        params: Its parameters.
        prompts: Right-padded token ids. Shape [B, P].
        prompt_lengths: Tokens of each prompt, at least 1. Shape [B].
        max_new_tokens: Slots for new tokens, T.

    Returns:
        The state before the first new token.
    """
    rows, width = prompts.shape
    positions, mask = right_padded(prompt_lengths, width)
    mask = jnp.pad(mask, ((0, 0), (0, 0), (0, max_new_tokens)))
    cache = model.init_cache(rows, width + max_new_tokens)
    hidden, cache = model.hidden_states(params, prompts, positions, mask, cache, 0)
    last = jnp.take_along_axis(hidden, (prompt_lengths - 1)[:, None, None], axis=1)
    return DecodeState(cache, prompt_lengths, _logits(model, params, last))


def feed(
    model: CausalLM,
    params: Params,
    state: DecodeState,
    tokens: Int[Array, " B"],
    t: Int[Array, ""],
    max_new_tokens: int,
) -> DecodeState:
    """Appends each row's t-th new token.

    Args:
        model: The model.
        params: Its parameters.
        state: State before the token.
        tokens: The token of each row. Shape [B].
        t: How many new tokens came before it.
        max_new_tokens: As for `prefill`.

    Returns:
        The state after it.
    """
    width = state.cache.keys.shape[2] - max_new_tokens
    slots = jnp.arange(width + max_new_tokens)
    seen = (slots < state.prompt_lengths[:, None]) | ((slots >= width) & (slots <= width + t))
    positions = (state.prompt_lengths + t)[:, None]
    hidden, cache = model.hidden_states(params, tokens[:, None], positions, seen[:, None], state.cache, width + t)
    return DecodeState(cache, state.prompt_lengths, _logits(model, params, hidden))


def _logits(model: CausalLM, params: Params, hidden: Float[Array, "B 1 D"]) -> Float[Array, "B V"]:
    table = model.unembedding(params)
    return jnp.einsum("bd,vd->bv", hidden[:, 0], table, preferred_element_type=jnp.float32)
