"""A decoder-only transformer of any family that `DecoderConfig` describes."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from qstar_jax._compat import nnx
from qstar_jax.config import ComputeOptions, Dtype
from qstar_jax.errors import InputError
from qstar_jax.models.attention import masked_attention
from qstar_jax.models.block import ATTENTION_OUT, Block, ModuleFactory
from qstar_jax.models.cache import LayerCache
from qstar_jax.models.decoder_config import DecoderConfig
from qstar_jax.models.head import Head
from qstar_jax.models.lora import Lora
from qstar_jax.models.masks import PackedMask, Window
from qstar_jax.models.rope import Rotation, identity_rotation, rotation
from qstar_jax.sharding import GATHERED, constrain_batch, layer_specs, look_up, map_batch

LayerCaches = LayerCache | tuple[LayerCache, ...]  # stacked along a leading axis of layers, or one per layer
LayerSettings = tuple[Int[Array, ""] | int | None, Int[Array, ""] | int | None]  # window, index into the rotations

# The default rule shards q, k and v by outputs; sharding o by inputs needs only one all-reduce per layer.
SHARDING_OVERRIDES = {r"layers/attention/o/kernel$": (None, "tensor", "fsdp")}

_NO_WINDOW = jnp.iinfo(jnp.int32).max  # for layers without a window in models where other layers have one


class Decoder(nnx.Module):
    """Maps tokens to last hidden states; `head` maps those to logits.

    In training, layers are stacked and scanned, so that compile time does not grow with depth; windows and rotary
    positions, which may differ between layers, enter the scan as arrays. For decoding, layers are kept apart: decoding
    reads every weight for only a few tokens, and must not copy it out of the stack first.
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
        make = ModuleFactory(config, compute, lora, rngs)
        self.embed = make.embedding(config.vocab_size)
        if config.learned_positions:
            self.embed_positions = make.embedding(config.max_position_embeddings)
        keys = jax.random.split(rngs.params(), config.num_hidden_layers)
        if stacked:
            self.layers = jax.vmap(lambda key: Block(config, compute, lora, rngs=nnx.Rngs(key)))(keys)
        else:
            self.layers = nnx.List(Block(config, compute, lora, rngs=nnx.Rngs(key)) for key in keys)
        self.norm = make.norm(config.hidden_size)
        if not config.tie_word_embeddings:
            self.unembed = make.embedding(config.vocab_size)

    def head(self) -> Head:
        """Returns the language-model head, in the dtype of the activations."""
        table = self.embed if self.config.tie_word_embeddings else self.unembed
        return Head(table.embedding[...].astype(self.compute.dtype), softcap=self.config.logit_softcap)

    def __call__(
        self, tokens: Int[Array, "B S"], positions: Int[Array, "B S"], mask: Bool[Array, "B S S"] | PackedMask
    ) -> Float[Array, "B S D"]:
        """Computes last hidden states.

        Args:
            tokens: Token ids. Shape [B, S].
            positions: Positions of the tokens in their texts, from 0. Shape [B, S].
            mask: True where a query may attend to a key, ignoring windows. Shape [B, S, S]. Or a `PackedMask`.

        Returns:
            Hidden states after the last norm. Shape [B, S, D].

        Raises:
            InputError: If `compute.longrope auto` does not determine the frequencies.
        """
        rotations = self._rotations(positions, tokens.shape[1])

        def run_layer(layer: Block, x: Array, settings: LayerSettings) -> Array:
            window, rotation = settings[0], _select_rotation(rotations, settings[1])
            layer = _cast_matrices(layer, self.compute.dtype)
            specs = layer_specs(layer, self.config.num_hidden_layers, SHARDING_OVERRIDES)
            specs = specs, jax.tree.map(lambda _: PartitionSpec(), window)
            return map_batch(run_on_shard, (layer, window), x, positions, mask, rotation, specs=specs)

        def run_on_shard(params: tuple[Block, Window], x: Array, positions: Array, mask, rotation: Rotation) -> Array:
            layer, window = params
            attend = self._attention(mask, positions)
            return layer(x, positions.shape[0], rotation, partial(attend, window=window))

        # Embed, scan over the layers with their settings, and normalize.
        run_layer, settings = _rematerialize(run_layer, self.compute.remat), self._stacked_settings()
        x = self._embed(tokens, positions, gather=True)
        unroll = 1 if self.compute.scan_layers else self.config.num_hidden_layers
        layers = (self.layers, settings)
        x, _ = jax.lax.scan(lambda x, layer: (run_layer(layer[0], x, layer[1]), None), x, layers, unroll=unroll)
        return rearrange(self.norm(x), "(b s) d -> b s d", b=tokens.shape[0])

    def prefill(
        self,
        tokens: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        mask: Bool[Array, "B S S"] | PackedMask,
        slots: int,
    ) -> tuple[Float[Array, "B S D"], LayerCaches]:
        """Computes the last hidden states of prompts, and caches the keys and values of every layer.

        Args:
            tokens: Token ids. Shape [B, S].
            positions: Positions of the tokens in their texts, from 0. Shape [B, S].
            mask: As for `__call__`.
            slots: Pool slots to allocate for the tokens that will follow, M.

        Returns:
            Hidden states after the last norm, shape [B, S, D], and the caches of all layers, stacked like the layers.

        Raises:
            InputError: If `compute.longrope auto` does not determine the frequencies.
        """
        attend, rotations = self._attention(mask, positions), self._rotations(positions, tokens.shape[1] + slots)

        def run(x: Array, layer_and_settings: tuple[Block, LayerSettings]) -> tuple[Array, LayerCache]:
            layer, (window, rope) = layer_and_settings
            cache = None

            # Keys and values are known inside the layer only, so attention itself caches them.
            def attend_and_cache(q, k, v):
                nonlocal cache
                cache = LayerCache.from_prompt(k, v, slots)
                return attend(q, k, v, window=window)

            x = layer(x, tokens.shape[0], _select_rotation(rotations, rope), attend_and_cache)
            return x, cache

        x = self._embed(tokens, positions)
        if self.stacked:
            x, caches = jax.lax.scan(run, x, (self.layers, self._stacked_settings()))
        else:
            caches = []
            for layer_and_settings in zip(self.layers, self._settings(), strict=True):
                x, cache = run(x, layer_and_settings)
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
        """Runs K tokens per prompt, each at the end of its own path, and writes them into the pool.

        Args:
            tokens: Token ids. Shape [B, K].
            positions: Positions of the tokens in their texts. Shape [B, K].
            prompt_mask: True at the tokens of the prompt. Shape [B, P].
            path_mask: True at the pool slots of the tokens before each token, and at its own slot. Shape [B, K, M].
            pool_positions: Positions of the tokens in the pool, including these K. Shape [B, M].
            caches: Caches of all layers, from `prefill` or `extend`.
            slot: Pool slot of the first of the K tokens.

        Returns:
            Hidden states after the last norm, shape [B, K, D], and the caches including the new tokens.
        """
        # Distances from each token to the prompt and to the pool, for layers with windows.
        slots = prompt_mask.shape[1] + path_mask.shape[2]
        rotations, x = self._rotations(positions, slots), self._embed(tokens, positions)
        to_prompt = positions[:, :, None] - jnp.arange(prompt_mask.shape[1])
        to_pool = positions[:, :, None] - pool_positions[:, None]

        def run(x: Array, layer: Block, cache: LayerCache, settings: LayerSettings) -> tuple[Array, LayerCache]:
            window, rope = settings
            masks = prompt_mask[:, None], path_mask
            if window is not None:
                masks = masks[0] & (to_prompt < window), masks[1] & (to_pool < window)

            # Write the new keys and values first: each token also attends to itself.
            def attend(q, k, v):
                nonlocal cache
                cache = cache.write(k, v, slot)
                used = slot + tokens.shape[1]
                return cache.attend(q, *masks, used, scale=self.config.scale, softcap=self.config.score_softcap)

            x = layer(x, tokens.shape[0], _select_rotation(rotations, rope), attend)
            return x, cache

        if self.stacked:

            def step(carry, xs):
                x, caches = carry
                layer, index, settings = xs
                x, cache = run(x, layer, caches.layer(index), settings)
                # The buffers travel in the carry, so that XLA writes the new slots in place.
                return (x, caches.update_layer(cache, index, slot, tokens.shape[1])), None

            xs = self.layers, jnp.arange(self.config.num_hidden_layers), self._stacked_settings()
            (x, caches), _ = jax.lax.scan(step, (x, caches), xs)
        else:
            updated = []
            for layer, cache, settings in zip(self.layers, caches, self._settings(), strict=True):
                x, cache = run(x, layer, cache, settings)
                updated.append(cache)
            caches = tuple(updated)
        return rearrange(self.norm(x), "(b k) d -> b k d", b=tokens.shape[0]), caches

    def _attention(self, mask: Bool[Array, "B S S"] | PackedMask, positions: Int[Array, "B S"]) -> Callable[..., Array]:
        config, windows = self.config, tuple(dict.fromkeys(kind.window for kind in self.config.layers))
        form = {"scale": config.scale, "softcap": config.score_softcap, "windows": windows}
        return masked_attention(mask, positions, self.compute.attention, **form)

    def _embed(
        self, tokens: Int[Array, "B S"], positions: Int[Array, "B S"], *, gather: bool = False
    ) -> Float[Array, "N D"]:
        """Embeds tokens; with `gather`, tables travel between devices, not the vectors of the tokens."""
        embed = _look_up_gathered if gather else look_up
        x = embed(self.embed, tokens)
        if self.config.embedding_scale != 1:
            # Models are trained with a scale rounded to the dtype of the activations.
            x *= jnp.asarray(self.config.embedding_scale, x.dtype)
        if self.config.learned_positions:
            x += embed(self.embed_positions, positions)
        # Flatten for plain matrix products: with three dimensions, XLA transposes first on a CPU.
        return rearrange(x, "b s d -> (b s) d")

    def _rotations(self, positions: Int[Array, "B S"], slots: int) -> list[Rotation | None]:
        """Computes the cosines and sines of each of `config.ropes`.

        Layers without rotary positions get the identity rotation if other layers have some, so that a scan can select.

        Args:
            positions: Positions of the tokens in their texts. Shape [B, S].
            slots: The longest possible text, in tokens.
        """
        long, context = self.compute.longrope == "long", self.config.longrope_context
        if context is not None and self.compute.longrope == "auto" and slots > context:
            raise InputError(
                f"compute.longrope auto: this model uses other rotary frequencies for texts of more than {context:,} "
                f"tokens, and {slots:,} slots may hold such texts; set it to short or long"
            )
        rotations = [rope and rotation(rope, self.config.head_dim, positions, long) for rope in self.config.ropes]
        template = next(filter(None, rotations), None)
        return [template and identity_rotation(template) if r is None else r for r in rotations]

    def _settings(self) -> list[LayerSettings]:
        """Returns the window of each layer and its index into `_rotations`."""
        return [(kind.window, self.config.ropes.index(kind.rope)) for kind in self.config.layers]

    def _stacked_settings(self) -> LayerSettings:
        """Stacks `_settings` for a scan; None where no layer has a window, or all have the same rotation."""
        windows, ropes = zip(*self._settings(), strict=True)
        windows = None if set(windows) == {None} else jnp.array([window or _NO_WINDOW for window in windows])
        return windows, jnp.array(ropes) if len(set(ropes)) > 1 else None


def _select_rotation(rotations: list[Rotation | None], index: Int[Array, ""] | int | None) -> Rotation | None:
    if index is None or isinstance(index, int):
        return rotations[index or 0]
    return jax.tree.map(lambda *kinds: jax.lax.select_n(index, *kinds), *rotations)


def _cast_matrices(layer: Block, dtype: Dtype) -> Block:
    """Casts what is multiplied to the dtype of the products, in which it then travels between devices."""
    return jax.tree.map(lambda x: x.astype(dtype) if x.ndim > 1 else x, layer)


def _look_up_gathered(table: nnx.Embed, ids: Int[Array, "B S"]) -> Float[Array, "B S D"]:
    vectors = table.embedding[...].astype(table.dtype)
    return constrain_batch(map_batch(partial(jnp.take, axis=0), vectors, ids))


def _rematerialize(run_layer, remat: str):
    if remat == "none" and jax.sharding.get_abstract_mesh().shape.get("fsdp", 1) == 1:
        return run_layer
    policies = jax.checkpoint_policies
    attention = policies.save_only_these_names(ATTENTION_OUT)
    policy = {
        "full": None,
        "attention": attention,
        # Without its output, attention would be run twice in the backward pass: for that of its own, and for the
        # gradient of the product that reads it.
        "dots": policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, attention),
        # Whole matrices are gathered again: kept for the backward pass, those of all layers would be on every device.
        "none": policies.save_anything_except_these_names(GATHERED),
    }[remat]
    return jax.checkpoint(run_layer, policy=policy)
