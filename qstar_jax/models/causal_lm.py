"""A model as the rest of the library sees it: functions of a parameter dictionary, whatever the family."""

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
from qstar_jax.models.masks import RowMask, right_padded
from qstar_jax.models.rope_keys import check_widths
from qstar_jax.models.tensors import Tensor


@dataclass(frozen=True)
class CausalLM:
    """A decoder-only language model without its parameters; hashable, so it may be a static argument of `jax.jit`.

    Attributes:
        model_type: Family, as config.json names it.
        config: Shape of the model.
        compute: Types and rematerialisation.
        lora: Shape of the adapter that its parameters have beside their base; None: no adapter.
        other_keys: Keys of its config.json that change nothing here, and are written again.
    """

    model_type: str
    config: DecoderConfig
    compute: ComputeOptions = ComputeOptions()
    lora: Lora | None = None
    other_keys: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def from_hf(cls, config: dict[str, Any], compute: ComputeOptions = ComputeOptions()) -> "CausalLM":
        """Builds the model that a config.json describes.

        Args:
            config: The dictionary of the config.json.
            compute: Types and rematerialisation.

        Raises:
            InputError: If the architecture is not known, or has a part that is not built.
        """
        config = _unwrapped(config)
        if config.get("model_type") not in list(FAMILIES):
            _refuse_architecture(config)
        family = FAMILIES[config["model_type"]]
        keys = Keys(config)
        shape = family.read(keys)
        for rope in filter(None, shape.ropes):
            check_widths(rope, shape.head_dim)
        return cls(family.model_type, shape, compute, other_keys=keys.others())

    def to_hf(self) -> dict[str, Any]:
        """Returns the dictionary of a config.json that `from_hf` and transformers read."""
        known = {"architectures": [self.family.architecture], "model_type": self.model_type}
        return self.other_keys | known | self.family.write(self.config)

    @property
    def family(self) -> Family:
        """How Hugging Face stores such models."""
        return FAMILIES[self.model_type]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Path of each parameter of the base -> where it lies in a Hugging Face file."""
        return self.family.tensors(self.config)

    @property
    def base(self) -> "CausalLM":
        """The model without its adapter."""
        return replace(self, lora=None)

    def check_length(self, length: int, what: str) -> str | None:
        """Compares a length with the positions for which the model was made.

        Args:
            length: The longest row, in tokens.
            what: What is so long, for the sentence.

        Returns:
            A warning with both numbers, or None if all fits.

        Raises:
            InputError: If it does not fit, and positions are learned, or longrope has other frequencies for it.
        """
        made_for, context = self.config.max_position_embeddings, self.config.longrope_context
        choice = self.compute.longrope
        if context is not None and choice != "long" and length > context:
            raise InputError(
                f"{what}: {length:,} tokens; beyond {context:,} this model has other rotary frequencies, for all texts "
                "alike: set compute.longrope to long, or shorten the rows or the answers"
            )
        if length <= made_for:
            return None if context or choice == "auto" else f"compute.longrope {choice} has no effect on this model"
        said = f"{what}: {length:,} tokens, and the model was made for {made_for:,} (max_position_embeddings)"
        if self.config.learned_positions:
            raise InputError(f"{said}; it has no positions beyond them: shorten the rows or the answers")
        return f"warning: {said}; what it says beyond them may be nonsense"

    @property
    def linear_layers(self) -> dict[str, str]:
        """Name of each linear layer of a block (`q_proj`, ...), as adapters call it -> path of its parameters here."""
        kernels = [path.removesuffix("/kernel") for path in self.tensors if path.endswith("/kernel")]
        return {f"{path.split('/')[-1]}_proj": path for path in kernels}

    @property
    def linear_modules(self) -> dict[str, str]:
        """Name of each linear layer as adapters call it -> of its module in a Hugging Face file, maybe a fused one."""
        return {
            name: self.tensors[f"{path}/kernel"].name.removesuffix(".weight")
            for name, path in self.linear_layers.items()
        }

    def with_lora(
        self, rank: int, alpha: float, targets: Sequence[str] | None = None, rank_stabilised: bool = False
    ) -> "CausalLM":
        """The model with an adapter.

        Args:
            rank: Its rank.
            alpha: Its alpha (see `lora.Lora`).
            targets: Names of the layers that have one, as in `linear_layers` or as (an end of) the family's own name
                of a module in `linear_modules`, which stands for all layers that are in it; None: all.
            rank_stabilised: Whether the scale is alpha / sqrt(rank).

        Raises:
            InputError: If the rank is not positive, or the model does not have one of the layers.
        """
        modules = self.linear_modules
        targets = list(modules) if targets is None else targets
        meant = {
            target: [name for name, module in modules.items() if target == name or f".{module}".endswith(f".{target}")]
            for target in targets
        }
        if not isinstance(rank, int) or rank < 1:
            raise InputError(f"the rank of an adapter is a whole number of at least 1 (found: {rank!r})")
        unknown = sorted(target for target, names in meant.items() if not names)
        if unknown or not targets:
            found = ", ".join(map(repr, unknown)) or "none at all"
            known = dict.fromkeys([*modules, *(module.split(".")[-1] for module in modules.values())])
            raise InputError(f"an adapter's targets are some of {', '.join(known)} (found: {found})")
        order = tuple(name for name in modules if any(name in names for names in meant.values()))
        return replace(self, lora=Lora(rank, float(alpha), order, rank_stabilised))

    def _network(self, rngs: nnx.Rngs, stacked: bool = True) -> nnx.Module:
        return Decoder(self.config, self.compute, self.lora, stacked, rngs=rngs)

    def init(self, key: jax.Array) -> Params:
        """Draws random parameters.

        Args:
            key: A `jax.random.key`.

        Returns:
            Parameters in `compute.param_dtype`.
        """
        return nnx.to_pure_dict(nnx.state(self._network(nnx.Rngs(key)), nnx.Param))

    def init_adapter(self, key: jax.Array) -> Params:
        """Draws a fresh adapter, which changes nothing yet: its second matrices are 0.

        Args:
            key: A `jax.random.key`.

        Returns:
            The adapter alone, float32 (see `lora.split_adapter`).
        """
        return split_adapter(self.init(key))[1]

    def abstract_params(self) -> Params:
        """Returns the parameters' shapes and types, as `jax.ShapeDtypeStruct`s."""
        return jax.tree.map(lambda x: x, _abstract_params(self))  # a tree of the caller's own

    def _bind(self, params: Params) -> nnx.Module:
        return nnx.merge(_graph(self, not is_unstacked(params)), nnx.State(jax.tree.map(nnx.Param, params)))

    def hidden_states(
        self,
        params: Params,
        tokens: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        mask: Bool[Array, "B S S"] | RowMask,
    ) -> Float[Array, "B S D"]:
        """Last hidden states [B, S, D]; arguments as those of `decoder.Decoder`."""
        return self._bind(params)(tokens, positions, mask)

    def prefill(
        self, params: Params, prompts: Int[Array, "B P"], prompt_lengths: Int[Array, " B"], slots: int
    ) -> tuple[Float[Array, "B V"], "DecodeCache"]:
        """Runs prompts, each once.

        Args:
            params: Parameters, stacked or not (`unstack`).
            prompts: Right-padded token ids. Shape [B, P].
            prompt_lengths: Tokens of each prompt, at least 1. Shape [B].
            slots: Room for the tokens that will follow each prompt, M.

        Returns:
            Float32 logits of the first new token, shape [B, V], and the cache.
        """
        slot = jnp.arange(prompts.shape[1])
        positions = jnp.broadcast_to(slot, prompts.shape)
        mask = RowMask(jnp.where(slot < prompt_lengths[:, None], 0, -1), jnp.zeros_like(prompts))
        hidden, layers = self._bind(params).prefill(prompts, positions, mask, slots)
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
        """Runs K tokens a prompt, each at the end of a path of its own through the pool.

        Args:
            params: Parameters, stacked or not (`unstack`).
            cache: What `prefill` or the last `extend` returned.
            tokens: Token ids. Shape [B, K].
            path: True at the slots of the pool that hold the tokens before each of them, and at its own. Shape
                [B, K, M].
            slot: The pool's slot of the first of the K tokens; they take K slots.

        Returns:
            Float32 logits of the tokens that come next, shape [B, K, V], and the cache with these in it.
        """
        width = jax.tree.leaves(cache.layers)[0].shape[-2]  # of the prompts' keys
        prompt_mask = jnp.arange(width) < cache.prompt_lengths[:, None]
        positions = cache.prompt_lengths[:, None] + path.sum(-1) - 1
        pool_positions = jax.lax.dynamic_update_slice(cache.pool_positions, positions, (0, slot))
        network = self._bind(params)
        hidden, layers = network.extend(tokens, positions, prompt_mask, path, pool_positions, cache.layers, slot)
        return self.head(params).logits(hidden), replace(cache, layers=layers, pool_positions=pool_positions)

    def unstack(self, params: Params) -> Params:
        """Takes the layers out of their stack, as decoding wants them: it then reads each weight where it lies.

        Args:
            params: Parameters; stacked ones are copied, unstacked ones are returned as they are.

        Returns:
            Parameters with one dictionary a layer.
        """
        if is_unstacked(params):
            return params
        layers = params["layers"]
        count = jax.tree.leaves(layers)[0].shape[0]
        return params | {"layers": {i: jax.tree.map(lambda x, i=i: x[i], layers) for i in range(count)}}

    def head(self, params: Params) -> Head:
        """What makes logits of last hidden states, wherever there are any: in training, scoring and decoding."""
        return self._bind(params).head()

    def logits(
        self, params: Params, tokens: Int[Array, "B S"], lengths: Int[Array, " B"] | None = None
    ) -> Float[Array, "B S V"]:
        """Float32 logits of right-padded rows. For short texts: training and scoring never build this array.

        Args:
            params: Parameters.
            tokens: Token ids. Shape [B, S].
            lengths: Tokens of each row that are not padding; all of them by default. Shape [B].

        Returns:
            Logits. Shape [B, S, V].
        """
        rows, length = tokens.shape
        lengths = jnp.full(rows, length) if lengths is None else lengths
        return self.head(params).logits(self.hidden_states(params, tokens, *right_padded(lengths, length)))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeCache:
    """What decoding remembers of B prompts and of M tokens after each (see `cache.LayerCache`).

    Attributes:
        layers: Keys and values of each layer; one stack of them where the parameters are stacked.
        prompt_lengths: Tokens of each prompt. Shape [B].
        pool_positions: Positions of the pool's tokens in their texts, from which windows count. Shape [B, M].
    """

    layers: LayerCache | tuple[LayerCache, ...]
    prompt_lengths: Int[Array, " B"]
    pool_positions: Int[Array, "B M"]

    def reorder(self, slots: Int[Array, "B N"]) -> "DecodeCache":
        """Moves the pool's tokens.

        Args:
            slots: Where each slot's new content lies now. Shape [B, N]; N is the size of the new pool.
        """
        is_layer = lambda x: isinstance(x, LayerCache)  # noqa: E731
        layers = jax.tree.map(lambda x: x.reorder(slots), self.layers, is_leaf=is_layer)
        return replace(self, layers=layers, pool_positions=jnp.take_along_axis(self.pool_positions, slots, axis=1))


@cache
def _abstract_params(model: CausalLM) -> Params:
    return jax.eval_shape(model.init, jax.random.key(0))


@cache
def _graph(model: CausalLM, stacked: bool) -> nnx.GraphDef:
    """What a network is beside its parameters; every pass asks for it, and to build it takes long in Python."""
    return nnx.split(nnx.eval_shape(lambda: model._network(nnx.Rngs(0), stacked)), nnx.Param)[0]


def is_unstacked(params: Params) -> bool:
    """Whether the parameters have one dictionary a layer (see `CausalLM.unstack`)."""
    return 0 in params["layers"]


def _unwrapped(config: dict[str, Any]) -> dict[str, Any]:
    """The config.json of a decoder that a multimodal model has within it; any other as it is."""
    unwraps = {outer: unwrap for family in FAMILIES.values() for outer, unwrap in family.unwrap.items()}
    return next((unwrap(config) for outer, unwrap in unwraps.items() if outer == config.get("model_type")), config)


def _refuse_architecture(config: dict[str, Any]):
    experts = next((key for key in config if "experts" in key and config[key]), None)
    why = f": a mixture of experts ({experts} {config[experts]!r}), which is not built here" if experts else ""
    known = sorted({*FAMILIES, *(outer for family in FAMILIES.values() for outer in family.unwrap)})
    raise InputError(
        f"config.json: unknown architecture, model_type {config.get('model_type')!r} "
        f"(architectures: {config.get('architectures')}){why}; known: {', '.join(known)}"
    )
