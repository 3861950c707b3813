"""A model as the rest of the library sees it: functions of a parameter dictionary, whatever the family."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qstar_jax._compat import nnx
from qstar_jax.config import ComputeOptions
from qstar_jax.errors import InputError
from qstar_jax.models import llama
from qstar_jax.models.layers import KVCache, RowMask
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

    def _network(self, rngs: nnx.Rngs) -> nnx.Module:
        return FAMILIES[self.model_type][2](self.config, self.compute, self.lora, rngs=rngs)

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
        return jax.eval_shape(self.init, jax.random.key(0))

    def _bind(self, params: Params) -> nnx.Module:
        graphdef, _ = nnx.split(nnx.eval_shape(lambda: self._network(nnx.Rngs(0))), nnx.Param)
        return nnx.merge(graphdef, nnx.State(jax.tree.map(nnx.Param, params)))

    def hidden_states(
        self,
        params: Params,
        tokens: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        mask: Bool[Array, "B S K"] | RowMask,
        cache: KVCache | None = None,
        cache_index: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "B S D"], KVCache | None]:
        """Last hidden states [B, S, D] and the updated cache; arguments as those of `llama.Llama`."""
        return self._bind(params)(tokens, positions, mask, cache, cache_index)

    def unembedding(self, params: Params) -> Float[Array, "V D"]:
        """Output vectors of the vocabulary, shape [V, D]: logits are `hidden @ unembedding.T`, in float32."""
        return self._bind(params).unembedding()

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
        hidden, _ = self.hidden_states(params, tokens, *right_padded(lengths, length))
        return jnp.einsum("bsd,vd->bsv", hidden, self.unembedding(params), preferred_element_type=jnp.float32)

    def init_cache(self, rows: int, length: int) -> KVCache:
        """Makes an empty cache of `length` slots for `rows` rows, in `compute.dtype`."""
        config = self.config
        shape = (config.num_hidden_layers, rows, length, config.num_key_value_heads, config.head_dim)
        return KVCache(keys=jnp.zeros(shape, self.compute.dtype), values=jnp.zeros(shape, self.compute.dtype))


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
