"""Low-rank adapters (LoRA, arXiv 2106.09685): x W + scale (x A) B, with A and B trained and W frozen.

Parameters with an adapter are those of the base, and beside each adapted kernel a `lora` with the two matrices; layers
are stacked along the first axis, as everywhere.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qstar_jax._compat import nnx

Params = dict[str, Any]

_ADAPTER = "lora"  # the name under which flax's LoRALinear keeps its matrices, `lora_a` and `lora_b`


@dataclass(frozen=True)
class Lora:
    """Shape of an adapter; hashable.

    Attributes:
        rank: Rank of each product A B.
        alpha: The product is scaled by alpha / rank.
        targets: Linear layers that have one, as most families name them (`q_proj`, ...).
        rank_stabilised: Scale by alpha / sqrt(rank) instead (rsLoRA, arXiv 2312.03732).
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    rank_stabilised: bool = False

    @property
    def scale(self) -> float:
        """What the product is multiplied by."""
        return self.alpha / self._divisor(self.rank)

    def alpha_for(self, rank: int) -> float:
        """The alpha with which matrices of another rank have the same scale."""
        return self.scale * self._divisor(rank)

    def _divisor(self, rank: int) -> float:
        return math.sqrt(rank) if self.rank_stabilised else rank


class LoraLinear(nnx.LoRALinear):
    """flax's layer with LoRA's scale; the adapter is float32, whatever the base is stored in.

    A begins uniform in +-1/sqrt(inputs), as in PEFT, and B at 0, so that the layer begins as its base.
    """

    def __init__(self, inputs: int, outputs: int, lora: Lora, *, dtype, rngs: nnx.Rngs, **kwargs):
        super().__init__(
            inputs,
            outputs,
            lora_rank=lora.rank,
            lora_dtype=dtype,
            lora_param_dtype=jnp.float32,
            a_initializer=jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
            dtype=dtype,
            rngs=rngs,
            **kwargs,
        )
        self.scale = lora.scale

    def __call__(self, x: Float[Array, "N I"]) -> Float[Array, "N O"]:
        """Applies the layer to N tokens."""
        return nnx.Linear.__call__(self, x) + self.scale * self.lora(x)


@dataclass(frozen=True)
class Linears:
    """How a model's linear layers are made: in its types, and with an adapter where one is asked for.

    Attributes:
        lora: Adapter of the layers that it names; None: plain layers.
        dtype: Type of the products.
        param_dtype: Type in which kernels and biases are stored.
    """

    lora: Lora | None
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    def __call__(self, name: str, inputs: int, outputs: int, *, bias: bool, rngs: nnx.Rngs) -> nnx.Linear:
        """Makes the layer that adapters call `name`."""
        common = {"use_bias": bias, "dtype": self.dtype, "param_dtype": self.param_dtype, "rngs": rngs}
        if self.lora is not None and name in self.lora.targets:
            return LoraLinear(inputs, outputs, self.lora, **common)
        return nnx.Linear(inputs, outputs, **common)


def split_adapter(params: Params) -> tuple[Params, Params]:
    """Takes parameters apart.

    Args:
        params: With or without an adapter.

    Returns:
        (base, adapter): two trees over the same paths; the second is empty where there is no adapter.
    """
    base, adapter = {}, {}
    for name, value in params.items():
        if name == _ADAPTER:
            adapter[name] = value
        elif not isinstance(value, dict):
            base[name] = value
        else:
            base[name], inner = split_adapter(value)
            if inner:
                adapter[name] = inner
    return base, adapter


def attach_adapter(base: Params, adapter: Params) -> Params:
    """Puts together what `split_adapter` took apart."""
    both = base | adapter
    inner = {name: attach_adapter(base[name], adapter[name]) for name in adapter if name in base}
    return both | inner


def merge_adapter(params: Params, lora: Lora) -> Params:
    """Folds the adapter into its base: W + scale A B, computed in float32.

    Args:
        params: Parameters with an adapter.
        lora: Its shape.

    Returns:
        Parameters of the plain model, in the type of the base.
    """
    merged = {}
    for name, value in params.items():
        if name == _ADAPTER:
            continue
        if not isinstance(value, dict):
            merged[name] = value
        elif _ADAPTER in value:
            a, b = value[_ADAPTER]["lora_a"], value[_ADAPTER]["lora_b"]
            product = jnp.einsum("lir,lro->lio", a, b, precision="highest")
            kernel = (value["kernel"].astype(jnp.float32) + lora.scale * product).astype(value["kernel"].dtype)
            merged[name] = {**value, "kernel": kernel}
            del merged[name][_ADAPTER]
        else:
            merged[name] = merge_adapter(value, lora)
    return merged
