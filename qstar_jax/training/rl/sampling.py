"""Responses of the policy that is being trained, drawn by the sampler that `qstar generate` uses."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Key

from qstar_jax.data.tokenization import Example, Response
from qstar_jax.decoding import SampleOptions, sample
from qstar_jax.decoding.decoder import WIDTH
from qstar_jax.models import CausalLM
from qstar_jax.models.causal_lm import Params
from qstar_jax.models.lora import merge_adapter
from qstar_jax.sharding import BATCH


@dataclass(frozen=True)
class Samples:
    """Responses to some prompts.

    Attributes:
        responses: N responses to each prompt.
        logp: log pi of each token in nats as the sampler computed it, at temperature 1; 0 after a response's end. It
            stays on the devices. Shape [B, N, T].
    """

    responses: list[tuple[Response, ...]]
    logp: Float[Array, "B N T"]


@dataclass(frozen=True)
class PolicySampler:
    """Samples responses to batches of one size, so that one program is compiled.

    Attributes:
        model: The policy, with its adapter if it has one.
        options: How tokens are drawn, and how many responses per prompt.
        mesh: Devices. Each draws for its own prompts if (data * fsdp) divides them.
        width: Tokens to which prompts are padded.
    """

    model: CausalLM
    options: SampleOptions
    mesh: Mesh
    width: int

    @classmethod
    def of(cls, model: CausalLM, options: SampleOptions, mesh: Mesh, prompts: Sequence[int]) -> "PolicySampler":
        """Makes a sampler for prompts of these lengths."""
        return cls(model, options, mesh, -(-max(prompts) // WIDTH) * WIDTH)

    @property
    def is_exact(self) -> bool:
        """Whether the sampler's log pi is that of the training pass but for the rounding of float32."""
        compute = self.model.compute
        return self.options.temperature == 1 and compute.dtype == compute.param_dtype == "float32"

    def __call__(self, params: Params, examples: Sequence[Example], keys: Key[Array, " B"]) -> Samples:
        """Draws responses; all processes of a job call this together.

        Args:
            params: All parameters of the policy, in the layout of training.
            examples: The prompts.
            keys: A key for each.
        """
        padded, lengths = np.zeros((len(examples), self.width), np.int32), np.ones(len(examples), np.int32)
        for row, example in enumerate(examples):
            padded[row, : len(example.prompt)], lengths[row] = example.prompt, len(example.prompt)
        sharding = NamedSharding(self.mesh, BATCH)
        padded, lengths = (
            jax.make_array_from_callback(x.shape, sharding, lambda index, x=x: x[index]) for x in (padded, lengths)
        )
        unstacked = self.mesh.devices.flat[0].platform != "tpu"  # see `decoding.generate.params_for`
        params = _for_decoding(self.model, unstacked, params)
        drawn = sample(
            self.model.base,
            params,
            padded,
            lengths,
            jax.device_put(keys, sharding),
            self.options,
            keep_token_logps=True,
        )
        tokens, ends, finished = multihost_utils.process_allgather(
            (drawn.tokens, drawn.lengths, drawn.finished), tiled=True
        )
        responses = [
            tuple(Response(tokens[b, n, : ends[b, n]], not finished[b, n]) for n in range(tokens.shape[1]))
            for b in range(len(examples))
        ]
        return Samples(responses, drawn.token_logp)


@partial(jax.jit, static_argnums=(0, 1))
def _for_decoding(model: CausalLM, unstacked: bool, params: Params) -> Params:
    """Parameters as decoding reads them: without an adapter beside them, and layer by layer where that is faster."""
    if model.lora is not None:
        params = merge_adapter(params, model.lora)
    return model.base.unstack(params) if unstacked else params


def sample_keys(seed: int, step: int, count: int) -> Key[Array, " B"]:
    """Keys of the prompts of a step: a function of (seed, step) and the place in the batch, on any mesh."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(lambda place: jax.random.fold_in(key, place))(jnp.arange(count))
