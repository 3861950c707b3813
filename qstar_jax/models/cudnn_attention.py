"""Flash attention by cuDNN, for NVIDIA GPUs, over packed sequences.

cuDNN knows causal masks and lengths, but neither blocks nor branches. So each text, a prompt with one of its responses,
is gathered into a row of its own: a prompt's keys and values are repeated for each of its responses, and its outputs
are read from the first of them. That is exact, and projections and MLPs still see the prompt once. (Attending to prompt
and response apart, and joining the two by their log-sum-exps, would need the gradient of the latter, which cuDNN's
backward pass ignores.)
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from qstar_jax.errors import InputError
from qstar_jax.models.masks import PackedMask, Window
from qstar_jax.sharding import BATCH, axes_size, batch_shards, free_axes, platform

_MIN_CAPABILITY = 8.0  # Ampere, the oldest architecture of cuDNN's flash attention
Implementation = Literal["cudnn", "xla"]


def cudnn_attention(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S G D"],
    v: Float[Array, "B S G D"],
    mask: PackedMask,
    *,
    positions: Int[Array, "B S"],
    window: Window = None,
    scale: float,
    softcap: float | None = None,
    windows: Sequence[int | None] = (),
    implementation: Implementation = "cudnn",
) -> Float[Array, "B S H D"]:
    """Attention whose scores never leave on-chip memory: memory grows with S, not its square.

    The backward pass gathers the texts and attends to them again: they take more memory than the sequences, but so only
    for one layer at a time. Under a mesh, each device computes its shard of the batch (axes data and fsdp) and of the
    heads (axis tensor).

    Args:
        q: Queries, bfloat16. Shape [B, S, H, D].
        k: Keys, in G groups of heads. Shape [B, S, G, D].
        v: Values. Shape [B, S, G, D].
        mask: Which queries may attend to which keys; either `padded` or with `texts`.
        positions: Positions of the tokens in their texts. Shape [B, S].
        window: A query at position p sees only keys at positions above p - window. If traced, one of `windows`.
        scale: Multiplies the scores.
        softcap: Must be None.
        windows: The values that a traced window may take; the window must be static for cuDNN.
        implementation: "xla" computes the same on any device, without its savings.

    Returns:
        Outputs; 0 at padding. Shape [B, S, H, D].

    Raises:
        InputError: If cuDNN cannot compute this; see `why_not`.
    """
    reason = why_not(
        q, k, v, mask, window=window, scale=scale, softcap=softcap, windows=windows, implementation=implementation
    )
    if reason:
        raise InputError(
            f"compute.attention cudnn: {reason}; set compute.attention to blockwise, or to auto, which selects cudnn "
            "where it is possible"
        )
    del positions  # the tokens of a text are next to each other once they are gathered
    traced = window if isinstance(window, jax.Array) else None

    @jax.checkpoint  # which would trace a static window, were it an argument
    def attend(q: Array, k: Array, v: Array, mask: PackedMask, traced: Array | None) -> Array:
        known = window if traced is None else traced
        return _attend(q, k, v, mask, known, scale=scale, windows=windows, implementation=implementation)

    batch_axes, head_axes = free_axes(*BATCH[0]), free_axes("tensor")
    if axes_size(batch_axes + head_axes) > 1:  # the texts of a shard lie within it, which XLA cannot know
        heads, axes = PartitionSpec(batch_axes, None, head_axes), {*batch_axes, *head_axes}
        specs = heads, heads, heads, PartitionSpec(batch_axes), PartitionSpec()
        attend = jax.shard_map(attend, in_specs=specs, out_specs=heads, axis_names=axes, check_vma=False)
    return attend(q, k, v, mask, traced)


def why_not(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S G D"],
    v: Float[Array, "B S G D"],
    mask: PackedMask,
    *,
    window: Window,
    scale: float,
    softcap: float | None,
    windows: Sequence[int | None],
    implementation: Implementation = "cudnn",
) -> str | None:
    """Says why `cudnn_attention` cannot compute this, or returns None if it can; arguments as there."""
    if implementation == "cudnn" and platform() != "gpu":
        return f"it needs an NVIDIA GPU, and JAX runs on {platform()}"
    if softcap is not None:
        return f"cuDNN cannot cap scores, and this model caps them at {softcap}"
    if isinstance(window, jax.Array) and not windows:
        return "the window is traced, and cuDNN needs to know it"
    if not mask.padded and mask.texts is None:
        return "the mask does not list the texts of its sequences"
    shards, tensor = axes_size(free_axes(*BATCH[0])), axes_size(free_axes("tensor"))
    if len(q) % shards:
        return f"a batch of {len(q)} sequences cannot be sharded over mesh.data * mesh.fsdp = {shards} devices"
    if mask.texts is not None and mask.texts.shards != batch_shards():
        return (
            f"the texts of the mask lie in {mask.texts.shards} shards, not in mesh.data * mesh.fsdp = {batch_shards()}"
        )
    if k.shape[2] % tensor:
        return f"{k.shape[2]} groups of heads cannot be sharded over mesh.tensor = {tensor} devices"
    if implementation == "cudnn":
        capability = _compute_capability()
        if capability is not None and capability < _MIN_CAPABILITY:
            return f"it needs compute capability {_MIN_CAPABILITY}, and this GPU has {capability}"
        try:  # JAX itself knows best which shapes and types its cuDNN takes
            jax.eval_shape(_kernel(jnp.zeros(len(q), jnp.int32), None, scale, implementation), q, k, v)
        except (NotImplementedError, ValueError, RuntimeError) as error:
            return str(error)
    return None


def _compute_capability() -> float | None:
    """Returns that of this machine's first device; None if it is no NVIDIA GPU: programs may be compiled for others."""
    capability = getattr(jax.local_devices()[0], "compute_capability", "")
    return float(capability) if capability.replace(".", "").isdecimal() else None


def _attend(
    q: Array,
    k: Array,
    v: Array,
    mask: PackedMask,
    window: Window,
    *,
    scale: float,
    windows: Sequence[int | None],
    implementation: Implementation,
) -> Array:
    """Attends within each text of one shard."""
    if mask.texts is None:
        in_text = mask.blocks >= 0
        out = _attend_rows(q, k, v, in_text.sum(-1), window, scale, windows, implementation)
        # What cuDNN leaves at padding must reach neither the keys of the next layer nor any gradient.
        return jnp.where(in_text[..., None, None], out, 0)
    slots, places = mask.texts.slots, mask.texts.places
    # A query of a prompt has the same output in all of its texts: only the first is read.
    first = places[..., :1]
    rows = _gather(q, slots, first), _gather(k, slots, places), _gather(v, slots, places)
    out = _attend_rows(*rows, (slots >= 0).sum(-1), window, scale, windows, implementation)
    return _first(out, slots, first)


def _attend_rows(
    q: Float[Array, "T L H D"],
    k: Float[Array, "T L G D"],
    v: Float[Array, "T L G D"],
    lengths: Int[Array, " T"],
    window: Window,
    scale: float,
    windows: Sequence[int | None],
    implementation: Implementation,
) -> Float[Array, "T L H D"]:
    """Attends within rows of one text each, with the given window."""
    # An empty row is computed as if it had a token: cuDNN need not know what a softmax over nothing is.
    lengths = jnp.maximum(lengths.astype(jnp.int32), 1)
    kernel = partial(_kernel, lengths, scale=scale, implementation=implementation)
    reach = partial(_within, length=q.shape[1])
    if not isinstance(window, jax.Array):
        return kernel(reach(window))(q, k, v)
    # The window of a scanned layer is traced: one branch for each value that it may take, the first for all tokens.
    static = sorted({reach(w) for w in windows} - {None})
    branches = [kernel(w) for w in (None, *static)]
    if not static:
        return branches[0](q, k, v)
    index = jnp.argmax(jnp.array([False, *(window == w for w in static)]))
    return jax.lax.switch(index, branches, q, k, v)


def _within(window: int | None, length: int) -> int | None:
    """Returns the window, or None if no row of this length is longer."""
    return None if window is None or window >= length else int(window)


def _kernel(
    lengths: Int[Array, " T"], window: int | None, scale: float, implementation: Implementation
) -> Callable[[Array, Array, Array], Array]:
    return partial(
        jax.nn.dot_product_attention,
        is_causal=True,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        local_window_size=None if window is None else (window - 1, 0),
        scale=scale,
        implementation=implementation,
    )


@jax.custom_vjp
def _gather(x: Float[Array, "N S H D"], slots: Int[Array, "T L"], places: Int[Array, "N S R"]) -> Array:
    """Gathers texts from sequences, [T, L, H, D]; what lies after their ends is arbitrary.

    The gradient of a slot is the sum over its `places`. As a gather it is exact and deterministic, where a transposed
    gather would add bfloat16 numbers in any order.
    """
    return _take(x, slots)


def _gather_backward(places: Int[Array, "N S R"], drows: Float[Array, "T L H D"]):
    terms = jnp.where((places >= 0)[..., None, None], _take(drows, places), 0)
    return terms.sum(2, dtype=jnp.float32).astype(drows.dtype), None, None


_gather.defvjp(lambda x, slots, places: (_gather(x, slots, places), places), _gather_backward)


@jax.custom_vjp
def _first(rows: Float[Array, "T L H D"], slots: Int[Array, "T L"], first: Int[Array, "N S 1"]) -> Array:
    """Reads each slot of the sequences, [N, S, H, D], from its first place in the rows of texts; 0 at padding."""
    return jnp.where((first >= 0)[..., None], _take(rows, first[..., 0]), 0)


def _first_backward(residuals: tuple[Array, Array], dout: Float[Array, "N S H D"]):
    slots, first = residuals
    is_first = _take(first, slots)[..., 0] == jnp.arange(slots.size).reshape(slots.shape)
    return jnp.where((is_first & (slots >= 0))[..., None, None], _take(dout, slots), 0), None, None


_first.defvjp(lambda rows, slots, first: (_first(rows, slots, first), (slots, first)), _first_backward)


def _take(x: Array, index: Int[Array, "*I"]) -> Array:
    """Indexes the first two axes of `x`, taken as one; negative indices give something arbitrary."""
    return rearrange(x, "a b ... -> (a b) ...").at[index].get(mode="clip")
