"""A model as the rest of the library sees it: functions of a parameter dictionary, whatever the family."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qstar_jax._compat import nnx
from qstar_jax.config import ComputeOptions
from qstar_jax.errors import InputError
from qstar_jax.head import Head
from qstar_jax.models import llama
from qstar_jax.models.layers import LayerCache, RowMask
from qstar_jax.models.lora import Lora, Params, split_adapter

# model_type of config.json -> (module of the family, its configuration, its network)
FAMILIES: dict[str, tuple[ModuleType, type, type]] = {"llama": (llama, llama.LlamaConfig, llama.Llama)}


@dataclass(frozen=True)
class CausalLM:
    """A decoder-only language model without its parameters; hashable, so it may be a static argument of `jax.jit`.

    Attributes:
        model_type: Family, as config.json names it.
        config: Shape of the model.
        compute: Types and rematerialisation.
        lora: Shape of the adapter that its parameters have beside their base; None: no adapter.
    """

    model_type: str
    config: Any
    compute: ComputeOptions = ComputeOptions()
    lora: Lora | None = None

    @classmethod
    def from_hf(cls, config: dict[str, Any], compute: ComputeOptions = ComputeOptions()) -> "CausalLM":
        """Builds the model that a config.json describes.

        Args:
            config: The dictionary of the config.json.
            compute: Types and rematerialisation.

        Raises:
            InputError: If the architecture is not known, or has a part that is not built.
        """
        model_type = config.get("model_type")
        if model_type not in FAMILIES:
            raise InputError(
                f"config.json: unknown architecture, model_type {model_type!r} "
                f"(architectures: {config.get('architectures')}); known: {', '.join(sorted(FAMILIES))}"
            )
        return cls(model_type, FAMILIES[model_type][1].from_hf(config), compute)

    @property
    def family(self) -> ModuleType:
        """The module of the family: names of tensors, sharding overrides, FLOPs."""
        return FAMILIES[self.model_type][0]

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
            InputError: If it does not fit, and positions are learned.
        """
        made_for = self.config.max_position_embeddings
        if length <= made_for:
            return None
        said = f"{what}: {length:,} tokens, and the model was made for {made_for:,} (max_position_embeddings)"
        if self.family.POSITIONS == "learned":
            raise InputError(f"{said}; it has no positions beyond them: shorten the rows or the answers")
        return f"warning: {said}; what it says beyond them may be nonsense"

    @property
    def linear_layers(self) -> dict[str, str]:
        """Hugging Face's name of each linear layer of a block (`q_proj`, ...) -> path of its parameters here."""
        tensors = self.family.hf_tensors(self.config)
        kernels = {path: name for path, (name, _) in tensors.items() if path.endswith("/kernel")}
        return {name.split(".")[-2]: path.removesuffix("/kernel") for path, name in kernels.items()}

    def with_lora(
        self, rank: int, alpha: float, targets: Sequence[str] | None = None, rank_stabilised: bool = False
    ) -> "CausalLM":
        """The model with an adapter.

        Args:
            rank: Its rank.
            alpha: Its alpha (see `lora.Lora`).
            targets: Hugging Face's names of the layers that have one; None: all of `linear_layers`.
            rank_stabilised: Whether the scale is alpha / sqrt(rank).

        Raises:
            InputError: If the rank is not positive, or the model does not have one of the layers.
        """
        layers = self.linear_layers
        targets = list(layers) if targets is None else targets
        if not isinstance(rank, int) or rank < 1:
            raise InputError(f"the rank of an adapter is a whole number of at least 1 (found: {rank!r})")
        unknown = sorted(set(targets) - set(layers))
        if unknown or not targets:
            found = ", ".join(map(repr, unknown)) or "none at all"
            raise InputError(f"an adapter's targets are some of {', '.join(layers)} (found: {found})")
        order = tuple(name for name in layers if name in targets)
        return replace(self, lora=Lora(rank, float(alpha), order, rank_stabilised))

    def _network(self, rngs: nnx.Rngs, stacked: bool = True) -> nnx.Module:
        return FAMILIES[self.model_type][2](self.config, self.compute, self.lora, stacked, rngs=rngs)

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
        """Last hidden states [B, S, D]; arguments as those of `llama.Llama`."""
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
        return self.head(params).logits(last), DecodeCache(layers, prompt_lengths)

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
        hidden, layers = self._bind(params).extend(tokens, positions, prompt_mask, path, cache.layers, slot)
        return self.head(params).logits(hidden), replace(cache, layers=layers)

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
    """What decoding remembers of B prompts and of M tokens after each (see `layers.LayerCache`).

    Attributes:
        layers: Keys and values of each layer; one stack of them where the parameters are stacked.
        prompt_lengths: Tokens of each prompt. Shape [B].
    """

    layers: LayerCache | tuple[LayerCache, ...]
    prompt_lengths: Int[Array, " B"]

    def reorder(self, slots: Int[Array, "B N"]) -> "DecodeCache":
        """Moves the pool's tokens.

        Args:
            slots: Where each slot's new content lies now. Shape [B, N]; N is the size of the new pool.
        """
        is_layer = lambda x: isinstance(x, LayerCache)  # noqa: E731
        return replace(self, layers=jax.tree.map(lambda x: x.reorder(slots), self.layers, is_leaf=is_layer))


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


def right_padded(lengths: Int[Array, " B"], length: int) -> tuple[Int[Array, "B S"], Bool[Array, "B S S"]]:
    """Positions and causal mask of rows that begin at slot 0 and are padded at their end.

    Args:
        lengths: Tokens of each row. Shape [B].
        length: Slots of a row, S.

    Returns:
        (positions, mask): shapes [B, S] and [B, S, S]. Padding sees what it likes and is seen by nothing before it.
    """
    slots = jnp.arange(length)
    positions = jnp.broadcast_to(slots, (lengths.shape[0], length))
    causal = slots[None, :] <= slots[:, None]
    return positions, causal[None] & (slots[None, None, :] < lengths[:, None, None])


def left_padded(lengths: Int[Array, " B"], length: int) -> tuple[Int[Array, "B S"], Bool[Array, "B S S"]]:
    """Positions and causal mask of rows that end at the last slot and are padded at their beginning.

    Args:
        lengths: Tokens of each row. Shape [B].
        length: Slots of a row, S.

    Returns:
        (positions, mask): shapes [B, S] and [B, S, S]. Padding sees itself only.
    """
    slots = jnp.arange(length)
    start = length - lengths[:, None]
    positions = jnp.maximum(slots - start, 0)
    causal = slots[None, :] <= slots[:, None]
    return positions, causal[None] & ((slots >= start)[:, None, :] | jnp.eye(length, dtype=bool))
