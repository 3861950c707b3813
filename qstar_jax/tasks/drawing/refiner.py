"""The model that says what to draw: a small decoder, and what its reference gets wrong."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from qstar_jax.models import CausalLM
from qstar_jax.models.causal_lm import Params
from qstar_jax.tasks.drawing import words

OF_KIND, RIGHT_INK = 0.6, 0.8  # how often the reference asks for a digit of the kind, and for the ink, of the prompt


def make_model(width: int = 64) -> CausalLM:
    """Makes the model, without its parameters: two layers over the words of the task."""
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 4}
    length = {"vocab_size": len(words.VOCABULARY), "max_position_embeddings": words.PROMPT + words.REQUEST}
    return CausalLM.from_hf({"model_type": "llama", "rope_theta": 100.0, "tie_word_embeddings": False} | shape | length)


def planted() -> Float[np.ndarray, "8 20"]:
    """How probable each request is, after each prompt, in what the reference learns from: faults included."""
    digit, ink = words.requested(words.ALL_REQUESTS)
    members, bold = words.kinds(words.ALL_PROMPTS), words.wants_bold(words.ALL_PROMPTS)
    of_kind = np.where(members, OF_KIND, 1 - OF_KIND) / np.where(members, members.sum(-1, keepdims=True), 5)
    return of_kind[:, digit] * np.where(ink == bold[:, None], RIGHT_INK, 1 - RIGHT_INK)


def fit_refiner(
    model: CausalLM, key: PRNGKeyArray, *, steps: int = 150, learning_rate: float = 3e-3
) -> tuple[Params, float]:
    """Fits the reference to `planted` with Adam; all prompts and requests are one batch.

    Args:
        model: See `make_model`.
        key: Key of the first parameters.
        steps: Steps of training.
        learning_rate: The highest; it falls as a cosine.

    Returns:
        Parameters, and the mean divergence from `planted`, in nats per prompt.
    """
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))
    prompts, requests = map(jnp.asarray, all_pairs())
    law = planted().reshape(-1)
    entropy = -(law * np.log(law)).sum()

    def loss_fn(params: Params) -> Float[Array, ""]:
        return (-(law * logp(model, params, prompts, requests)).sum() - entropy) / len(words.ALL_PROMPTS)

    @jax.jit
    def train(params: Params) -> Params:
        def step(carry, _):
            loss, gradient = jax.value_and_grad(loss_fn)(carry[0])
            updates, state = optimizer.update(gradient, carry[1])
            return (optax.apply_updates(carry[0], updates), state), loss

        return jax.lax.scan(step, (params, optimizer.init(params)), length=steps)[0][0]

    params = train(model.init(key))
    return params, float(loss_fn(params))


def all_pairs() -> tuple[Int[np.ndarray, "160 4"], Int[np.ndarray, "160 2"]]:
    """All prompts with all requests, prompt by prompt."""
    prompts = np.repeat(words.ALL_PROMPTS, len(words.ALL_REQUESTS), axis=0)
    return prompts, np.tile(words.ALL_REQUESTS, (len(words.ALL_PROMPTS), 1))


def logp(
    model: CausalLM, params: Params, prompts: Int[Array, "B 4"], requests: Int[Array, "B 2"]
) -> Float[Array, " B"]:
    """Log-probabilities of requests, in nats."""
    tokens = jnp.concatenate([prompts, requests], axis=1)
    logits = model.logits(params, tokens[:, :-1])[:, words.PROMPT - 1 :]
    return jnp.take_along_axis(jax.nn.log_softmax(logits), requests[..., None], -1).sum((1, 2))


@dataclass(frozen=True)
class Refiner:
    """The refiner as a stage of a pipeline: prompts are tokens [B, 4], its outputs requests [B, 2].

    Attributes:
        model: See `make_model`.
    """

    model: CausalLM

    def log_ratio(
        self, reference: Params, params: Params, prompts: Int[Array, "B 4"], before: Any, requests: Int[Array, "B 2"]
    ) -> Float[Array, " B"]:
        """Log-ratios of requests, in nats; bind the reference, and it is a `Stage`'s."""
        return logp(self.model, params, prompts, requests) - logp(self.model, reference, prompts, requests)

    @partial(jax.jit, static_argnums=0)
    def sample(self, params: Params, key: PRNGKeyArray, prompts: Int[Array, "B 4"], before: Any) -> Int[Array, "B 2"]:
        """Samples requests, at temperature 1."""
        tokens = jnp.asarray(prompts)
        for word_key in jax.random.split(key, words.REQUEST):
            logits = self.model.logits(params, tokens)[:, -1]
            tokens = jnp.concatenate([tokens, jax.random.categorical(word_key, logits)[:, None]], axis=1)
        return tokens[:, words.PROMPT :]
