"""Batches of samples: of one shape, whatever was sampled, so that no step compiles anything anew."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from qstar_jax.data.batches import Batch, make_batch
from qstar_jax.data.packing import Shapes
from qstar_jax.data.tokenization import Example, Response
from qstar_jax.sharding import BATCH

_MULTIPLE = 8  # lengths are multiples of it, in tokens


@dataclass(frozen=True)
class Batcher:
    """Puts prompts and their samples into batches.

    Attributes:
        shapes: The shape of every micro-batch.
        parts: Micro-batches per batch; several lie along a leading axis.
        mesh: Devices.
    """

    shapes: Shapes
    parts: int
    mesh: Mesh

    @classmethod
    def of(
        cls,
        prompts: Sequence[int],
        layout: Literal["shared", "plain"],
        mesh: Mesh,
        *,
        prompts_per_part: int,
        samples: int,
        max_new_tokens: int,
        parts: int = 1,
    ) -> "Batcher":
        """Makes shapes into which all samples of some prompts fit.

        Args:
            prompts: Tokens of each prompt.
            layout: Whether the samples of a prompt share it, or each repeats it.
            mesh: Devices; (data * fsdp) divides `prompts_per_part`.
            prompts_per_part: Prompts of a micro-batch.
            samples: Samples per prompt.
            max_new_tokens: Longest sample.
            parts: Micro-batches.
        """
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        sharing = samples if layout == "shared" else 1
        text = max(prompts) - 1 + max_new_tokens
        on_gpu = mesh.devices.flat[0].platform == "gpu"  # cuDNN's attention lists the texts
        shapes = Shapes(
            layout=layout,
            length=_round_up(text + (sharing - 1) * max_new_tokens),
            response_length=_round_up(max_new_tokens),
            sequences=1,
            scored=_round_up(prompts_per_part // shards * samples * max_new_tokens),
            shards=shards,
            text_length=_round_up(text) if on_gpu else 0,
        )
        return cls(shapes, parts, mesh)

    def __call__(
        self, examples: Sequence[Example], responses: Sequence[tuple[Response, ...]], *, fill_to: int = 0
    ) -> Batch:
        """Makes a batch on the devices; `fill_to` adds prompts without samples, of weight 0."""
        sampled = [replace(e, responses=rs, outcome={}) for e, rs in zip(examples, responses, strict=True)]
        size = max(len(sampled), fill_to) // self.parts
        batches = [
            make_batch(sampled[first : first + size], self.shapes, fill_to=size)
            for first in range(0, size * self.parts, size)
        ]
        if self.parts == 1:
            return self._place(batches[0])
        return self._place(jax.tree.map(lambda *x: np.stack(x), *batches))

    def _place(self, batch: Batch) -> Batch:
        sharding = self.sharding
        return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), batch)

    @property
    def sharding(self) -> NamedSharding:
        """How the arrays of a batch lie on the devices: by prompts."""
        return NamedSharding(self.mesh, BATCH if self.parts == 1 else PartitionSpec(None, *BATCH))


def padded_to(logp: Float[Array, "*B T"], length: int) -> Float[Array, "*B L"]:
    """Pads the last axis with zeros up to a length."""
    return jax.numpy.pad(logp, [(0, 0)] * (logp.ndim - 1) + [(0, length - logp.shape[-1])])


def _round_up(number: int) -> int:
    return -(-number // _MULTIPLE) * _MULTIPLE
