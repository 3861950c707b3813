"""A model as the rest of the library sees it: functions of a parameter dictionary, whatever the family."""

from dataclasses import dataclass
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

Params = dict[str, Any]  # nested; leaves are arrays, layers stacked along their first axis

# model_type of config.json -> (module of the family, its configuration, its network)
FAMILIES: dict[str, tuple[ModuleType, type, type]] = {"llama": (llama, llama.LlamaConfig, llama.Llama)}


@dataclass(frozen=True)
class CausalLM:
    """A decoder-only language model without its parameters; hashable, so it may be a static argument of `jax.jit`.

    Attributes:
        model_type: Family, as config.json names it.
        config: Shape of the model.
        compute: Types and rematerialisation.
    """

    model_type: str
    config: Any
    compute: ComputeOptions = ComputeOptions()

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

    def _network(self, rngs: nnx.Rngs) -> nnx.Module:
        return FAMILIES[self.model_type][2](self.config, self.compute, rngs=rngs)

    def init(self, key: jax.Array) -> Params:
        """Draws random parameters.

        Args:
            key: A `jax.random.key`.

        Returns:
            Parameters in `compute.param_dtype`.
        """
        return nnx.to_pure_dict(nnx.state(self._network(nnx.Rngs(key)), nnx.Param))

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
