"""The one network: a decoder-only transformer of any family that `DecoderConfig` can describe."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from qstar_jax._compat import nnx
from qstar_jax.config import ComputeOptions
from qstar_jax.errors import InputError
from qstar_jax.models.attention import masked_attention
from qstar_jax.models.block import ATTENDED, Block, Parts
from qstar_jax.models.cache import LayerCache
from qstar_jax.models.decoder_config import DecoderConfig
from qstar_jax.models.head import Head
from qstar_jax.models.lora import Lora
from qstar_jax.models.masks import RowMask
from qstar_jax.models.rope import Rotation, no_rotation, rotation
from qstar_jax.sharding import constrain_batch

LayerCaches = LayerCache | tuple[LayerCache, ...]  # one with a leading axis of layers, or one a layer
LayerNumbers = tuple[Int[Array, ""] | int | None, Int[Array, ""] | int | None]  # a window, and which of the rotations

# The rule of largest dimensions cuts q, k, v by outputs; their counterpart o is cut by inputs, to need one sum a layer.
SHARDING_OVERRIDES = {r"layers/attention/o/kernel$": (None, "tensor", "fsdp")}

_NO_WINDOW = jnp.iinfo(jnp.int32).max  # of a layer without one, where other layers have one


class Decoder(nnx.Module):
    """A model without its softmax: tokens in, last hidden states out.

    Layers are stacked, and scanned in training, so that compile time does not grow with depth: windows and rotary
    positions, which may differ from layer to layer, enter the scan as numbers. Or layers lie apart, for decoding, which
    reads every weight for a few tokens and must not copy it out of the stack first.
    """

    def __init__(
        self,
        config: DecoderConfig,
        compute: ComputeOptions = ComputeOptions(),
        lora: Lora | None = None,
        stacked: bool = True,
        *,
        rngs: nnx.Rngs,
    ):
        self.config, self.compute, self.stacked = config, compute, stacked
        parts = Parts(config, compute, lora, rngs)
        self.embed = parts.embedding(config.vocab_size)
        if config.learned_positions:
            self.embed_positions = parts.embedding(config.max_position_embeddings)
        keys = jax.random.split(rngs.params(), config.num_hidden_layers)
        if stacked:
            self.layers = jax.vmap(lambda key: Block(config, compute, lora, rngs=nnx.Rngs(key)))(keys)
        else:
            self.layers = nnx.List(Block(config, compute, lora, rngs=nnx.Rngs(key)) for key in keys)
        self.norm = parts.norm(config.hidden_size)
        if not config.tie_word_embeddings:
            self.unembed = parts.embedding(config.vocab_size)

    def head(self) -> Head:
        """What turns hidden states into logits, in the type of the activations."""
        table = self.embed if self.config.tie_word_embeddings else self.unembed
        return Head(table.embedding[...].astype(self.compute.dtype), softcap=self.config.logit_softcap)

    def __call__(
        self, tokens: Int[Array, "B S"], positions: Int[Array, "B S"], mask: Bool[Array, "B S S"] | RowMask
    ) -> Float[Array, "B S D"]:
        """Computes last hidden states.

        Args:
            tokens: Token ids. Shape [B, S].
            positions: Of the tokens in their texts, from 0. Shape [B, S].
            mask: True where a query may see a key, were there no windows. Shape [B, S, S]. Or a `RowMask`.

        Returns:
            Hidden states after the last norm. Shape [B, S, D].

        Raises:
            InputError: If it is not known which frequencies of longrope are meant (see `compute.longrope`).
        """
        attend, rotations = self._attention(mask, positions), self._rotations(positions, tokens.shape[1])

        def run_layer(layer: Block, x: Array, numbers: LayerNumbers) -> Array:
            window, rotation = numbers[0], _chosen(rotations, numbers[1])
            return layer(x, tokens.shape[0], rotation, partial(attend, window=window))

        run_layer, numbers = _rematerialised(run_layer, self.compute.remat), self._stacked_numbers()
        x = self._embedded(tokens, positions)
        x, _ = jax.lax.scan(lambda x, layer: (run_layer(layer[0], x, layer[1]), None), x, (self.layers, numbers))
        return rearrange(self.norm(x), "(b s) d -> b s d", b=tokens.shape[0])

    def prefill(
        self, tokens: Int[Array, "B S"], positions: Int[Array, "B S"], mask: Bool[Array, "B S S"] | RowMask, slots: int
    ) -> tuple[Float[Array, "B S D"], LayerCaches]:
        """Computes last hidden states of prompts, and keeps every layer's keys and values.

        Args:
            tokens: Token ids. Shape [B, S].
            positions: Of the tokens in their texts, from 0. Shape [B, S].
            mask: As for `__call__`.
            slots: Room for the tokens that will follow, M.

        Returns:
            Hidden states after the last norm, shape [B, S, D], and the caches of all layers, stacked like the layers.

        Raises:
            InputError: If it is not known which frequencies of longrope are meant (see `compute.longrope`).
        """
        attend, rotations = self._attention(mask, positions), self._rotations(positions, tokens.shape[1] + slots)

        def run(x: Array, layer_and_numbers: tuple[Block, LayerNumbers]) -> tuple[Array, LayerCache]:
            layer, (window, rope) = layer_and_numbers
            kept = None

            def keeping(q, k, v):
                nonlocal kept
                kept = LayerCache.of_prompt(k, v, slots)
                return attend(q, k, v, window=window)

            x = layer(x, tokens.shape[0], _chosen(rotations, rope), keeping)
            return x, kept

        x = self._embedded(tokens, positions)
        if self.stacked:
            x, caches = jax.lax.scan(run, x, (self.layers, self._stacked_numbers()))
        else:
            caches = []
            for layer_and_numbers in zip(self.layers, self._numbers(), strict=True):
                x, cache = run(x, layer_and_numbers)
                caches.append(cache)
            caches = tuple(caches)
        return rearrange(self.norm(x), "(b s) d -> b s d", b=tokens.shape[0]), caches

    def extend(
        self,
        tokens: Int[Array, "B K"],
        positions: Int[Array, "B K"],
        prompt_mask: Bool[Array, "B P"],
        path_mask: Bool[Array, "B K M"],
        pool_positions: Int[Array, "B M"],
        caches: LayerCaches,
        slot: Int[Array, ""],
    ) -> tuple[Float[Array, "B K D"], LayerCaches]:
        """Runs K tokens a prompt, each at the end of a path of its own, and writes them into the pool.

        Args:
            tokens: Token ids. Shape [B, K].
            positions: Of the tokens in their texts. Shape [B, K].
            prompt_mask: True at the prompt's tokens. Shape [B, P].
            path_mask: True at the slots of the pool that hold a token's past, and at its own. Shape [B, K, M].
            pool_positions: Positions of the pool's tokens, with the K tokens among them. Shape [B, M].
            caches: Of all layers, as `prefill` returned them.
            slot: The pool's slot of the first of the K tokens.

        Returns:
            Hidden states after the last norm, shape [B, K, D], and the caches with the new tokens in them.
        """
        slots = prompt_mask.shape[1] + path_mask.shape[2]
        rotations, x = self._rotations(positions, slots), self._embedded(tokens, positions)
        to_prompt = positions[:, :, None] - jnp.arange(prompt_mask.shape[1])
        to_pool = positions[:, :, None] - pool_positions[:, None]

        def run(x: Array, layer: Block, cache: LayerCache, numbers: LayerNumbers) -> tuple[Array, LayerCache]:
            window, rope = numbers
            masks = prompt_mask[:, None], path_mask
            if window is not None:
                masks = masks[0] & (to_prompt < window), masks[1] & (to_pool < window)
            written = None

            def attend(q, k, v):
                nonlocal written
                written = cache.write(k, v, slot)
                used = slot + tokens.shape[1]
                return written.attend(q, *masks, used, scale=self.config.scale, softcap=self.config.score_softcap)

            x = layer(x, tokens.shape[0], _chosen(rotations, rope), attend)
            return x, written

        if self.stacked:

            def step(carry, xs):
                x, caches = carry
                layer, index, numbers = xs
                x, own = run(x, layer, caches.layer(index), numbers)
                # The buffers travel in the carry, so that XLA writes the new slots in place.
                return (x, caches.with_slots_of(own, index, slot, tokens.shape[1])), None

            xs = self.layers, jnp.arange(self.config.num_hidden_layers), self._stacked_numbers()
            (x, caches), _ = jax.lax.scan(step, (x, caches), xs)
        else:
            written = []
            for layer, cache, numbers in zip(self.layers, caches, self._numbers(), strict=True):
                x, own = run(x, layer, cache, numbers)
                written.append(own)
            caches = tuple(written)
        return rearrange(self.norm(x), "(b k) d -> b k d", b=tokens.shape[0]), caches

    def _attention(self, mask: Bool[Array, "B S S"] | RowMask, positions: Int[Array, "B S"]) -> Callable[..., Array]:
        option, config = self.compute.attention, self.config
        return masked_attention(mask, positions, option, scale=config.scale, softcap=config.score_softcap)

    def _embedded(self, tokens: Int[Array, "B S"], positions: Int[Array, "B S"]) -> Float[Array, "N D"]:
        x = constrain_batch(self.embed(tokens))
        if self.config.embedding_scale != 1:
            x *= jnp.asarray(self.config.embedding_scale, x.dtype)  # rounded to its type, as models are trained with it
        if self.config.learned_positions:
            x += constrain_batch(self.embed_positions(positions))
        # One row a token: XLA transposes activations of three dimensions before it multiplies them on a CPU.
        return rearrange(x, "b s d -> (b s) d")

    def _rotations(self, positions: Int[Array, "B S"], slots: int) -> list[Rotation | None]:
        """Cosines and sines of each of `config.ropes`; of none where other layers have some, what changes nothing.

        Args:
            positions: Of the tokens in their texts. Shape [B, S].
            slots: Room for a text, in tokens.
        """
        long, context = self.compute.longrope == "long", self.config.longrope_context
        if context is not None and self.compute.longrope == "auto" and slots > context:
            raise InputError(
                f"compute.longrope auto: this model has other rotary frequencies for texts of more than {context:,} "
                f"tokens, and in {slots:,} slots there may be such texts or not; set it to short or long"
            )
        made = [rope and rotation(rope, self.config.head_dim, positions, long) for rope in self.config.ropes]
        some = next(filter(None, made), None)
        return [some and no_rotation(some) if found is None else found for found in made]

    def _numbers(self) -> list[LayerNumbers]:
        """What differs between layers: each one's window, and which of `_rotations` it has."""
        return [(kind.window, self.config.ropes.index(kind.rope)) for kind in self.config.layers]

    def _stacked_numbers(self) -> LayerNumbers:
        """The same, stacked for a scan; None for windows where there are none, and for rotations where there is one."""
        windows, ropes = zip(*self._numbers(), strict=True)
        windows = None if set(windows) == {None} else jnp.array([window or _NO_WINDOW for window in windows])
        return windows, jnp.array(ropes) if len(set(ropes)) > 1 else None


def _chosen(rotations: list[Rotation | None], index: Int[Array, ""] | int | None) -> Rotation | None:
    if index is None or isinstance(index, int):
        return rotations[index or 0]
    return jax.tree.map(lambda *kinds: jax.lax.select_n(index, *kinds), *rotations)


def _rematerialised(run_layer, remat: str):
    if remat == "full":
        return jax.checkpoint(run_layer)
    if remat == "attention":
        return jax.checkpoint(run_layer, policy=jax.checkpoint_policies.save_only_these_names(ATTENDED))
    if remat == "dots":
        return jax.checkpoint(run_layer, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
    return run_layer
