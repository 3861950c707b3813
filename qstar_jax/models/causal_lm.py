"""The language model that the rest of the library uses: pure functions of a parameter dictionary, for every family."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qstar_jax._compat import nnx
from qstar_jax.config import ComputeOptions
from qstar_jax.errors import InputError
from qstar_jax.models.cache import LayerCache
from qstar_jax.models.config_keys import Keys
from qstar_jax.models.decoder import Decoder
from qstar_jax.models.decoder_config import DecoderConfig
from qstar_jax.models.families import FAMILIES
from qstar_jax.models.family import Family
from qstar_jax.models.head import Head
from qstar_jax.models.lora import Lora, Params, split_adapter
from qstar_jax.models.masks import PackedMask, right_padded
from qstar_jax.models.rope_keys import check_widths
from qstar_jax.models.tensors import Tensor


@dataclass(frozen=True)
class CausalLM:
    """A decoder-only language model without its parameters; hashable, so it can be a static argument of `jax.jit`.

    Attributes:
        model_type: Family, as named in config.json.
        config: Architecture of the model.
        compute: Dtypes, attention and rematerialization.
        lora: Adapter of the model; None: no adapter.
        other_keys: Keys of config.json that change nothing here, and are written back.
    """

    model_type: str
    config: DecoderConfig
    compute: ComputeOptions = ComputeOptions()
    lora: Lora | None = None
    other_keys: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def from_hf(cls, config: dict[str, Any], compute: ComputeOptions = ComputeOptions()) -> "CausalLM":
        """Builds the model described by a config.json.

        Raises:
            InputError: If the architecture is unknown or has an unsupported feature.
        """
        config = _unwrap(config)
        if config.get("model_type") not in list(FAMILIES):
            _refuse_architecture(config)
        family = FAMILIES[config["model_type"]]
        keys = Keys(config)
        shape = family.read(keys)
        for rope in filter(None, shape.ropes):
            check_widths(rope, shape.head_dim)
        return cls(family.model_type, shape, compute, other_keys=keys.remaining())

    def to_hf(self) -> dict[str, Any]:
        """Returns the contents of a config.json that `from_hf` and transformers can read."""
        names = {"architectures": [self.family.architecture], "model_type": self.model_type}
        return self.other_keys | names | self.family.write(self.config)

    @property
    def family(self) -> Family:
        """How Hugging Face stores models of this family."""
        return FAMILIES[self.model_type]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Path of each base parameter -> its place in Hugging Face files."""
        return self.family.tensors(self.config)

    @property
    def base(self) -> "CausalLM":
        """The model without its adapter."""
        return replace(self, lora=None)

    def check_length(self, length: int, what: str) -> str | None:
        """Checks a length in tokens against the context length of the model.

        Returns:
            A warning with both numbers, or None if the length fits.

        Raises:
            InputError: If it does not fit and positions are learned, or longrope needs other frequencies for it.
        """
        limit, context = self.config.max_position_embeddings, self.config.longrope_context
        choice = self.compute.longrope
        if context is not None and choice != "long" and length > context:
            raise InputError(
                f"{what}: {length:,} tokens; beyond {context:,} this model uses other rotary frequencies for all "
                "texts: set compute.longrope to long, or shorten the texts"
            )
        if length <= limit:
            return None if context or choice == "auto" else f"compute.longrope {choice} has no effect on this model"
        excess = f"{what}: {length:,} tokens exceed the model's context of {limit:,} (max_position_embeddings)"
        if self.config.learned_positions:
            raise InputError(f"{excess}; it has no positions beyond that: shorten the texts")
        return f"warning: {excess}; its output beyond that may be nonsense"

    @property
    def linear_layers(self) -> dict[str, str]:
        """Adapter name of each linear layer of a block (`q_proj`, ...) -> path of its parameters."""
        kernels = [path.removesuffix("/kernel") for path in self.tensors if path.endswith("/kernel")]
        return {f"{path.split('/')[-1]}_proj": path for path in kernels}

    @property
    def linear_modules(self) -> dict[str, str]:
        """Adapter name of each linear layer -> name of its (possibly fused) module in Hugging Face files."""
        return {
            name: self.tensors[f"{path}/kernel"].name.removesuffix(".weight")
            for name, path in self.linear_layers.items()
        }

    def with_lora(
        self, rank: int, alpha: float, targets: Sequence[str] | None = None, rank_stabilised: bool = False
    ) -> "CausalLM":
        """Returns the model with an adapter.

        Args:
            rank: Rank of the adapter.
            alpha: Alpha of the adapter (see `lora.Lora`).
            targets: Names of the layers to adapt, as in `linear_layers`, or (suffixes of) module names as in
                `linear_modules`, which stand for all layers fused in the module; None: all.
            rank_stabilised: Whether the scale is alpha / sqrt(rank).

        Raises:
            InputError: If the rank is not positive, or the model lacks one of the layers.
        """
        if not isinstance(rank, int) or rank < 1:
            raise InputError(f"the rank of an adapter must be a whole number of at least 1 (found: {rank!r})")
        # Resolve each target to the layers it stands for.
        modules = self.linear_modules
        targets = list(modules) if targets is None else targets
        layers = {
            target: [name for name, module in modules.items() if target == name or f".{module}".endswith(f".{target}")]
            for target in targets
        }
        unknown = sorted(target for target, names in layers.items() if not names)
        if unknown or not targets:
            choices = dict.fromkeys([*modules, *(module.split(".")[-1] for module in modules.values())])
            raise InputError(
                f"the targets of an adapter must be among {', '.join(choices)} "
                f"(found: {', '.join(map(repr, unknown)) or 'none at all'})"
            )
        # In the order of the model, so that equal adapters have equal hashes.
        order = tuple(name for name in modules if any(name in names for names in layers.values()))
        return replace(self, lora=Lora(rank, float(alpha), order, rank_stabilised))

    def _network(self, rngs: nnx.Rngs, stacked: bool = True) -> nnx.Module:
        return Decoder(self.config, self.compute, self.lora, stacked, rngs=rngs)

    def init(self, key: jax.Array) -> Params:
        """Initializes random parameters, in `compute.param_dtype`."""
        return nnx.to_pure_dict(nnx.state(self._network(nnx.Rngs(key)), nnx.Param))

    def init_adapter(self, key: jax.Array) -> Params:
        """Initializes a new adapter, which leaves the model unchanged until it is trained (B = 0).

        Returns:
            The adapter alone, float32 (see `lora.split_adapter`).
        """
        return split_adapter(self.init(key))[1]

    def abstract_params(self) -> Params:
        """Returns shapes and dtypes of the parameters, as `jax.ShapeDtypeStruct`s."""
        return jax.tree.map(lambda x: x, _abstract_params(self))  # a copy: callers may edit the cached tree

    def _bind(self, params: Params) -> nnx.Module:
        return nnx.merge(_graph(self, not is_unstacked(params)), nnx.State(jax.tree.map(nnx.Param, params)))

    def hidden_states(
        self,
        params: Params,
        tokens: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        mask: Bool[Array, "B S S"] | PackedMask,
    ) -> Float[Array, "B S D"]:
        """Computes last hidden states, shape [B, S, D]; arguments as for `decoder.Decoder`."""
        return self._bind(params)(tokens, positions, mask)

    def prefill(
        self, params: Params, prompts: Int[Array, "B P"], prompt_lengths: Int[Array, " B"], slots: int
    ) -> tuple[Float[Array, "B V"], "DecodeCache"]:
        """Encodes prompts, each once, and starts a decoding cache.

        Args:
            params: Parameters, stacked or not (see `unstack`).
            prompts: Right-padded token ids. Shape [B, P].
            prompt_lengths: Number of tokens of each prompt, at least 1. Shape [B].
            slots: Pool slots to allocate for the tokens that will follow each prompt, M.

        Returns:
            Float32 logits of the first new token, shape [B, V], and the cache.
        """
        # Padding forms a block of its own: no token of a prompt attends to it.
        mask = PackedMask.of_lengths(prompt_lengths, prompts.shape[1])
        positions = jnp.broadcast_to(jnp.arange(prompts.shape[1]), prompts.shape)
        hidden, layers = self._bind(params).prefill(prompts, positions, mask, slots)
        # Only the last token of each prompt needs logits.
        last = jnp.take_along_axis(hidden, (prompt_lengths - 1)[:, None, None], axis=1)[:, 0]
        pool_positions = jnp.zeros((len(prompts), slots), jnp.int32)
        return self.head(params).logits(last), DecodeCache(layers, prompt_lengths, pool_positions)

    def extend(
        self,
        params: Params,
        cache: "DecodeCache",
        tokens: Int[Array, "B K"],
        path: Bool[Array, "B K M"],
        slot: Int[Array, ""],
    ) -> tuple[Float[Array, "B K V"], "DecodeCache"]:
        """Runs K tokens per prompt, each at the end of its own path through the pool.

        Args:
            params: Parameters, stacked or not (see `unstack`).
            cache: From `prefill` or the last `extend`.
            tokens: Token ids. Shape [B, K].
            path: True at the pool slots of the tokens before each token, and at its own slot. Shape [B, K, M].
            slot: Pool slot of the first of the K tokens; they take K slots.

        Returns:
            Float32 next-token logits, shape [B, K, V], and the cache including the K tokens.
        """
        # A token's position is the length of its prompt plus that of its path.
        prompt_width = jax.tree.leaves(cache.layers)[0].shape[-2]  # the first leaf holds the keys of the prompts
        prompt_mask = jnp.arange(prompt_width) < cache.prompt_lengths[:, None]
        positions = cache.prompt_lengths[:, None] + path.sum(-1) - 1
        pool_positions = jax.lax.dynamic_update_slice(cache.pool_positions, positions, (0, slot))
        network = self._bind(params)
        hidden, layers = network.extend(tokens, positions, prompt_mask, path, pool_positions, cache.layers, slot)
        return self.head(params).logits(hidden), replace(cache, layers=layers, pool_positions=pool_positions)

    def unstack(self, params: Params) -> Params:
        """Unstacks layers, if they are not yet, for decoding, which then copies no weight out of the stack."""
        if is_unstacked(params):
            return params
        layers = params["layers"]
        count = jax.tree.leaves(layers)[0].shape[0]
        return params | {"layers": {i: jax.tree.map(lambda x, i=i: x[i], layers) for i in range(count)}}

    def head(self, params: Params) -> Head:
        """Returns the head that maps last hidden states to logits."""
        return self._bind(params).head()

    def logits(
        self, params: Params, tokens: Int[Array, "B S"], lengths: Int[Array, " B"] | None = None
    ) -> Float[Array, "B S V"]:
        """Computes logits of right-padded sequences; for short texts, as it materializes them all.

        Args:
            params: Parameters.
            tokens: Token ids. Shape [B, S].
            lengths: Number of tokens of each sequence before its padding; S by default. Shape [B].

        Returns:
            Float32 logits. Shape [B, S, V].
        """
        batch, length = tokens.shape
        lengths = jnp.full(batch, length) if lengths is None else lengths
        return self.head(params).logits(self.hidden_states(params, tokens, *right_padded(lengths, length)))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeCache:
    """Decoding cache of B prompts and of M tokens after each (see `cache.LayerCache`).

    Attributes:
        layers: Keys and values of each layer; a single stack if the parameters are stacked.
        prompt_lengths: Number of tokens of each prompt. Shape [B].
        pool_positions: Positions of the tokens in the pool, to which windows apply. Shape [B, M].
    """

    layers: LayerCache | tuple[LayerCache, ...]
    prompt_lengths: Int[Array, " B"]
    pool_positions: Int[Array, "B M"]

    def reorder(self, slots: Int[Array, "B N"]) -> "DecodeCache":
        """Permutes the tokens of the pool.

        Args:
            slots: Current slot of the content of each new slot. Shape [B, N]; N is the size of the new pool.
        """
        is_layer = lambda x: isinstance(x, LayerCache)  # noqa: E731
        layers = jax.tree.map(lambda x: x.reorder(slots), self.layers, is_leaf=is_layer)
        return replace(self, layers=layers, pool_positions=jnp.take_along_axis(self.pool_positions, slots, axis=1))


@cache
def _abstract_params(model: CausalLM) -> Params:
    return jax.eval_shape(lambda: model.init(jax.random.key(0)))  # no device makes the key


@cache
def _graph(model: CausalLM, stacked: bool) -> nnx.GraphDef:
    """Returns the network without its parameters; cached, because every pass needs it and building it is slow."""
    return nnx.split(nnx.eval_shape(lambda: model._network(nnx.Rngs(0), stacked)), nnx.Param)[0]


def is_unstacked(params: Params) -> bool:
    """Whether the parameters have one dictionary per layer (see `CausalLM.unstack`)."""
    return 0 in params["layers"]


def _unwrap(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the config.json of the decoder inside a multimodal model; any other config.json unchanged."""
    unwraps = {outer: unwrap for family in FAMILIES.values() for outer, unwrap in family.unwrap.items()}
    return next((unwrap(config) for outer, unwrap in unwraps.items() if outer == config.get("model_type")), config)


def _refuse_architecture(config: dict[str, Any]):
    experts = next((key for key in config if "experts" in key and config[key]), None)
    why = f": a mixture of experts ({experts} {config[experts]!r}), which is not supported" if experts else ""
    supported = sorted({*FAMILIES, *(outer for family in FAMILIES.values() for outer in family.unwrap)})
    raise InputError(
        f"config.json: unknown architecture, model_type {config.get('model_type')!r} "
        f"(architectures: {config.get('architectures')}){why}; known: {', '.join(supported)}"
    )
